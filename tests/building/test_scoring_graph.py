"""scoring_graph.py: interface, exactness of packing, shared data, and any form of head that a build may leave."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from slmdeploy.building.scoring_graph import packed_variant, read_label_rows, write_score_graph
from slmdeploy.errors import InputError
from slmdeploy.exporting.decoder import build_decoder
from tests.exporting.checkpoints import FakeWeights
from tests.exporting.test_decoder import SPEC, run

LABELS = [4, 9]
PREFIX, ITEMS = [3, 1, 4, 1, 5], [[9], [2, 6, 5], [3, 5]]


def head_rows() -> NDArray[np.float32]:
    return FakeWeights(SPEC).read("lm_head.weight")[LABELS].T


def decoder() -> ir.Model:
    return build_decoder(SPEC, FakeWeights(SPEC))


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    ir.save(decoder(), tmp_path / "model.onnx", external_data="model.onnx.data")
    write_score_graph(tmp_path / "model.onnx", head_rows(), tmp_path / "score.onnx")
    return tmp_path


def score_packed(path: Path) -> NDArray[np.float32]:
    """Label logits of all items in one call behind the prefix, as the runtime packs them."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    empty = np.zeros((1, 2, 0, SPEC.head_dim), np.float32)
    names = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    count, sizes = len(PREFIX), [len(item) for item in ITEMS]
    prefix = {
        "input_ids": np.array([PREFIX]),
        "attention_mask": np.ones((1, count), np.int64),
        "logits_positions": np.zeros(0, np.int64),
        "position_ids": np.arange(count)[None],
        "attention_bias": np.zeros((1, 1, count, count), np.float32),
    } | {f"past_key_values.{name}": empty for name in names}
    _, *presents = session.run(None, prefix)
    owner = np.repeat(np.arange(len(ITEMS)), sizes)
    bias = np.zeros((1, 1, len(owner), count + len(owner)), np.float32)
    bias[0, 0, :, count:][owner[:, None] != owner] = -1e9
    packed = {
        "input_ids": np.concatenate(ITEMS)[None],
        "attention_mask": np.ones((1, count + len(owner)), np.int64),
        "logits_positions": np.cumsum(sizes) - 1,
        "position_ids": np.concatenate([count + np.arange(size) for size in sizes])[None],
        "attention_bias": bias,
    } | {f"past_key_values.{name}": present for name, present in zip(names, presents, strict=True)}
    scores: NDArray[np.float32] = session.run(["label_logits"], packed)[0]
    return scores


def test_packed_scores_equal_label_logits_one_by_one(graphs: Path) -> None:
    expected = [
        run(graphs / "model.onnx", SPEC, PREFIX + item, [len(PREFIX + item) - 1])[0][0, LABELS] for item in ITEMS
    ]
    assert np.allclose(score_packed(graphs / "score.onnx"), expected, atol=1e-5)


def test_interface_of_the_scoring_graph() -> None:
    original = decoder()
    before = [value.name for value in original.graph.inputs]
    packed = packed_variant(original, head_rows()).graph
    assert [value.name for value in packed.inputs] == [*before, "position_ids", "attention_bias"]
    assert [value.name for value in packed.outputs][:2] == ["label_logits", "present.0.key"]
    assert "lm_head.weight" not in packed.initializers
    assert packed.initializers["lm_head.labels"].shape == (SPEC.hidden, 2)
    assert [value.name for value in original.graph.inputs] == before, "the generating graph stays as it is"
    assert "lm_head.weight" in original.graph.initializers


def test_weights_stay_in_the_one_data_file(graphs: Path) -> None:
    assert sorted(file.name for file in graphs.iterdir()) == ["model.onnx", "model.onnx.data", "score.onnx"]
    tensors = [value.const_value for value in ir.load(graphs / "score.onnx").graph.initializers.values()]
    stored = {tensor.name for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    assert "model.layers.0.attn.qkv_proj.weight" in stored
    assert np.array_equal(read_label_rows(graphs / "score.onnx"), head_rows())


def test_a_head_of_several_nodes_is_cut_off_whole() -> None:
    model = decoder()
    head = next(node for node in model.graph if node.name == "lm_head")
    hidden, weight = head.inputs
    logits = head.outputs[0]
    scale = ir.Value(name="lm_head.scale", const_value=ir.tensor(np.float32([2.0]), name="lm_head.scale"))
    model.graph.register_initializer(scale)
    scaled = ir.node("Mul", [hidden, scale], name="lm_head.Mul")
    product = ir.node("MatMul", [scaled.outputs[0], weight], name="lm_head.MatMul")
    model.graph.insert_before(head, [scaled, product])
    product.outputs[0].name = "logits"
    ir.convenience.replace_all_uses_with(logits, product.outputs[0], replace_graph_outputs=True)
    model.graph.remove(head, safe=True)
    packed = packed_variant(model, head_rows()).graph
    assert [node.name for node in packed if "lm_head" in node.name] == ["lm_head.labels"]
    assert {name for name in packed.initializers if "lm_head" in name} == {"lm_head.labels"}


def test_a_foreign_graph_is_refused() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Relu", [x])
    foreign = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21}), ir_version=10)
    with pytest.raises(InputError, match="GroupQueryAttention"):
        packed_variant(foreign, head_rows())


def test_label_rows_are_missing_in_a_generating_graph(graphs: Path) -> None:
    with pytest.raises(InputError, match=r"no initializer lm_head\.labels"):
        read_label_rows(graphs / "model.onnx")
