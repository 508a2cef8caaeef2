"""The smallest graphs that the quantisers can work on: one or two linear layers, or one table, and a way to run them."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from slmdeploy.build.rewriting import MICROSOFT

Array = NDArray[np.generic]


def model_of(nodes: Sequence[ir.Node], source: ir.Value, constants: Sequence[ir.Value]) -> ir.Model:
    """A graph from ``source`` to the outputs of ``nodes`` that no other of them reads."""
    results = [node.outputs[0] for node in nodes if not node.outputs[0].uses()]
    opsets = {"": 21, MICROSOFT: 1}
    graph = ir.Graph([source], results, nodes=nodes, initializers=constants, opset_imports=opsets, name="small")
    return ir.Model(graph, ir_version=10)


def constant(name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)


def linear(*weights: Array) -> ir.Model:
    """y0 = x @ weights[0], y1 = x @ weights[1], ... from one x of two axes."""
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", weights[0].shape[0]]))
    constants = [constant(f"layer{i}.weight", weight) for i, weight in enumerate(weights)]
    nodes = [ir.node("MatMul", [source, weight], name=f"layer{i}") for i, weight in enumerate(constants)]
    for i, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].type = f"y{i}", ir.TensorType(ir.DataType.FLOAT)
    return model_of(nodes, source, constants)


def embedding(table: Array) -> ir.Model:
    """y0 = table[x]."""
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["rows"]))
    weight = constant("model.embed_tokens.weight", table)
    node = ir.node("Gather", [weight, source], name="model.embed_tokens")
    node.outputs[0].name, node.outputs[0].type = "y0", ir.TensorType(ir.DataType.FLOAT)
    return model_of([node], source, [weight])


def run(model: ir.Model, x: Array) -> list[NDArray[np.float32]]:
    """All outputs for this input."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(None, {"x": x})
    return outputs


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(found: Array, exact: Array) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
