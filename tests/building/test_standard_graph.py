"""standard_graph.py: interface, the same logits at all positions, padding on either side, cached steps, any build."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from slmdeploy.artifacts import open_artifact
from slmdeploy.building import build as verb
from slmdeploy.building.build import build
from slmdeploy.building.standard_check import standard_rungs
from slmdeploy.building.standard_graph import STANDARD, standard_variant, write_standard_graph
from slmdeploy.errors import InputError
from slmdeploy.runtime.model import Model, load
from slmdeploy.specs import Profile
from tests.building.small import write_graph
from tests.graphs import write_manifest

Floats = NDArray[np.float32]
ROWS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9]]
NEXT = [[7], [9], [3]]
INPUTS = ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value",
          "past_key_values.1.key", "past_key_values.1.value"]  # fmt: skip


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph folder of two layers with unequal numbers of KV heads, as pruning leaves them."""
    folder = write_graph(tmp_path_factory.mktemp("standard") / "graph", kv_heads=(4, 2))
    write_standard_graph(folder / "model.onnx")
    write_manifest(folder, kind="graph")
    return folder


class Session:
    """standard.onnx as another runtime drives it: ids and mask in, present handed on as the next past."""

    def __init__(self, folder: Path, kv_heads: tuple[int, ...] = (4, 2)) -> None:
        self._session = onnxruntime.InferenceSession(folder / STANDARD, providers=["CPUExecutionProvider"])
        self._heads = [heads for heads in kv_heads for _ in range(2)]

    def run(self, ids: list[list[int]], mask: list[list[int]], past: list[Floats] | None = None) -> list[Floats]:
        past = past or [np.zeros((len(ids), heads, 0, 16), np.float32) for heads in self._heads]
        inputs = {"input_ids": np.array(ids), "attention_mask": np.array(mask)}
        outputs: list[Floats] = self._session.run(None, inputs | dict(zip(INPUTS[2:], past, strict=True)))
        return outputs


def padded(rows: list[list[int]], *, left: bool) -> tuple[list[list[int]], list[list[int]]]:
    width = max(map(len, rows))
    blanks = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    if left:
        return [b + r for b, r in zip(blanks, rows, strict=True)], [b + o for b, o in zip(blanks, ones, strict=True)]
    return [r + b for b, r in zip(blanks, rows, strict=True)], [o + b for b, o in zip(blanks, ones, strict=True)]


def plain(model: Model, rows: list[list[int]]) -> Floats:
    """The last logits of each row, each run by itself through model.onnx."""
    return np.stack([model.logits(row)[-1] for row in rows])


