"""Quantises OpenVINO models with nncf: weights alone, or weights and activations with figures from calibration runs.

nncf reports usage to its makers unless told that it runs in a build system, so that is what it is told; and it writes
progress and tables to stdout, which belong to whoever called. Knows nothing of how good or fast the result is.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from slmdeploy.building.openvino_graph import ROTARY
from slmdeploy.specs import Weights

Feed = Mapping[str, npt.NDArray[np.int64]]
_PASSED_ON = ("Convert", "Multiply", "Subtract", "Reshape", "FakeQuantize", "FakeConvert")
"""What stands between a stored weight and the product that it goes into."""


def nncf() -> Any:
    """The package, without its telemetry and its log."""
    os.environ.setdefault("NNCF_CI", "1")
    import logging

    import nncf as package

    package.set_log_level(logging.ERROR)
    return package


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def compress_weights(model: Any, form: Weights) -> Any:
    """The model with weights of 8 bits, one scale per output channel, or of 4 bits with one per block.

    At 4 bits embedding and head take 8. Activations are float, or 8 bits made at run time where the CPU gains by it.
    """
    package = nncf()
    modes = package.CompressWeightsMode
    # Angles of 8 bits would put every token in a wrong place; to nncf they are a table like an embedding.
    exact = package.IgnoredScope(patterns=[f"{ROTARY}\\..*"], validate=False)
    with _quiet():
        if form.bits == 8:
            mode = modes.INT8_SYM if form.symmetric else modes.INT8_ASYM
            return package.compress_weights(model, mode=mode, ignored_scope=exact)
        mode = modes.INT4_SYM if form.symmetric else modes.INT4_ASYM
        return package.compress_weights(model, mode=mode, ratio=1.0, group_size=form.block_size, ignored_scope=exact)


def quantize(model: Any, feeds: Sequence[Feed]) -> Any:
    """The model with weights and activations of 8 bits; the ranges of activations are those seen on ``feeds``."""
    package = nncf()
    with _quiet():
        return package.quantize(
            model,
            package.Dataset(list(feeds)),
            model_type=package.ModelType.TRANSFORMER,
            subset_size=len(feeds),
        )


def parts(model: Any) -> dict[str, str]:
    """The form of each product with a stored matrix, and of each lookup in one, that is not float, by its name."""
    found = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in ("MatMul", "Gather"):
            continue
        stored = _stored(node.input_value(0 if kind == "Gather" else 1).get_node())
        if stored is None:
            continue
        bits = stored.get_element_type().bitwidth
        quantised = kind == "MatMul" and node.input_value(0).get_node().get_type_name() == "FakeQuantize"
        block = f"block {stored.shape[1]}" if len(stored.shape) == 3 else "per channel"
        found[node.get_friendly_name()] = "w8a8" if quantised else f"int{bits} {block}"
    return found


def _stored(node: Any) -> Any:
    """The integer constant that a value is made of, None where there is none."""
    while node.get_type_name() in _PASSED_ON:
        node = node.input_value(0).get_node()
    integer = node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in ("i8", "u8", "i4", "u4")
    return node if integer else None
