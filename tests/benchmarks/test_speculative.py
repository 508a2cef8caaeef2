"""The benchmark of drafts: ratios are of the same prompts, counts are added up, and what runs cost is per step."""

from pathlib import Path

import pytest

from benchmarks.speculative import ROWS, Way, decode, line_of, prompts_of, run_costs, step_ratio
from slmdeploy.runtime.model import load
from tests.graphs import write_tiny_graph


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build with a context of 64 tokens."""
    return write_tiny_graph(tmp_path_factory.mktemp("graphs") / "tiny", tasks=("generate",))


def test_a_way_is_compared_prompt_by_prompt(tiny: Path) -> None:
    plain, looked = Way("plain", load(tiny)), Way("prompt lookup", load(tiny, prompt_lookup=True))
    for number, ids in enumerate(([5, 6, 7], [5, 6, 7], [8, 9])):
        for way in (plain, looked):
            decode(way, ids, 20, 0.0, counts=number > 0)
    plain.seconds, looked.seconds = [0.3, 0.2], [0.1, 0.2]
    line = line_of(looked, plain)
    assert line.speedup_p50 == pytest.approx(2.0)
    assert (line.same, line.prompts) == (2, 2)
    assert looked.behind_first == 2 * 19
    assert line.tokens_per_run == looked.behind_first / looked.runs
    assert line_of(plain, plain).acceptance is None


def test_costs_are_in_steps(tiny: Path) -> None:
    model = load(tiny)
    costs = run_costs(model, list(range(5, 20)))
    assert set(costs) == set(ROWS)
    assert costs[1] == 1.0
    assert min(costs.values()) > 0
    assert step_ratio(model, load(tiny), [5, 6, 7]) > 0


def test_prompts_are_those_of_the_test_split(tmp_path: Path) -> None:
    (tmp_path / "generate.test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n')
    assert prompts_of(tmp_path, 1) == ["a"]
    assert prompts_of(tmp_path, 5) == ["a", "c"]
