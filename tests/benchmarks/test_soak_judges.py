"""What judges a soak: the growth of memory over its samples, and which texts are greedy answers up to near ties."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.servers import greedy, memory
from slmdeploy.runtime.model import load
from tests.graphs import write_tiny_graph

MB = 1_000_000


def test_memory_that_settles_has_not_grown_and_a_leak_has() -> None:
    settles = [(float(second), min(second, 10) * 10 * MB) for second in range(1, 101)]
    found = memory.growth(settles)
    assert (found.settled_bytes, found.slope_bytes_per_s, found.growth_bytes) == (100 * MB, 0.0, 0)
    leaks = [(second, size + int(second) * MB) for second, size in settles]
    assert memory.growth(leaks).slope_bytes_per_s == pytest.approx(MB)
    assert memory.growth(leaks).growth_bytes == pytest.approx(80 * MB, rel=0.05)


def test_a_late_jump_is_growth_though_the_trend_is_flat() -> None:
    late = [(float(second), (100 if second < 80 else 150) * MB) for second in range(100)]
    found = memory.growth(late)
    assert found.slope_bytes_per_s == 0.0
    assert found.growth_bytes == 50 * MB


def test_too_few_samples_are_said() -> None:
    with pytest.raises(ValueError, match="are too few to tell its growth"):
        memory.growth([(0.0, 1), (1.0, 1), (100.0, 1)])


def test_a_watch_samples_a_process_until_its_block_ends() -> None:
    with memory.watched(os.getpid(), 0.001) as samples:
        until = time.monotonic() + 30
        while len(samples) < 3 and time.monotonic() < until:
            time.sleep(0.001)
    taken = len(samples)
    assert taken >= 3
    assert all(size > MB for _, size in samples)
    assert samples == sorted(samples)
    assert len(samples) == taken
    assert memory.open_files(os.getpid()) > 0


def test_greedy_answers_are_accepted_and_others_are_not(tmp_path: Path) -> None:
    build = write_tiny_graph(tmp_path / "tiny")
    text = load(build).generate("abc", max_new_tokens=6).text
    judge = greedy.Greedy(build)
    assert judge.accepts("abc", text, 6, True)
    assert judge.accepts("abc", text[:2], 6, False)
    assert not judge.accepts("abc", text[:2], 6, True)
    assert not judge.accepts("abc", text + "a", 6, True)
    assert not judge.accepts("abc", "status 500: broken", 6, True)


def test_a_near_tie_may_fall_either_way_and_a_clear_choice_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = write_tiny_graph(tmp_path / "tiny")
    model = load(build)
    ids = model.codec.prompt("abc", "prompt")
    logits = model.logits(ids)[-1]
    best, second = np.argsort(-logits)[:2].tolist()
    detokenizer = model.codec.detokenizer(ids)
    other = detokenizer.feed(second) + detokenizer.flush()
    gap = float(logits[best] - logits[second])
    for near, accepted in ((gap * 1.01, True), (gap * 0.99, False)):
        monkeypatch.setattr(greedy, "NEAR_FP32", near)
        assert greedy.Greedy(build).accepts("abc", other, 1, True) is accepted