def test_inputs_and_outputs_are_those_that_other_runtimes_feed(graph: Path) -> None:
    session = onnxruntime.InferenceSession(graph / STANDARD, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == INPUTS
    logits, *presents = session.get_outputs()
    assert (logits.name, logits.shape) == ("logits", ["batch", "sequence", 272])
    assert [value.name for value in presents][:2] == ["present.0.key", "present.0.value"]


def test_logits_of_every_position_equal_those_of_the_model(graph: Path) -> None:
    logits = Session(graph).run([ROWS[0]], [[1] * 7])[0]
    np.testing.assert_allclose(logits[0], load(graph).logits(ROWS[0]), atol=1e-5)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_padded_batch_and_a_step_behind_it_equal_each_row_alone(graph: Path, left: bool) -> None:
    ids, mask = padded(ROWS, left=left)
    session, model = Session(graph), load(graph)
    logits, *past = session.run(ids, mask)
    ends = [-1] * 3 if left else [len(row) - 1 for row in ROWS]
    np.testing.assert_allclose(logits[np.arange(3), ends], plain(model, ROWS), atol=1e-5)
    step = session.run(NEXT, [[*row, 1] for row in mask], past)[0]
    longer = [row + one for row, one in zip(ROWS, NEXT, strict=True)]
    np.testing.assert_allclose(step[:, 0], plain(model, longer), atol=1e-5)


def test_chunks_of_a_prompt_equal_the_whole_prompt(graph: Path) -> None:
    session, whole = Session(graph), load(graph).logits(ROWS[0])
    first, *past = session.run([ROWS[0][:4]], [[1] * 4])
    second = session.run([ROWS[0][4:]], [[1] * 7], past)[0]
    np.testing.assert_allclose(np.concatenate([first[0], second[0]]), whole, atol=1e-5)


def test_the_model_stays_as_it_is_and_its_weights_are_not_stored_again(graph: Path) -> None:
    model = ir.load(graph / "model.onnx")
    before = [value.name for value in model.graph.inputs]
    variant = standard_variant(model)
    assert [value.name for value in model.graph.inputs] == before
    assert "logits_positions" in before
    assert set(model.graph.initializers) - set(variant.graph.initializers) == {"flat"}
    assert (graph / STANDARD).stat().st_size < 20_000
    assert sorted(file.name for file in graph.glob("*.data")) == ["model.onnx.data"]


@pytest.mark.parametrize("weights", [{"scheme": "weight-only", "bits": 4, "block_size": 32},
                                     {"scheme": "w8a8", "bits": 8}, {"scheme": "fp32"}],
                         ids=["int4", "w8a8", "fp32"])  # fmt: skip
def test_a_build_has_its_own_over_its_own_weights(
    graph: Path, tmp_path: Path, weights: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "speed_gate", lambda own, found: (None, {"passed": True, "value": 0.5, "limit": 1.0}))
    monkeypatch.setattr("slmdeploy.building.texts._TOKENS", 128)
    lenient = {"max_kl": 10.0, "min_top1": 0.0, "max_ppl_ratio": 10.0}
    fields = {"name": "mine", "summary": "s", "engine": "onnxruntime", "weights": weights, "gate": lenient}
    artifact = build(graph, profile=Profile.model_validate(fields), out=tmp_path / "out")
    folder = open_artifact(tmp_path / "out", "build").path
    logits = Session(folder).run([ROWS[0]], [[1] * 7])[0][0]
    np.testing.assert_allclose(logits, load(folder).logits(ROWS[0]), atol=1e-5)
    assert (folder / STANDARD).stat().st_size < 40_000
    assert artifact.result["gates"]["standard"]["passed"]
    assert sum(rung["name"].startswith("standard.onnx: ") for rung in artifact.result["parity"]) == 5


def test_of_a_phase_split_it_is_compared_with_the_graph_that_it_was_made_of(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "slmdeploy.building.phases.speed_gate",
        lambda own, found: ({"prefill_ratio": 0.5}, {"passed": True, "value": 0.5, "limit": 1.0}),
    )
    monkeypatch.setattr(
        verb, "speed_gate", lambda own, found: ({"prefill_ratio": 0.5}, {"passed": True, "value": 0.5, "limit": 1.0})
    )
    monkeypatch.setattr("slmdeploy.building.texts._TOKENS", 128)
    lenient = {"max_kl": 10.0, "min_top1": 0.0, "max_ppl_ratio": 10.0}
    steps, prompts = {"scheme": "weight-only", "bits": 4, "block_size": 128}, {"scheme": "w8a8", "bits": 8}
    fields = {"name": "mine", "summary": "s", "engine": "onnxruntime", "gate": lenient}
    wanted = Profile.model_validate(fields | {"weights": steps, "prefill": prompts})
    result = build(graph, profile=wanted, out=tmp_path / "out").result
    whole = load(tmp_path / "out").batch_logits([ROWS[0]])[0]
    apart = Session(tmp_path / "out").run([ROWS[0]], [[1] * len(ROWS[0])])[0][0, -1]
    assert np.abs(whole - apart).max() > 0.02 * np.abs(whole).max(), "the two forms differ by more than the limit"
    assert result["gates"]["standard"]["passed"]


def test_the_check_finds_a_standard_graph_of_other_weights(graph: Path, tmp_path: Path) -> None:
    assert all(rung.passed for rung in standard_rungs(graph, limit=1e-5))
    other = write_graph(tmp_path / "graph", kv_heads=(4, 2), seed=1)
    (other / STANDARD).write_bytes((graph / STANDARD).read_bytes())
    (other / "model.onnx").unlink()
    model = ir.load(graph / "model.onnx")
    ir.external_data.load_to_model(model)
    ir.save(model, other / "model.onnx")
    assert not any(rung.passed for rung in standard_rungs(other, limit=1e-2))


def test_a_context_of_one_token_has_no_step_to_check(tmp_path: Path) -> None:
    folder = write_graph(tmp_path / "graph", max_length=1, tasks=("generate",))
    write_standard_graph(folder / "model.onnx")
    assert [rung.passed for rung in standard_rungs(folder, limit=1e-5)] == [True] * 3


def test_a_graph_that_is_not_ours_is_refused(graph: Path) -> None:
    foreign = standard_variant(ir.load(graph / "model.onnx"))
    with pytest.raises(InputError, match="no input logits_positions"):
        standard_variant(foreign)
    other = ir.load(graph / "model.onnx")
    pick = next(
        node for node in other.graph if node.inputs[-1] is not None and node.inputs[-1].name == "logits_positions"
    )
    pick.op_type = "GatherElements"
    with pytest.raises(InputError, match="does not pick rows by logits_positions"):
        standard_variant(other)
    biased = ir.load(graph / "model.onnx")
    attention = next(node for node in biased.graph if node.op_type == "GroupQueryAttention")
    attention.resize_inputs(11)
    attention.replace_input_with(10, biased.graph.inputs[0])
    with pytest.raises(InputError, match="has an attention bias already"):
        standard_variant(biased)
