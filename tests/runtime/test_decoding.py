"""The KV cache and the decoder: steps, batches and growth give what one prefill over everything gives."""

import gc
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from slmdeploy.runtime import kv
from slmdeploy.runtime.batching import BatchDecoder
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.decoding import Decoder, token_array
from slmdeploy.runtime.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.kv import KvCache
from slmdeploy.runtime.model import Model, load
from tests.graphs import write_tiny_graph

IDS = [0, 5, 60, 7, 111, 9, 10, 33, 4]


def test_steps_equal_a_prefill_over_everything(model: Model) -> None:
    whole = model.logits(IDS)
    assert whole.shape == (len(IDS), model.runtime.vocab_size)
    got = [model.prefill(IDS[:3]), *(model.decode(token) for token in IDS[3:])]
    assert np.abs(np.array(got) - whole[2:]).max() < 1e-5


def test_given_tokens_behind_a_prompt_equal_a_prefill_over_everything(tiny: Path) -> None:
    model = load(tiny)
    whole, decoder = model.logits(IDS), model.decoder
    model.prefill(IDS[:3])
    for _ in range(2):
        assert np.abs(decoder.extend(np.array(IDS[3:6])) - whole[3:6]).max() < 1e-5
        assert np.abs(decoder.step(IDS[6]) - whole[6]).max() < 1e-5
        decoder.cache.truncate(3)
    with pytest.raises(InputError, match="holds 64"):
        decoder.extend(np.full(62, 5))


def test_a_prompt_that_goes_on_later_equals_a_prefill_over_everything(tiny: Path) -> None:
    model = load(tiny, prefill_chunk=2)
    whole, decoder = model.logits(IDS), model.decoder
    model.prefill(IDS[:3])
    assert np.abs(decoder.resume(np.array(IDS[3:8])) - whole[7]).max() < 1e-5
    assert np.abs(decoder.step(IDS[8]) - whole[8]).max() < 1e-5
    with pytest.raises(InputError, match="holds 64"):
        decoder.resume(np.full(62, 5))


@pytest.mark.parametrize("length", [1, 7, 64])
def test_lengths_one_odd_and_the_whole_context(model: Model, length: int) -> None:
    ids = np.random.default_rng(length).integers(2, 200, length).tolist()
    assert np.abs(model.prefill(ids) - model.logits(ids)[-1]).max() < 1e-5


@pytest.mark.parametrize("chunk", [1, 2, 4, 9, 100])
def test_a_prompt_in_pieces_equals_one_at_once(tiny: Path, chunk: int) -> None:
    model = load(tiny)
    whole, ids = model.logits(IDS), IDS[:7]
    model.decoder.prefill_chunk = chunk
    assert np.abs(model.prefill(ids) - whole[6]).max() < 1e-5
    assert np.abs(model.decode(IDS[7]) - whole[7]).max() < 1e-5
    assert model.generate_batch_ids([ids], max_new_tokens=5) == [list(load(tiny).generate_ids(ids, max_new_tokens=5))]


