"""Which parts of an encoder's graph are quantised: its linear layers, and the table of token vectors.

Encoders are traced graphs, so parts are found by what they are and not by name: every MatMul with a constant fp32
matrix, and the Gather that input_ids index. Pooler and classifier are Gemm nodes over one row per text and stay fp32,
as does everything else. The forms themselves are in w8a8.py and blockwise.py.
"""

from collections.abc import Mapping

import onnx_ir as ir
from onnxscript.version_converter import convert_version

from slmdeploy.building.blockwise import replace_gather, replace_matmul
from slmdeploy.building.quantize import FP32, stored
from slmdeploy.building.rewriting import MICROSOFT, remove_unused_initializers, weight_array
from slmdeploy.building.w8a8 import TokenQuantizer
from slmdeploy.errors import InputError
from slmdeploy.specs import Profile, Weights

TOKENS = "input_ids"
OPSET = 21
"""The first with a blocked QuantizeLinear, which W8A8 is made of; encoders are traced in an older one."""


def linears(model: ir.Model) -> dict[str, ir.Node]:
    """The linear layers by name, in graph order."""
    found = [node for node in model.graph if node.op_type == "MatMul" and _matrix(node.inputs[1])]
    return {_name(node): node for node in found}


def tables(model: ir.Model) -> dict[str, ir.Node]:
    """The lookups of token ids in a constant fp32 table, by name; every encoder has one, ELECTRA's is narrower."""
    found = [
        node
        for node in model.graph
        if node.op_type == "Gather"
        and node.attributes.get_int("axis", 0) == 0
        and node.inputs[1] is not None
        and node.inputs[1].name == TOKENS
        and _matrix(node.inputs[0])
    ]
    return {_name(node): node for node in found}


def plan_for(profile: Profile, model: ir.Model) -> dict[str, Weights]:
    """The form that ``profile`` wants for each part of ``model``; parts that stay fp32 are left out.

    Raises InputError for a profile of two forms, and when it quantises linear layers and the graph has none.
    """
    if profile.scoring is not None:
        raise InputError(f"profile {profile.name!r} has a form of its own for scoring, and an encoder has one graph")
    if profile.weights.scheme == "w8a8-static":
        raise InputError(f"profile {profile.name!r} has static ranges, which are calibrated for decoders alone")
    layers = linears(model)
    if profile.weights.scheme != "fp32" and not layers:
        raise InputError(
            f"the graph has no MatMul with a constant weight, so profile {profile.name!r} has nothing to quantise: "
            "export it again, or use a profile whose scheme is fp32"
        )
    wanted = dict.fromkeys(layers, profile.weights) | dict.fromkeys(tables(model), stored(profile.embedding))
    return {name: form for name, form in wanted.items() if form != FP32}


def quantize(model: ir.Model, plan: Mapping[str, Weights]) -> None:
    """Change ``model`` in place: each part named in ``plan`` takes its form, and weights no longer read are removed."""
    if model.graph.opset_imports[""] < OPSET:
        convert_version(model, OPSET)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    tokens = TokenQuantizer(model.graph)
    for name, node in linears(model).items():
        form = plan.get(name, FP32)
        weight = node.inputs[1]
        assert weight is not None
        if form.scheme == "w8a8":
            tokens.replace(node, weight_array(weight))
        elif form.scheme == "weight-only":
            blocks = {"bits": form.bits, "block_size": form.block_size}
            replace_matmul(node, weight_array(weight), **blocks, symmetric=form.symmetric)
    for name, node in tables(model).items():
        form = plan.get(name, FP32)
        table = node.inputs[0]
        assert table is not None
        if form.scheme == "weight-only":
            blocks = {"bits": form.bits, "block_size": form.block_size}
            replace_gather(node, weight_array(table), **blocks, symmetric=form.symmetric)
    remove_unused_initializers(model.graph)


def _name(node: ir.Node) -> str:
    assert node.name, "every node of a traced graph has a name"
    return node.name


def _matrix(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None else None
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2
