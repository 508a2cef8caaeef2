"""The standard interface gives what the shared one gives: a tiny graph rewritten to take past and return present."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.model import Model, load
from slmdeploy.runtime.standard import StandardDecoder
from tests.graphs import write_manifest, write_tiny_graph

IDS = [0, 5, 60, 7, 111, 9, 10, 33, 4]


def write_standard_graph(folder: Path, *, positions: bool = True, past: str = "past", heads: int | None = None) -> Path:
    """The tiny graph of tests/graphs.py with logits of all positions and, if asked for, position_ids as an input.

    past: what the past's length is called; heads: what its number of heads is said to be, where not the right one.
    """
    write_tiny_graph(folder, kv_heads=(2, 1), tasks=("generate",))
    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    for node in [node for node in graph.node if "rows" in [*node.input, *node.output]]:
        graph.node.remove(node)
    graph.node[-1].input[0] = "normed"
    inputs = {value.name: value for value in graph.input}
    graph.input.remove(inputs["logits_positions"])
    graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 272]))
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past", "present")):
            value.type.tensor_type.shape.dim[2].dim_param = past if value.name.startswith("past") else "total"
    if heads is not None:
        inputs["past_key_values.0.key"].type.tensor_type.shape.dim[1].dim_value = heads
    if positions:
        graph.input.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"]))
        for node in graph.node:
            if node.op_type == "GroupQueryAttention":
                node.input.append("position_ids")
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256
    )
    runtime = json.loads((folder / "runtime.json").read_text())
    (folder / "runtime.json").write_text(json.dumps(runtime | {"interface": "standard"}))
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["position_ids", "no position_ids"])
def standard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_standard_graph(tmp_path_factory.mktemp("standard") / "graph", positions=request.param))


def test_the_interface_decides_what_runs_the_graph(model: Model, standard: Model) -> None:
    assert (model.runtime.interface, standard.runtime.interface) == ("shared", "standard")
    assert isinstance(standard._decoder, StandardDecoder)


def test_logits_prefill_and_steps_are_those_of_the_shared_interface(model: Model, standard: Model) -> None:
    assert np.abs(standard.logits(IDS) - model.logits(IDS)).max() < 1e-5
    for one in (IDS[:1], IDS[:4]):
        expected = [model.prefill(one), *(model.decode(token) for token in IDS[len(one) :])]
        found = [standard.prefill(one), *(standard.decode(token) for token in IDS[len(one) :])]
        assert np.abs(np.array(found) - np.array(expected)).max() < 1e-5


def test_generation_is_the_same_text_to_the_end_of_the_context(model: Model, standard: Model) -> None:
    options = {"max_new_tokens": 80, "ignore_eos": True}
    assert standard.generate("Hello there", **options) == model.generate("Hello there", **options)
    assert "".join(standard.stream("Hello", max_new_tokens=8)) == model.generate("Hello", max_new_tokens=8).text


def test_a_padded_batch_equals_its_rows_and_leaves_the_sequence_alone(model: Model, standard: Model) -> None:
    rows = [IDS, IDS[:1], IDS[:4]]
    standard.prefill(IDS[:4])
    together = standard.batch_logits(rows)
    assert np.abs(np.array(together) - np.array([model.prefill(row) for row in rows])).max() < 1e-5
    assert np.abs(standard.decode(IDS[4]) - model.logits(IDS[:5])[-1]).max() < 1e-5


def test_a_newer_sequence_ends_an_older_one(standard: Model) -> None:
    tokens = standard.generate_ids(IDS, max_new_tokens=8, ignore_eos=True)
    next(tokens)
    standard.prefill(IDS[:2])
    with pytest.raises(InputError, match="Another generation has begun"):
        next(tokens)


def test_more_than_the_context_is_refused_by_both_numbers(standard: Model) -> None:
    for call in (standard.prefill, standard.logits):
        with pytest.raises(InputError, match="65 tokens are needed at once, but the context of this model holds 64"):
            call([2] * 65)
    standard.prefill([2] * 64)
    with pytest.raises(InputError, match="65 tokens are needed"):
        standard.decode(2)
    with pytest.raises(InputError, match="65 tokens"):
        standard.batch_logits([[2], [2] * 65])


def test_the_past_is_handed_on_as_it_is(standard: Model) -> None:
    decoder = StandardDecoder(standard.path, standard.runtime, threads=1)
    decoder.prefill(np.array(IDS))
    before = decoder._past
    decoder.step(3)
    assert [value.shape()[2] for value in (before[0], decoder._past[0])] == [len(IDS), len(IDS) + 1]
    assert [value.shape()[1] for value in decoder._past] == [2, 2, 1, 1]
    kept = before[0].numpy().copy()
    decoder.step(4)
    assert (before[0].numpy() == kept).all()  # a run writes new memory and leaves the past as it was


def test_a_graph_of_the_other_interface_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = write_standard_graph(tmp_path / "graph")
    runtime = json.loads((folder / "runtime.json").read_text())
    (folder / "runtime.json").write_text(json.dumps(runtime | {"interface": "shared"}))
    with pytest.raises(CorruptArtifactError, match="lacks the input or output logits_positions"):
        load(folder, verify=False).logits(IDS)
    with pytest.raises(CorruptArtifactError, match="unexpected input or output logits_positions"):
        StandardDecoder(tiny, read_runtime(tiny), threads=1)


def test_a_past_of_other_sizes_than_runtime_json_says_is_refused(tmp_path: Path) -> None:
    folder = write_standard_graph(tmp_path / "graph", heads=4)
    with pytest.raises(
        CorruptArtifactError, match=r"past_key_values\.0\.key has shape .* not \[batch, 2, length, 16\]"
    ):
        StandardDecoder(folder, read_runtime(folder), threads=1)
