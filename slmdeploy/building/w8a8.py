"""W8A8: signed 8-bit weights with one scale per output channel, and 8-bit activations with one scale per token.

Knows nothing of profiles, files or gates: it turns one MatMul into a small subgraph. The form is the fastest correct
one that benchmarks/matmul_forms.py finds (figures in docs/quantisation.md): each row is quantised by its own largest
magnitude to *unsigned* 8 bit with zero point 128 (signed activations fall off ONNX Runtime's fast path by 7-50x,
unsigned weights by 2x), multiplied in integers, and scaled back. A scale per token rather than per tensor, because with
one scale for the tensor a token's result would depend on its neighbours in the batch.

With integer matrix units a pass over the activations costs as much as a product, so two are left out. A layer whose
output is cut in two (gate and up) becomes two layers, which saves the copy. And where a scaled output only goes into an
elementwise product that is quantised again (up times gate, in front of down), the scale waits: it does not change the
codes of a row, so it joins the step of the product.
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slmdeploy.building.rewriting import MICROSOFT, Replacement, weight_array

_LEVELS = 127
_ZERO_POINT = np.uint8(128)
_HUGE = np.float32(1e38)
_CHOSEN_ROWS = "logits_positions"
"""The input of a generating graph that names the rows to compute logits for: there may be none."""
Floats = npt.NDArray[np.float32]
Columns = tuple[npt.NDArray[np.int8], Floats]
"""A weight [K, N] as values and one scale for each column."""


def quantize_columns(weight: Floats) -> Columns:
    """Symmetric 8-bit weights [K, N] in -127..127 and scales [N], so that ``values * scales`` is near ``weight``."""
    largest = np.abs(weight).max(axis=0)
    scales = np.where(largest > 0, largest / _LEVELS, 1.0).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def cut_in_two(node: ir.Node) -> list[ir.Node]:
    """Two MatMul nodes instead of one whose output only a Split in two reads, the Split gone; else just ``node``."""
    split, weight = _only_reader(node.outputs[0]), node.inputs[1]
    if split is None or split.op_type != "Split" or len(split.outputs) != 2 or split.inputs[0] is not node.outputs[0]:
        return [node]
    assert weight is not None
    new, whole = Replacement(split), weight_array(weight)
    width = _first_width(split, whole.shape[1])
    if width is None:
        return [node]
    halves = [
        new.add("MatMul", node.inputs[0], new.constant(f"weight.{i}", np.ascontiguousarray(part)), name=str(i))
        for i, part in enumerate((whole[:, :width], whole[:, width:]))
    ]
    new.finish(*halves)
    assert isinstance(node.graph, ir.Graph)
    node.graph.remove(node, safe=True)
    return [producer for half in halves if (producer := half.producer()) is not None]


def _first_width(split: ir.Node, whole: int) -> int | None:
    """The width of the first output of a Split in two of ``whole`` columns, None where it is not a constant."""
    if len(split.inputs) < 2 or split.inputs[1] is None:
        return whole // 2 if whole % 2 == 0 else None
    sizes = split.inputs[1].const_value
    return None if sizes is None else int(sizes.numpy()[0])


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads this value; None where there are several, none, or the value leaves the graph."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


class TokenQuantizer:
    """Replaces MatMul nodes of one graph; nodes that read the same value share its row scales and its 8-bit form."""

    def __init__(self, graph: ir.Graph) -> None:
        self._rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._scaled: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        """Results of this object: what each is the product of, rows and their steps."""
        self._perhaps_empty = _behind_chosen_rows(graph)

    def replace(self, node: ir.Node, weight: Floats, columns: Columns | None = None) -> None:
        """Put the W8A8 form of ``node`` (x [..., K] times ``weight`` [K, N]) in its place.

        ``columns`` is the weight as it was rounded; without it, it is rounded to the nearest.
        """
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        new = Replacement(node)
        if source not in self._rows:
            self._rows[source] = self._quantize_rows(new, source, weight.shape[0])
        rows, steps = self._rows[source]
        values, scales = columns or quantize_columns(weight)
        product = new.add(
            "MatMulIntegerToFloat",
            rows,
            new.constant("weight_int8", values),
            new.constant("w8a8.one", np.float32(1), shared=True),
            new.constant("weight_scale", scales),
            new.constant("w8a8.zero_point", _ZERO_POINT, shared=True),
            domain=MICROSOFT,
        )
        scaled = new.add("Mul", product, steps)
        if result in self._perhaps_empty:
            self._perhaps_empty.add(scaled)
        self._scaled[scaled] = product, steps
        new.finish(scaled)

    def _quantize_rows(self, new: Replacement, source: ir.Value, width: int) -> tuple[ir.Value, ir.Value]:
        """The rows of ``source`` [..., width] in uint8, and the step of each row (its last axis kept, of length 1).

        A row of zeros has step 0 and arbitrary codes, which the multiplication by the step brings back to zero.
        """
        last_axis = new.constant("w8a8.last_axis", np.array([-1], np.int64), shared=True)
        level = new.constant("w8a8.level", np.float32(1 / _LEVELS), shared=True)
        zero_point = new.constant("w8a8.zero_point", _ZERO_POINT, shared=True)
        huge = new.constant("w8a8.huge", _HUGE, shared=True)
        waiting = self._without_scale(source)
        largest = new.add("ReduceMax", new.add("Abs", source), last_axis)
        if source in self._perhaps_empty:
            # ONNX Runtime 1.31 leaves the axis at its full length when there are no rows: cut it to 1.
            first = new.constant("w8a8.first", np.array([0], np.int64), shared=True)
            largest = new.add("Gather", largest, first, axis=-1)
        steps = new.add("Mul", largest, level, name="steps")
        # The blocked QuantizeLinear wants a zero point per step: steps over something huge, quantised, give 128.
        zero_points = new.add("QuantizeLinear", steps, huge, zero_point, name="zero_points")
        rows = new.add("QuantizeLinear", source, steps, zero_points, axis=-1, block_size=width)
        return rows, steps if waiting is None else new.add("Mul", steps, waiting, name="all_steps")

    def _without_scale(self, source: ir.Value) -> ir.Value | None:
        """Take the scale out of one factor of ``source``, if it is such a product and nobody else sees either.

        Returns the scale, which has to be multiplied to whatever is made of ``source``.
        """
        product = source.producer()
        if product is None or product.op_type != "Mul" or _only_reader(source) is None:
            return None
        for place, factor in enumerate(product.inputs):
            if factor in self._scaled and _only_reader(factor) is product:
                rows, steps = self._scaled.pop(factor)
                scaling = factor.producer()
                product.replace_input_with(place, rows)
                assert scaling is not None
                assert isinstance(scaling.graph, ir.Graph)
                scaling.graph.remove(scaling, safe=True)
                return steps
        return None


def _behind_chosen_rows(graph: ir.Graph) -> set[ir.Value]:
    """All values that hold only the rows that the caller asked for, of which there may be none."""
    found = {value for value in graph.inputs if value.name == _CHOSEN_ROWS}
    for node in graph:
        if any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found
