"""Graph surgery on encoders for ONNX Runtime's CPU kernels: attention as one node, norms as plain vectorised operators.

    attention   reshapes, transposes, matmuls, softmax      ->  MultiHeadAttention; masks as the graph computes them
    biases      three additions behind a split of Q, K, V   ->  one addition in front of it
    norms       (Skip)LayerNormalization                    ->  mean, difference, its square's mean, scale

Each form is exact in float32 and the fastest of those that benchmarks/encoder_forms.py compares: the norm kernels of
ONNX Runtime 1.31 sum one number at a time, which takes three times as long as the plain operators. A piece that does
not look exactly as expected stays as it is, so any graph can be handed in. Knows nothing of quantisation, and whether
the result is right is measured by the caller (encoder_build.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from slmdeploy.building.rewriting import MICROSOFT, Constant, Replacement

_HEADS_FIRST, _KEYS_TURNED = (0, 2, 1, 3), (0, 2, 3, 1)
_TURNS = ("transA", "transB", "transBatchA", "transBatchB")


@dataclass(frozen=True)
class Fused:
    """How many pieces of a graph took another form."""

    attention: int
    biases: int
    norms: int


def fuse(model: ir.Model) -> Fused:
    """Change ``model`` in place; returns what was changed."""
    return Fused(fuse_attention(model), fuse_biases(model), unfuse_norms(model))


def fuse_attention(model: ir.Model) -> int:
    """The first of the forms alone; how many pieces took it."""
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    changed = sum(_fuse_attention(found) for found in list(_attentions(model.graph)))
    RemoveUnusedNodesPass()(model)
    return changed


def fuse_biases(model: ir.Model) -> int:
    """The second of the forms alone; how many pieces took it."""
    return sum(_fuse_biases(node) for node in list(model.graph) if node.op_type == "Split")


def unfuse_norms(model: ir.Model) -> int:
    """The third of the forms alone; how many pieces took it."""
    return sum(_unfuse_norm(node) for node in list(model.graph) if node.op_type in _NORMS)


@dataclass(frozen=True)
class _Attention:
    """One attention in a traced graph: what it reads [batch, sequence, heads x head_dim], and its last node."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    biases: tuple[ir.Value, ...]
    heads: int
    scale: float
    last: ir.Node


def _attentions(graph: ir.Graph) -> Iterator[_Attention]:
    for node in graph:
        found = _attention(node) if node.op_type == "Softmax" else None
        if found is not None:
            yield found


def _attention(softmax: ir.Node) -> _Attention | None:
    """What a Softmax is the middle of, if all around it is as transformers.exporters writes an attention."""
    biases: list[ir.Value] = []
    scores = softmax.inputs[0]
    while (masked := _made_by(scores, "Add")) is not None and masked.inputs[1] is not None:
        biases.append(masked.inputs[1])
        scores = masked.inputs[0]
    product, scale = _product(scores)
    weighted = _reader(softmax.outputs[0], "MatMul")
    if not biases or product is None or scale is None or weighted is None:
        return None
    query, key = _heads(product.inputs[0], _HEADS_FIRST), _heads(product.inputs[1], _KEYS_TURNED)
    value, last = _heads(weighted.inputs[1], _HEADS_FIRST), _joined(weighted.outputs[0])
    if query is None or key is None or value is None or last is None:
        return None
    widths = {_width(found) for found in (query[0], key[0], value[0], last.outputs[0])}
    if len({query[1], key[1], value[1]}) > 1 or len(widths) > 1 or None in widths:
        return None
    return _Attention(query[0], key[0], value[0], tuple(biases), query[1], scale, last)


def _product(scores: ir.Value | None) -> tuple[ir.Node | None, float | None]:
    """The node that multiplies queries and keys, and what the products are scaled by."""
    fused = _made_by(scores, "FusedMatMul")
    if fused is not None:
        plain = not any(fused.attributes.get_int(name, 0) for name in _TURNS)
        return (fused, fused.attributes.get_float("alpha", 1.0)) if plain else (None, None)
    scaled = _made_by(scores, "Mul")
    return (_made_by(scaled.inputs[0], "MatMul"), _scalar(scaled.inputs[1])) if scaled else (None, None)


def _heads(value: ir.Value | None, order: tuple[int, ...]) -> tuple[ir.Value, int] | None:
    """The rows [batch, sequence, width] that a value is the heads of, and how many; None if it is made another way."""
    turned = _made_by(value, "Transpose")
    if turned is None or tuple(turned.attributes.get_ints("perm", ())) != order:
        return None
    cut = _made_by(turned.inputs[0], "Reshape")
    heads = _head_count(cut) if cut is not None else None
    source, rows = turned.inputs[0], None
    while (reshape := _made_by(source, "Reshape")) is not None:
        source = reshape.inputs[0]
        rows = source if source is not None and source.shape is not None and len(source.shape) == 3 else rows
    return (rows, heads) if rows is not None and heads is not None else None


