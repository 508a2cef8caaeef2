"""Matrices, rows and operators of graphs made with onnx; hostile files."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmdeploy.errors import CorruptArtifactError
from slmdeploy.profiling.graph_facts import Linear, read_graph
from tests.graphs import write_tiny_graph


def save(path, nodes, tensors):
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "logits_positions")]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)]
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, stored)), path)
    return path


def test_each_form_of_a_matrix(tmp_path):
    bits = {"domain": "com.microsoft", "K": 64, "N": 8, "block_size": 32}
    nodes = [
        helper.make_node("MatMul", ["x", "float"], ["a"]),
        helper.make_node("Gemm", ["a", "turned"], ["b"], transB=1),
        helper.make_node("MatMulNBits", ["b", "four", "scales"], ["c"], bits=4, **bits),
        helper.make_node("MatMulNBits", ["c", "eight", "scales"], ["d"], bits=8, **bits),
        helper.make_node("MatMulIntegerToFloat", ["d", "int8", "s", "s"], ["e"], domain="com.microsoft"),
        helper.make_node("DequantizeLinear", ["int8", "s"], ["back"]),
        helper.make_node("MatMul", ["e", "back"], ["f"]),
        helper.make_node("MatMul", ["e", "f"], ["g"]),
    ]
    tensors = {
        "float": np.zeros((4, 6), np.float32),
        "turned": np.zeros((5, 6), np.float32),
        "four": np.zeros((8, 2, 16), np.uint8),
        "eight": np.zeros((8, 2, 32), np.uint8),
        "scales": np.zeros((8, 2), np.float32),
        "int8": np.zeros((3, 7), np.int8),
        "s": np.ones(1, np.float32),
    }
    facts = read_graph(save(tmp_path / "m.onnx", nodes, tensors))
    assert facts.nodes == len(nodes)
    assert list(facts.linears) == [
        Linear("fp32", 4, 6, 96, False),
        Linear("fp32", 6, 5, 120, False),
        Linear("int4", 64, 8, 8 * 2 * 16 + 64, False),
        Linear("int8", 64, 8, 8 * 2 * 32 + 64, False),
        Linear("w8a8", 3, 7, 21, False),
        Linear("w8a8", 3, 7, 21, False),
    ]


def test_what_lies_behind_the_asked_positions_sees_those_rows_alone(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Gather", ["a", "logits_positions"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w"], ["d"]),
    ]
    facts = read_graph(save(tmp_path / "m.onnx", nodes, {"w": np.zeros((4, 4), np.float32)}))
    assert [linear.kept for linear in facts.linears] == [False, True]
    assert facts.forms == {"fp32"}
    assert facts.weight_bytes == 128


def test_shapes_that_are_packed_into_one_field(tmp_path):
    # onnx itself writes them one by one, other writers need not.
    path = save(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["a"])], {"w": np.zeros((300, 2), "f4")})
    content = path.read_bytes()
    apart, packed = b"\x08\xac\x02\x08\x02", b"\x0a\x03\xac\x02\x02"
    assert content.count(apart) == 1
    path.write_bytes(content.replace(apart, packed))
    assert read_graph(path).linears == (Linear("fp32", 300, 2, 2400, False),)


def test_a_decoder(tmp_path):
    folder = write_tiny_graph(tmp_path / "b", layers=2, hidden=64, heads=4, head_dim=16, intermediate=96, vocab=272)
    steps, score = read_graph(folder / "model.onnx"), read_graph(folder / "score.onnx")
    assert steps.linears[-1] == Linear("fp32", 64, 272, 64 * 272 * 4, True)
    assert score.linears[-1].outputs == 2
    assert steps.nodes == len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x3a\x02\x08\x01", b"\x3a\x7f"])
def test_a_file_that_is_no_graph(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"model\.onnx"):
        read_graph(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CorruptArtifactError, match="cannot be read"):
        read_graph(tmp_path / "model.onnx")