def split_folder(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with the graph of `tiny` for steps and another one's for prompts, and the folder of that other one."""
    folder = shutil.copytree(tiny, tmp_path / "split")
    other = write_tiny_graph(tmp_path / "other", kv_heads=(2, 1), seed=5)
    shutil.copyfile(other / "model.onnx", folder / "prefill.onnx")
    renamed = onnx.load(folder / "prefill.onnx", load_external_data=False)
    for tensor in renamed.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "prefill.onnx.data" if entry.key == "location" else entry.value
    onnx.save(renamed, folder / "prefill.onnx")
    shutil.copyfile(other / "model.onnx.data", folder / "prefill.onnx.data")
    return folder, other


def test_steps_of_many_rows_run_in_the_graph_of_prompts(tiny: Path, tmp_path: Path) -> None:
    folder, other = split_folder(tiny, tmp_path)
    config = replace(read_runtime(folder), own_prefill=True, step_rows=3)
    batch, prompts = BatchDecoder(Decoder(folder, config, 1), 4), load(other)
    for rows in (1, 2, 3, 4):
        batch.admit(np.array(IDS))
        found = batch.step(np.full(rows, 9))
        alone = prompts.logits([*IDS, 9])[-1]
        assert bool(np.abs(found[rows - 1] - alone).max() < 1e-5) is (rows >= 3)


def test_prompts_may_have_a_graph_of_their_own(tiny: Path, tmp_path: Path) -> None:
    folder, other = split_folder(tiny, tmp_path)
    config = replace(read_runtime(folder), own_prefill=True)
    ids = np.array(IDS)
    split, steps, prompts = Decoder(folder, config, 1), Decoder(tiny, read_runtime(tiny), 1), load(other)
    assert np.abs(split.prefill(ids) - prompts.prefill(IDS)).max() < 1e-6
    first, rest = split.logits(ids)[:5], split.logits(ids)[5:]
    assert np.abs(first - prompts.logits(IDS)[:5]).max() < 1e-5
    split.prefill(ids[:5])
    assert np.abs(rest - np.array([split.step(token).copy() for token in IDS[5:]])).max() < 1e-5
    assert np.abs(rest - steps.logits(ids)[5:]).max() > 0.01, "they see the keys of the other graph"
    (folder / "prefill.onnx").unlink()
    with pytest.raises(CorruptArtifactError, match=r"prefill\.onnx does not load"):
        Decoder(folder, config, 1)


def test_results_are_the_callers_own(model: Model) -> None:
    first = model.prefill(IDS)
    kept = first.copy()
    model.decode(3)
    assert (first == kept).all()


def test_a_padded_batch_equals_its_rows_and_leaves_the_sequence_alone(model: Model) -> None:
    rows = [IDS, IDS[:1], IDS[:4]]
    alone = [model.prefill(row) for row in rows]
    model.prefill(IDS[:4])
    together = model.batch_logits(rows)
    assert np.abs(np.array(together) - np.array(alone)).max() < 1e-5
    assert np.abs(model.decode(IDS[4]) - model.logits(IDS[:5])[-1]).max() < 1e-5


def test_steps_that_outgrow_the_buffers_keep_what_they_hold(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "_SMALLEST", 4)
    decoder = Decoder(tiny, read_runtime(tiny), threads=1)
    ids = np.array(IDS)
    decoder.prefill(ids[:3])
    assert decoder.cache.capacity == 4
    got = [decoder.step(token).copy() for token in IDS[3:]]
    assert decoder.cache.capacity == 16
    assert np.abs(np.array(got) - decoder.logits(ids)[3:]).max() < 1e-5


def test_a_prefill_starts_anew(model: Model) -> None:
    model.prefill([50, 51, 52, 53])
    again = model.prefill(IDS)
    assert np.abs(again - model.logits(IDS)[-1]).max() < 1e-5


def test_more_than_the_context_is_refused_by_both_numbers(model: Model) -> None:
    for call in (model.prefill, model.logits):
        with pytest.raises(InputError, match="65 tokens are needed at once, but the context of this model holds 64"):
            call([2] * 65)
    model.prefill([2] * 64)
    with pytest.raises(InputError, match="65 tokens are needed"):
        model.decode(2)
    with pytest.raises(InputError, match="65 tokens"):
        model.batch_logits([[2], [2] * 65])


@pytest.mark.parametrize("ids", [[272], [-1], [3, 10**12]])
def test_ids_outside_the_vocabulary_are_refused(model: Model, ids: list[int]) -> None:
    with pytest.raises(InputError, match=f"The token id {ids[-1]} is outside the vocabulary, 0 to 271"):
        model.prefill(ids)


def test_no_ids_and_no_rows_are_refused(model: Model) -> None:
    with pytest.raises(InputError, match="There are no tokens"):
        token_array([], 10)
    with pytest.raises(InputError, match="There are no rows"):
        model.batch_logits([])


def test_a_cache_grows_by_doubling_up_to_the_context(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "_SMALLEST", 8)
    cache = KvCache(read_runtime(tiny))
    assert [cache.reserve(n) for n in (1, 8, 9, 33, 64, 64)] == [True, False, True, True, True, False]
    assert cache.capacity == 64
    assert cache.size_bytes == 2 * (2 + 1) * 64 * 16 * 4
    cache.advance(10)
    cache.truncate(4)
    assert cache.length == 4
    with pytest.raises(AssertionError, match="behind the end"):
        cache.advance(61)


def test_greedy_steps_keep_no_memory(tmp_path: Path) -> None:
    """Whatever Python allocates for a step is small and freed when the step ends."""
    folder = write_tiny_graph(tmp_path / "tiny", max_length=1024, vocab=2048)
    stream = load(folder, threads=1).generate_ids([1, 2, 3], max_new_tokens=1000, ignore_eos=True)
    gc.collect()
    kept, peaks = [], []
    tracemalloc.start()
    try:
        for _ in range(200):  # fills what numpy, pybind11 and tracemalloc itself keep for reuse
            next(stream)
        for _ in range(5):  # other threads of this process, servers of other tests, allocate now and then
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            for _ in range(150):
                next(stream)
            after, peak = tracemalloc.get_traced_memory()
            kept.append(after - before)
            peaks.append(peak - before)
    finally:
        tracemalloc.stop()
    assert min(kept) < 150, "less than a byte a step stays"
    assert min(peaks) < 2000, "neither a row of logits nor a mask is made anew"
