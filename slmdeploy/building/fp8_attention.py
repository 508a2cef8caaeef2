"""Attention in FP8: both of its products read FP8 on both sides, where a graph has them written out (opset 21).

Queries, keys and values have the scales of calibration; the softmax has the fixed scale 1/448, which puts its largest
value at the format's. Keys are turned before they are quantised, so that DequantizeLinear feeds the product. An option
and not the default: it costs quality, and compilers were seen to fuse attention in float16 but not FP8 products of open
lengths. Knows nothing of where scales come from; contract.py has the rules.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from slmdeploy.building.contract import SOFTMAX_SCALE, product_above
from slmdeploy.building.fp8 import E4M3, Floats
from slmdeploy.building.rewriting import Replacement

Settled = Callable[[Floats | np.float32], Floats]


@dataclass(frozen=True)
class _Attention:
    """The product of queries and keys, the softmax over it, and the product of that with the values."""

    scores: ir.Node
    softmax: ir.Node
    mixed: ir.Node


def attention_inputs(graph: ir.Graph) -> tuple[str, ...]:
    """Names of the queries, keys and values that products read, in graph order; none where attention is an operator."""
    names = [value.name for found in _attentions(graph) for value in (*found.scores.inputs, found.mixed.inputs[1])
             if value is not None and value.name]  # fmt: skip
    return tuple(dict.fromkeys(names))


def quantize_attention(graph: ir.Graph, scales: Mapping[str, np.float32], settled: Settled | None = None) -> None:
    """Change ``graph`` in place; ``scales`` by the names of `attention_inputs`, ``settled`` as in quantize_linears."""
    settled = settled or np.asarray
    for found in list(_attentions(graph)):
        for index in (0, 1):
            _quantize(found.scores, index, scales, settled)
        _quantize(found.mixed, 1, scales, settled)
        _quantize(found.mixed, 0, {str(found.softmax.outputs[0].name): np.float32(SOFTMAX_SCALE)}, settled)


def _quantize(node: ir.Node, index: int, scales: Mapping[str, np.float32], settled: Settled) -> None:
    """Put QuantizeLinear and DequantizeLinear in front of one input of a product."""
    value = node.inputs[index]
    assert value is not None
    assert value.name
    new, side = Replacement(node), ("first", "second")[index]
    step = new.constant(f"{side}_scale", settled(scales[value.name]))
    zero = new.constant("fp8.zero", np.zeros((), E4M3), shared=True)
    codes = new.add("QuantizeLinear", value, step, zero, name=f"{side}_fp8")
    node.replace_input_with(index, new.add("DequantizeLinear", codes, step, name=side))


def _attentions(graph: ir.Graph) -> Iterator[_Attention]:
    for node in graph:
        if node.op_type != "Softmax":
            continue
        scores = product_above(node.inputs[0])
        mixed = [user for user, _ in node.outputs[0].uses() if user.op_type == "MatMul"]
        if scores is not None and len(mixed) == 1:
            yield _Attention(scores, node, mixed[0])
