"""Which parts of an encoder's graph are quantised: its linear layers, and the table of token vectors.

Encoders are traced graphs, so parts are found by what they are and not by name: every MatMul with a constant fp32
matrix, and the Gather that input_ids index. Pooler and classifier are Gemm nodes over one row per text and stay fp32,
as does everything else. The forms themselves are in w8a8.py, static_w8a8.py and blockwise.py; behind a static product
stands no scale, so the product takes the bias that is added to it.
"""

from collections.abc import Mapping

import onnx_ir as ir
from onnxscript.version_converter import convert_version

from slmdeploy.building.blockwise import replace_gather, replace_matmul
from slmdeploy.building.quantize import FP32, stored
from slmdeploy.building.rewriting import MICROSOFT, Replacement, remove_unused_initializers, weight_array
from slmdeploy.building.static_w8a8 import Range, StaticQuantizer
from slmdeploy.building.w8a8 import TokenQuantizer
from slmdeploy.errors import InputError
from slmdeploy.specs import Profile, Weights

TOKENS = "input_ids"
_BIAS = 6
"""The input of MatMulIntegerToFloat that is added to its output."""
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
    layers = linears(model)
    if profile.weights.scheme != "fp32" and not layers:
        raise InputError(
            f"the graph has no MatMul with a constant weight, so profile {profile.name!r} has nothing to quantise: "
            "export it again, or use a profile whose scheme is fp32"
        )
    wanted = dict.fromkeys(layers, profile.weights) | dict.fromkeys(tables(model), stored(profile.embedding))
    return {name: form for name, form in wanted.items() if form != FP32}


def quantize(model: ir.Model, plan: Mapping[str, Weights], ranges: Mapping[str, Range] | None = None) -> None:
    """Change ``model`` in place: each part named in ``plan`` takes its form, and weights no longer read are removed.

    ``ranges`` are those of the values that static parts read, by the value's name.
    """
    if model.graph.opset_imports[""] < OPSET:
        convert_version(model, OPSET)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    tokens, static = TokenQuantizer(model.graph), StaticQuantizer(ranges or {})
    for name, node in linears(model).items():
        form = plan.get(name, FP32)
        weight = node.inputs[1]
        assert weight is not None
        if form.scheme == "w8a8":
            tokens.replace(node, weight_array(weight))
        elif form.scheme == "w8a8-static":
            static.replace(node, weight_array(weight))
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
    take_biases(model)
    remove_unused_initializers(model.graph)


def take_biases(model: ir.Model) -> int:
    """Let integer products add the constant vector that only an Add behind them adds; how many do."""
    taken = 0
    for product in [node for node in model.graph if node.op_type == "MatMulIntegerToFloat"]:
        uses = tuple(product.outputs[0].uses())
        addition = uses[0].node if len(uses) == 1 else None
        if addition is None or addition.op_type != "Add" or len(product.inputs) > _BIAS:
            continue
        bias = addition.inputs[1 - uses[0].idx]
        if bias is None or bias.const_value is None or len(bias.const_value.shape) != 1:
            continue
        product.resize_inputs(_BIAS + 1)
        product.replace_input_with(_BIAS, bias)
        Replacement(addition).finish(product.outputs[0])
        taken += 1
    return taken


def _name(node: ir.Node) -> str:
    assert node.name, "every node of a traced graph has a name"
    return node.name


def _matrix(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None else None
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2
