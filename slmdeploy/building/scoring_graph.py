"""Derives the scoring graph from the generating one: candidates in blocks behind one prefix, and only the label rows.

Surgery on a finished graph rather than a second export, so that it serves the fp32 graph and every quantised build of
it alike, and the weights stay in the one model.onnx.data that both files refer to. The head goes, whatever form it has
been given: the graph is cut at the value `model.norm.output`, which no build renames. Knows nothing of tokenizers; the
rows arrive as an array. That packing is exact is measured in the parity ladder (ladder.py).
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from slmdeploy.building.block_attention import BlockAttention
from slmdeploy.building.rewriting import remove_unused_initializers
from slmdeploy.errors import InputError

HIDDEN = "model.norm.output"
LABELS = "lm_head.labels"
SOFTCAP = "lm_head.softcap.cap"
_ATTENTION = "GroupQueryAttention"


def packed_variant(model: ir.Model, label_rows: NDArray[np.float32]) -> ir.Model:
    """A copy of a decoder graph that scores packed candidates; `model` itself stays as it is.

    label_rows [hidden, labels] becomes the head. The graph runs one sequence: input_ids int64 [1, tokens]. Instead of
    attention_mask it has the inputs of `BlockAttention`; past and present are rows float32 [1, length, kv_heads x D];
    the output logits becomes label_logits float32 [rows, labels]. Raises InputError for a graph without attention nodes
    or without the value at which its head is cut.
    """
    packed = model.clone()
    graph = packed.graph
    attentions = [node for node in graph if node.op_type == _ATTENTION]
    hidden = next((value for node in graph for value in node.outputs if value.name == HIDDEN), None)
    if not attentions or hidden is None:
        raise InputError(
            f"the graph has no {_ATTENTION} node or no value {HIDDEN}: only graphs of --dialect ort can be packed"
        )
    blocks = BlockAttention(graph)
    for node in attentions:
        blocks.replace(node)
    _replace_head(graph, hidden, label_rows)
    RemoveUnusedNodesPass()(packed)
    remove_unused_initializers(graph)
    _declare_rows(graph)
    return packed


def _declare_rows(graph: ir.Graph) -> None:
    """Inputs and outputs as they are now: no mask, one sequence, and the KV cache as rows."""
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    graph.inputs.remove(mask)
    graph.inputs[0].shape = ir.Shape((1, "tokens"))
    pasts = {str(value.name).removeprefix("past_key_values."): value for value in graph.inputs}
    for value in graph.outputs[1:]:
        past = pasts[str(value.name).removeprefix("present.")]
        assert past.shape is not None
        value.shape = ir.Shape((1, "present", past.shape[2]))


def write_score_graph(model_path: Path, label_rows: NDArray[np.float32], out_path: Path) -> None:
    """Write the packed variant of `model_path` beside it; large weights stay in the data file that model_path uses."""
    assert out_path.parent == model_path.parent, "external data is found relative to the graph's own folder"
    ir.save(packed_variant(ir.load(model_path), label_rows), out_path)


def read_label_rows(score_path: Path) -> NDArray[np.float32]:
    """The float32 head [hidden, labels] of a score.onnx, to derive the scoring graph of a build of the same model."""
    rows = ir.load(score_path).graph.initializers.get(LABELS)
    if rows is None or rows.const_value is None:
        raise InputError(f"{score_path} has no initializer {LABELS}; export the checkpoint with the task score")
    return np.asarray(rows.const_value.numpy(), dtype=np.float32)


def _softcapped(graph: ir.Graph, logits: ir.Value) -> ir.Value:
    """The label logits under the bound that the generating graph's logits have, if there is one."""
    cap = graph.initializers.get(SOFTCAP)
    if cap is None:
        return logits
    for operator, inputs in (("Div", [cap]), ("Tanh", []), ("Mul", [cap])):
        node = ir.node(operator, [logits, *inputs], name=f"{LABELS}.{operator}")
        graph.append(node)
        logits = node.outputs[0]
    return logits


def _replace_head(graph: ir.Graph, hidden: ir.Value, label_rows: NDArray[np.float32]) -> None:
    tensor = ir.tensor(np.ascontiguousarray(label_rows, dtype=np.float32), name=LABELS)
    weight = ir.Value(
        name=LABELS, type=ir.TensorType(tensor.dtype), shape=ir.Shape(label_rows.shape), const_value=tensor
    )
    graph.register_initializer(weight)
    product = ir.node("MatMul", [hidden, weight], name=LABELS)
    graph.append(product)
    logits = _softcapped(graph, product.outputs[0])
    logits.name, logits.type = "label_logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(("rows", label_rows.shape[1]))
    kept = [value for value in graph.outputs if value.name != "logits"]
    graph.outputs.clear()
    graph.outputs.extend([logits, *kept])
