"""Which parts of a graph are quantised and how: from a profile to a plan, and from a plan to a changed graph.

A part is a linear layer (a MatMul with a constant fp32 weight), the head among them, or the embedding; the plan gives
each part its form by name. The forms themselves are in w8a8.py and blockwise.py; whether the result is good enough is
decided in gate.py and build.py, which come back here with another plan. Attention, norms and the rest stay fp32.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import onnx_ir as ir

from slmdeploy.building.blockwise import Blocks, Floats, put_blocks, quantize_rows, replace_gather
from slmdeploy.building.rewriting import remove_unused_initializers, weight_array
from slmdeploy.building.static_w8a8 import Range, StaticQuantizer
from slmdeploy.building.w8a8 import Columns, TokenQuantizer, cut_in_two, quantize_columns
from slmdeploy.errors import InputError
from slmdeploy.specs import Profile, Storage, Weights

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FP32 = Weights(scheme="fp32")
Plan = Mapping[str, Weights]
"""The form of each part by name. A part that is not in it stays as it is."""


class Rounds(Protocol):
    """Rounds the weight [K, N] of a linear layer, given its name and that of the value it reads."""

    def __call__(self, layer: str, reads: str, weight: Floats, form: Weights) -> Blocks:
        """In blocks, as ``form`` says."""

    def columns(self, layer: str, reads: str, weight: Floats) -> Columns:
        """In 8 bits with one scale for each column."""


class RoundAlone:
    """What is nearest to the weight, whatever it is multiplied with."""

    def __call__(self, layer: str, reads: str, weight: Floats, form: Weights) -> Blocks:
        """In blocks, as ``form`` says."""
        rows = np.ascontiguousarray(weight.T)
        return quantize_rows(rows, bits=form.bits, block_size=form.block_size, symmetric=form.symmetric)

    def columns(self, layer: str, reads: str, weight: Floats) -> Columns:
        """In 8 bits with one scale for each column."""
        return quantize_columns(weight)


round_alone = RoundAlone()


def describe(form: Weights) -> str:
    """A form in two words, as reports name it: ``fp32``, ``w8a8``, ``int4 block 32``."""
    if form.scheme != "weight-only":
        return form.scheme
    return f"int{form.bits} block {form.block_size}"


def parts(model: ir.Model) -> dict[str, ir.Node]:
    """The quantisable nodes of a fp32 graph by name, in graph order: linear layers, the head and the embedding."""
    found = {}
    for node in model.graph:
        position = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        if position is None or (node.op_type == "Gather" and node.name != EMBEDDING):
            continue
        weight = node.inputs[position]
        if weight is not None and _is_matrix(weight):
            assert node.name
            found[node.name] = node
    return found


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2


def plan_for(profile: Profile, model: ir.Model) -> dict[str, Weights]:
    """The form that ``profile`` wants for each part of ``model``; parts that stay fp32 are left out.

    Raises InputError when the profile quantises linear layers and the graph has none.
    """
    names = list(parts(model))
    linear = [name for name in names if name not in (EMBEDDING, HEAD)]
    if profile.weights.scheme != "fp32" and not linear:
        raise InputError(
            f"the graph has no MatMul with a constant weight, so profile {profile.name!r} has nothing to quantise: "
            "export it again, or use a profile whose scheme is fp32"
        )
    wanted = dict.fromkeys(linear, profile.weights)
    wanted |= {EMBEDDING: stored(profile.embedding), HEAD: stored(profile.head)}
    return {name: wanted[name] for name in names if wanted[name] != FP32}


def stored(storage: Storage) -> Weights:
    """The form of a table that is stored this way."""
    if storage.bits == 32:
        return FP32
    return Weights(scheme="weight-only", bits=storage.bits, block_size=storage.block_size, symmetric=storage.symmetric)


def higher(form: Weights) -> Weights:
    """The next more precise form of a layer that costs too much quality: from static by token to by block, to fp32."""
    if form.scheme == "w8a8-static":
        return Weights(scheme="w8a8", bits=8)
    if form.scheme == "w8a8":
        return Weights(scheme="weight-only", bits=8)
    return Weights(scheme="weight-only", bits=8) if form.bits == 4 else FP32


def quantize(
    model: ir.Model, plan: Plan, ranges: Mapping[str, Range] | None = None, rounding: Rounds | None = None
) -> None:
    """Change ``model`` in place: each part named in ``plan`` takes its form, and weights no longer read are removed.

    ``ranges`` are those of the values that static parts read, by the value's name; ``rounding`` rounds the weights of
    linear layers, which without it are rounded for themselves.
    """
    forms = {
        half: form
        for name, node in parts(model).items()
        if (form := plan.get(name, FP32)).scheme != "fp32"
        for half in (cut_in_two(node) if form.scheme in ("w8a8", "w8a8-static") else [node])
    }
    tokens, static = TokenQuantizer(model.graph), StaticQuantizer(ranges or {})
    for node, form in forms.items():
        _replace(node, form, tokens, static, rounding or round_alone)
    remove_unused_initializers(model.graph)


def _replace(node: ir.Node, form: Weights, tokens: TokenQuantizer, static: StaticQuantizer, rounding: Rounds) -> None:
    if node.op_type == "Gather":
        table = node.inputs[0]
        assert table is not None
        shape = {"bits": form.bits, "block_size": form.block_size}
        replace_gather(node, weight_array(table), **shape, symmetric=form.symmetric)
        return
    source, weight = node.inputs[:2]
    assert node.name
    assert source is not None
    assert source.name
    assert weight is not None
    array = weight_array(weight)
    if form.scheme == "w8a8":
        tokens.replace(node, array, rounding.columns(node.name, source.name, array))
    elif form.scheme == "w8a8-static":
        static.replace(node, array, rounding.columns(node.name, source.name, array))
    else:
        found = rounding(node.name, source.name, array, form)
        put_blocks(node, found, width=len(array), bits=form.bits, block_size=form.block_size)


def rounded(node: ir.Node, form: Weights, rounding: Rounds) -> Blocks:
    """What ``rounding`` makes of a linear layer under a weight-only form."""
    source, weight = node.inputs[:2]
    assert node.name
    assert source is not None
    assert source.name
    assert weight is not None
    return rounding(node.name, source.name, weight_array(weight), form)
