"""A traced encoder in the shape that OpenVINO's CPU plugin quantises best; exact, and before nncf sees it.

    queries, keys and values of one product that is cut   ->  three products: each writes 8 bits that attention reads
    (product + residual) + bias                           ->  (product + bias) + residual: the bias joins its product
    zeros for queries that see no key                     ->  left out: no row is without a token

The exporter's optimiser packs and orders so because ONNX Runtime gains by it. What does not look exactly so stays as it
is. Knows nothing of quantisation.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np


def unpack(model: Any) -> Any:
    """The model in that shape; the one that is handed in is used up."""
    for split in [node for node in model.get_ordered_ops() if node.get_type_name() in ("Split", "VariadicSplit")]:
        _cut(split)
    for addition in [node for node in model.get_ordered_ops() if node.get_type_name() == "Add"]:
        _bias_first(addition)
    for choice in [node for node in model.get_ordered_ops() if node.get_type_name() == "Select"]:
        _drop_zeros(choice)
    # Nodes that were cut off may live on as readers of nodes of the model, which nncf refuses; a copy has none.
    return model.clone()


def _cut(split: Any) -> None:
    """Several products in place of one whose output only a split along the last axis reads."""
    from openvino import opset13 as op

    product = split.input_value(0).get_node()
    weight, rank = _weight(product), split.get_output_partial_shape(0).rank
    axis = split.input_value(1).get_node()
    if weight is None or _readers(product.output(0)) != 1 or rank.is_dynamic or axis.get_type_name() != "Constant":
        return
    widths = [split.get_output_partial_shape(i)[-1] for i in range(split.get_output_size())]
    if int(axis.get_data()) % rank.get_length() != rank.get_length() - 1 or any(width.is_dynamic for width in widths):
        return
    turned = product.get_attributes()["transpose_b"]
    ends = np.cumsum([width.get_length() for width in widths])
    for i, part in enumerate(np.split(weight.get_data(), ends[:-1], axis=0 if turned else 1)):
        own = op.constant(np.ascontiguousarray(part))
        new = op.matmul(product.input_value(0), own, False, turned)
        new.set_friendly_name(f"{product.get_friendly_name()}.{i}")
        _move(split.output(i), new.output(0))


def _bias_first(addition: Any) -> None:
    """Add a constant to the product before the other addend."""
    from openvino import opset13 as op

    inner, bias = addition.input_value(0), addition.input_value(1)
    if bias.get_node().get_type_name() != "Constant" or len(bias.get_partial_shape()) != 1:
        return
    before = inner.get_node()
    if before.get_type_name() != "Add" or _readers(inner) != 1:
        return
    addends = [before.input_value(0), before.input_value(1)]
    products = [value for value in addends if _weight(value.get_node()) is not None]
    if len(products) != 1 or _readers(products[0]) != 1:
        return
    product = products[0]
    residual = next(value for value in addends if value is not product)
    _move(addition.output(0), op.add(op.add(product, bias), residual).output(0))


def _drop_zeros(choice: Any) -> None:
    """Take what a Select puts zeros into where that is the output of an attention."""
    zero, value = choice.input_value(1).get_node(), choice.input_value(2)
    if zero.get_type_name() == "Constant" and not np.any(zero.get_data()) and "Softmax" in _makers(value):
        _move(choice.output(0), value)


def _makers(value: Any) -> Iterator[str]:
    """The kinds of the operators behind a value up to a softmax, along products and changes of shape."""
    node = value.get_node()
    while node.get_type_name() in ("Reshape", "Transpose", "MatMul", "Softmax"):
        yield node.get_type_name()
        node = node.input_value(0).get_node()


def _weight(node: Any) -> Any:
    """The stored matrix that a product multiplies by; None for any other node."""
    if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
        return None
    weight = node.input_value(1).get_node()
    return weight if weight.get_type_name() == "Constant" and len(weight.get_output_partial_shape(0)) == 2 else None


def _readers(value: Any) -> int:
    return len(value.get_target_inputs())


def _move(old: Any, new: Any) -> None:
    """Let all that reads one value read another."""
    for target in list(old.get_target_inputs()):
        target.replace_source_output(new)