def _head_count(cut: ir.Node) -> int | None:
    """The third of the four sizes that a Reshape gives, from its constant or from the shape of what comes out."""
    sizes = ir.convenience.get_const_tensor(cut.inputs[1]) if cut.inputs[1] is not None else None
    shape = cut.outputs[0].shape
    known = sizes.numpy().tolist() if sizes is not None else list(shape) if shape is not None else []
    return known[2] if len(known) == 4 and isinstance(known[2], int) and known[2] > 0 else None


def _joined(value: ir.Value) -> ir.Node | None:
    """The last node of what puts the heads side by side: a transpose, reshapes, and zeros for rows without a token."""
    node = _reader(value, "Transpose")
    if node is None or tuple(node.attributes.get_ints("perm", ())) != _HEADS_FIRST:
        return None
    while (after := _reader(node.outputs[0], "Reshape") or _reader(node.outputs[0], "Where")) is not None:
        if after.op_type == "Where" and (_scalar(after.inputs[1]) != 0.0 or after.inputs[2] is not node.outputs[0]):
            break
        node = after
    return node if node.op_type == "Reshape" else None


def _fuse_attention(found: _Attention) -> bool:
    new = Replacement(found.last)
    bias, *others = found.biases
    for i, other in enumerate(others):
        bias = new.add("Add", bias, other, name=f"bias{i}")
    attended = new.add(
        "MultiHeadAttention",
        found.query,
        found.key,
        found.value,
        None,
        None,
        bias,
        domain=MICROSOFT,
        num_heads=found.heads,
        scale=found.scale,
    )
    new.finish(attended)
    return True


def _fuse_biases(split: ir.Node) -> bool:
    """One addition in front of a split in place of one behind each part of it."""
    additions = [_reader(part, "Add") for part in split.outputs]
    biases = [_vector(node.inputs[1]) if node else None for node in additions]
    source = split.inputs[0]
    if source is None or split.attributes.get_int("axis", 0) != -1 or any(bias is None for bias in biases):
        return False
    vector = np.concatenate([bias for bias in biases if bias is not None])
    if len(vector) != _width(source):
        return False
    graph = split.graph
    assert isinstance(graph, ir.Graph)
    new = Replacement(split)
    added = new.add("Add", source, new.constant("bias", vector))
    added.type, added.shape = source.type, source.shape
    split.replace_input_with(0, added)
    for node in additions:
        assert node is not None
        bare = node.inputs[0]
        assert bare is not None
        bare.shape = bare.shape or node.outputs[0].shape
        ir.convenience.replace_all_uses_with(node.outputs[0], bare)
        graph.remove(node, safe=True)
    return True


def _unfuse_norm(norm: ir.Node) -> bool:
    """Sum, mean and variance by operators that use vectors. The variance is of differences, so nothing cancels."""
    x, *others = norm.inputs
    if norm.op_type == "SkipLayerNormalization":
        skip, *others = others
    else:
        skip = None
    gain, bias, *addend = [*others, None, None][:3]
    unusual = norm.attributes.get_int("axis", -1) != -1 or any(value.uses() for value in norm.outputs[1:3])
    if x is None or gain is None or unusual:
        return False
    new = Replacement(norm)
    total = x if not addend or addend[0] is None else new.add("Add", x, addend[0], name="biased")
    total = total if skip is None else new.add("Add", total, skip, name="sum")
    axis = new.constant("norm.axis", np.array([-1], np.int64), shared=True)
    centred = new.add("Sub", total, new.add("ReduceMean", total, axis))
    # ReduceSumSquare takes twice the time of these two.
    variance = new.add("ReduceMean", new.add("Mul", centred, centred, name="squares"), axis, name="variance")
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    safe = new.add("Add", variance, new.constant("epsilon", np.float32(epsilon)), name="safe")
    scaled = new.add("Mul", centred, new.add("Reciprocal", new.add("Sqrt", safe)), name="normal")
    result = new.add("Mul", scaled, gain, name="gained")
    result = result if bias is None else new.add("Add", result, bias, name="result")
    if len(norm.outputs) > _SUM:
        ir.convenience.replace_all_uses_with(norm.outputs[_SUM], total)
    norm.resize_outputs(1)
    new.finish(result)
    return True


_NORMS = ("SkipLayerNormalization", "LayerNormalization")
_SUM = 3
"""The output of SkipLayerNormalization that is what it normalises."""


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def _reader(value: ir.Value, operator: str) -> ir.Node | None:
    """The one node that reads a value, if there is no other and it is of this kind."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    (use,) = uses
    node = use.node
    return node if node.op_type == operator else None


def _scalar(value: ir.Value | None) -> float | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().ravel()[0]) if tensor is not None and tensor.size == 1 else None


def _vector(value: ir.Value | None) -> Constant | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None and len(tensor.shape) == 1 else None


def _width(value: ir.Value | None) -> int | None:
    """The length of a value's last axis where the graph says it."""
    last = value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None
