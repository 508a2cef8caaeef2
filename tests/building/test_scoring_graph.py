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
from slmdeploy.runtime.blocks import Layout, lay_out
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
    """Label logits of all items in one run behind the prefix that another run has computed."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    count, sizes = len(PREFIX), [len(item) for item in ITEMS]

    def feed(ids: list[int], asked: NDArray[np.int64], layout: Layout, past: list[NDArray[np.float32]]) -> dict:
        inputs = {"input_ids": np.array([ids]), "logits_positions": asked} | layout
        return inputs | {f"past_key_values.{name}": rows for name, rows in zip(names, past, strict=True)}

    widths = [layer.kv_heads * SPEC.head_dim for layer in SPEC.layers for _ in range(2)]
    empty = [np.zeros((1, 0, width), np.float32) for width in widths]
    _, *presents = session.run(None, feed(PREFIX, np.zeros(0, np.int64), lay_out(0, count, [], 3), empty))
    ids = [token for item in ITEMS for token in item]
    scores: NDArray[np.float32] = session.run(
        ["label_logits"], feed(ids, np.cumsum(sizes) - 1, lay_out(count, 0, sizes, 4), presents)
    )[0]
    return scores


def test_packed_scores_equal_label_logits_one_by_one(graphs: Path) -> None:
    expected = [
        run(graphs / "model.onnx", SPEC, PREFIX + item, [len(PREFIX + item) - 1])[0][0, LABELS] for item in ITEMS
    ]
    assert np.allclose(score_packed(graphs / "score.onnx"), expected, atol=1e-5)


class Sharp(FakeWeights):
    """Queries and keys so large that attention scores reach hundreds: a soft mask would let hidden tokens through."""

    def read(self, name: str) -> NDArray[np.float32]:
        weight = super().read(name)
        return weight * np.float32(40) if name.endswith(("q_proj.weight", "k_proj.weight")) else weight


def test_hidden_tokens_stay_hidden_whatever_their_scores(tmp_path: Path) -> None:
    ir.save(build_decoder(SPEC, Sharp(SPEC)), tmp_path / "model.onnx", external_data="model.onnx.data")
    write_score_graph(tmp_path / "model.onnx", head_rows(), tmp_path / "score.onnx")
    expected = [
        run(tmp_path / "model.onnx", SPEC, PREFIX + item, [len(PREFIX + item) - 1])[0][0, LABELS] for item in ITEMS
    ]
    assert np.allclose(score_packed(tmp_path / "score.onnx"), expected, atol=1e-3)


def test_interface_of_the_scoring_graph() -> None:
    original = decoder()
    before = [value.name for value in original.graph.inputs]
    packed = packed_variant(original, head_rows()).graph
    blocks = ["position_ids", "query_tokens", "key_tokens", "attention_bias", "token_blocks", "token_slots"]
    assert [value.name for value in packed.inputs] == [name for name in before if name != "attention_mask"] + blocks
    assert {node.op_type for node in packed} & {"GroupQueryAttention", "ReduceSum"} == set()
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
