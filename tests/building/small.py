"""The smallest things that building can work on: one or two linear layers, one table, or a decoder in its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from slmdeploy.building.folding import places
from slmdeploy.building.onnxruntime import read_model
from slmdeploy.building.preparing import write_prepared
from slmdeploy.building.rewriting import MICROSOFT
from tests.graphs import write_manifest, write_tiny_graph

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


def run(model: ir.Model, x: Array, **others: Array) -> list[NDArray[np.float32]]:
    """All outputs for this input, and others by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(None, {"x": x} | others)
    return outputs


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(found: Array, exact: Array) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def write_graph(folder: Path, *, tied: bool = False, **sizes: Any) -> Path:
    """A graph folder as export writes it: the tiny decoder, with an embedding that is also the head if `tied`."""
    write_tiny_graph(folder, kind="graph", **sizes)
    if tied:
        model = onnx.load(folder / "model.onnx")
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        head = onnx.numpy_helper.to_array(tensors["lm_head.weight"]).T.copy()
        tensors["model.embed_tokens.weight"].CopyFrom(onnx.numpy_helper.from_array(head, "model.embed_tokens.weight"))
        (folder / "model.onnx.data").unlink()
        onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data",
                        size_threshold=256)  # fmt: skip
    write_manifest(folder, kind="graph")
    return folder


def write_planted(root: Path) -> Path:
    """A graph folder whose layers read a channel that is 64 times as large as it need be."""
    plain = write_graph(root / "plain")
    model = read_model(plain)
    for place in places(model.graph):
        shrink = np.ones(place.size, np.float32)
        shrink[3] = 1 / 64
        place.divide(shrink)
    write_prepared(model, plain, root / "planted")
    write_manifest(root / "planted", kind="graph")
    return root / "planted"
