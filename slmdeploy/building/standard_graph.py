"""Derives standard.onnx from model.onnx: the interface that other runtimes feed, over the same weights.

model.onnx has `logits_positions`, an input that no other runtime knows. Here it goes, and with it the selection of
rows, so that every position reaches the head:

    input_ids int64 [batch, sequence], attention_mask int64 [batch, total], past_key_values.{i}.key and .value
    -> logits float32 [batch, sequence, vocabulary], present.{i}.key and .value

Other runtimes pad a batch on the left, too, where model.onnx wants its padding on the right: columns before the first 1
of a row of the mask are hidden by an attention bias. Rotary embedding needs no more than that, as it depends on
distances alone. Surgery on a finished graph, as in scoring_graph.py, so that it serves the fp32 graph and every
quantised build, and the weights stay in the one model.onnx.data. Knows nothing of the runtimes that read it.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from slmdeploy.building.block_attention import POSITIONS
from slmdeploy.building.rewriting import Replacement, remove_unused_initializers
from slmdeploy.errors import InputError

STANDARD = "standard.onnx"
_POSITIONS, _LOGITS = "logits_positions", "logits"
_ATTENTION = "GroupQueryAttention"
_LENGTHS, _BIAS = 5, 10
"""Inputs of GroupQueryAttention: the index of each row's last token, and what is added to the products."""
_HIDDEN = np.float32(-1e9)


def standard_variant(model: ir.Model) -> ir.Model:
    """A copy of a decoder graph with the standard interface; `model` itself stays as it is.

    Raises InputError for a graph without the input `logits_positions` or attention nodes, or with another use of them.
    """
    standard = model.clone()
    graph = standard.graph
    positions = next((value for value in graph.inputs if value.name == _POSITIONS), None)
    attentions = [node for node in graph if node.op_type == _ATTENTION]
    if positions is None or not attentions:
        raise InputError(f"the graph has no input {_POSITIONS} or no {_ATTENTION} node: only slmdeploy's own has both")
    for node in positions.consumers():
        _keep_all_rows(node)
    graph.inputs.remove(positions)
    _hide_left_padding(graph, attentions)
    RemoveUnusedNodesPass()(standard)
    remove_unused_initializers(graph)
    logits = next(value for value in graph.outputs if value.name == _LOGITS)
    assert logits.shape is not None
    logits.shape = ir.Shape(("batch", "sequence", logits.shape[-1]))
    return standard


def write_standard_graph(model_path: Path) -> None:
    """Write the standard variant of `model_path` beside it; large weights stay in the data file that it uses."""
    ir.save(standard_variant(ir.load(model_path)), model_path.parent / STANDARD)


def _keep_all_rows(gather: ir.Node) -> None:
    """Let what reads rows [n, width] read x [batch, sequence, width], from which they were flattened and picked."""
    flat = gather.inputs[0].producer() if gather.op_type == "Gather" and gather.inputs[0] is not None else None
    if flat is None or flat.op_type != "Reshape" or flat.inputs[0] is None:
        raise InputError(
            f"{gather.name or gather.op_type} does not pick rows by {_POSITIONS}: not slmdeploy's own graph"
        )
    ir.convenience.replace_all_uses_with(gather.outputs[0], flat.inputs[0])


def _hide_left_padding(graph: ir.Graph, attentions: list[ir.Node]) -> None:
    """Count each row's leading zeros of the mask to its length, and hide those columns from every query.

    A row without any is computed as in model.onnx. Hidden products are far below all others rather than infinite: a
    query of the padding sees nothing else, and NaN there would spread by the values of later layers.
    """
    inputs = {value.name: value for value in graph.inputs}
    lengths, width = attentions[0].inputs[_LENGTHS : _LENGTHS + 2]
    new = Replacement(attentions[0])

    def constant(name: str, value: list[int] | np.generic) -> ir.Value:
        array = np.array(value, np.int64) if isinstance(value, list) else value
        return new.constant(f"padding.{name}", array, shared=True)

    # 1. per row: columns before its first 1, int32 [batch]
    first = new.add("ArgMax", inputs["attention_mask"], name="padding.first", axis=1, keepdims=0)
    zeros = new.add("Cast", first, name="padding.zeros", to=int(ir.DataType.INT32))
    _count_by_mask(graph, new, inputs)
    # 2. the bias [batch, 1, sequence, total]
    start, step = constant("start", np.int32(0)), constant("step", np.int32(1))
    columns = new.add("Range", start, width, step, name="padding.columns")
    rows = new.add("Unsqueeze", zeros, constant("axes", [1, 2, 3]), name="padding.rows")
    hidden = new.add("Less", columns, rows, name="padding.hidden")
    bias = new.add("Where", hidden, constant("low", _HIDDEN), constant("none", np.float32(0)), name="padding.row_bias")
    queries = new.add("Shape", inputs["input_ids"], name="padding.queries", start=1, end=2)
    shape = new.add("Concat", constant("before", [1, 1]), queries, constant("after", [1]), name="padding.shape", axis=0)
    bias = new.add("Expand", bias, shape, name="padding.bias")
    # 3. to every layer
    last = new.add("Add", lengths, zeros, name="padding.last")
    for node in attentions:
        if len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None:
            raise InputError(f"{node.name} has an attention bias already: not slmdeploy's own graph")
        node.resize_inputs(max(len(node.inputs), _BIAS + 1))
        node.replace_input_with(_LENGTHS, last)
        node.replace_input_with(_BIAS, bias)


def _count_by_mask(graph: ir.Graph, new: Replacement, inputs: dict[str | None, ir.Value]) -> None:
    """Where the graph reads positions, count the mask's ones up to each token, as transformers does.

    So padding counts for nothing, on the left and between a right-padded prompt and the tokens generated behind it.
    """
    positions = next((value for node in graph for value in node.outputs if value.name == POSITIONS), None)
    if positions is None:
        return
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    axis, end, one, least = (
        new.constant(f"padding.{name}", value, shared=True)
        for name, value in (
            ("columns_axis", np.array([1], np.int64)),
            ("end", np.array([np.iinfo(np.int64).max])),
            ("one", np.int64(1)),
            ("least", np.int64(0)),
        )
    )
    seen = new.add("Sub", new.add("CumSum", mask, axis, name="padding.count"), one, name="padding.seen")
    total = new.add("Shape", mask, name="padding.total", start=1, end=2)
    start = new.add("Sub", total, new.add("Shape", ids, name="padding.new", start=1, end=2), name="padding.past")
    own = new.add("Max", new.add("Slice", seen, start, end, axis, name="padding.own"), least, name="padding.positions")
    for use in list(positions.uses()):
        use.node.replace_input_with(use.idx, own)
    graph.sort()
