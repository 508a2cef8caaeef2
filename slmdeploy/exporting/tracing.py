"""Traces a torch module into an ONNX graph with transformers.exporters, quietly, and fails in one sentence.

What comes out has the names that were asked for: inputs and outputs are the module's, and the axes that may vary are
called by name rather than s43. Where the tracer found one of them to be fixed, it refuses, so no graph comes out that
runs for one batch size only. Traces of the torch side (stack traces with local paths) are taken out. Knows nothing of
what the module computes, and nothing of whether the graph is right: parity decides that.
"""

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from slmdeploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

OPSET = 18
"""What the translations of torch operators are written in; a higher one would come of a conversion."""


def trace(
    module: "torch.nn.Module",
    inputs: Mapping[str, "torch.Tensor"],
    axes: Mapping[str, Mapping[int, str]],
    *,
    fused: bool,
    name: str,
) -> "ir.Model":
    """The graph of `module`, which is called with `inputs` by keyword and returns a dict of its outputs by name.

    axes: for each input, which of its axes may have any size, and what that size is called. fused: in ONNX Runtime's
    own operators where those are faster on a CPU, else in standard operators alone. name: of the model, for the
    sentence. Raises UnsupportedModelError when the module cannot be traced.
    """
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    any_size = torch.export.Dim.DYNAMIC
    fusions: dict[str, Any] = {"ort_fusions": "cpu"} if fused else {}
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes={key: dict.fromkeys(axes[key], any_size) for key in inputs},
        opset_version=OPSET,
        **fusions,
    )
    try:
        with quietly():
            traced: Any = module  # any module will do, although the exporter is declared for PreTrainedModel alone
            exported: Any = OnnxExporter().export(traced, dict(inputs), config)
    except Exception as error:  # torch, onnxscript and transformers raise dozens of kinds here, all with one meaning
        lines = str(error).split("\n")
        raise UnsupportedModelError(
            f"{name} cannot be exported: transformers.exporters fails on it ({type(error).__name__}: {lines[0][:200]})"
        ) from error
    # transformers 5.22 returns torch's own program.
    model: ir.Model = exported.model if isinstance(exported, torch.onnx.ONNXProgram) else exported.program
    _name_axes(model, axes)
    _name_linears(model)
    _remove_traces(model)
    return model


def can_fuse() -> bool:
    """Whether the installed transformers can trace into ONNX Runtime's own operators: 5.23 can, 5.22 cannot."""
    from transformers.exporters.configs import OnnxConfig

    return "ort_fusions" in OnnxConfig.__dataclass_fields__


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No progress, no logs and no warnings while transformers loads or exports: users can do nothing about any of them.

    Their errors are raised, not logged, so nothing is lost. For this process as a whole: one export at a time.
    """
    from transformers.utils import logging as transformers_logging

    disabled, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        # torch prints the whole program beside some of its errors.
        said = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()


def _name_axes(model: "ir.Model", axes: Mapping[str, Mapping[int, str]]) -> None:
    """Rename the tracer's symbols, in the shapes of all values, to the names of the axes that they stand for."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        assert value.shape is not None, "a traced input has a shape"
        names |= {str(value.shape[axis]): name for axis, name in axes[str(value.name)].items()}
    symbol = re.compile("|".join(rf"\b{re.escape(found)}\b" for found in names))
    values = [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = type(value.shape)([_renamed(size, symbol, names) for size in value.shape])


def _renamed(size: "int | ir.SymbolicDim", symbol: re.Pattern[str], names: Mapping[str, str]) -> int | str | None:
    """A size under its new name; the tracer calls some fixed sizes by a name too, such as "2"."""
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    name = symbol.sub(lambda match: names[match[0]], size.value)
    return int(name) if name.isdigit() else name


def _name_linears(model: "ir.Model") -> None:
    """Nodes that multiply or look up a weight take the name of their module, so that reports and plans can say which.

    Of several in one module the first does; a node that came of a fusion has no module and keeps the tracer's name.
    """
    taken = {node.name for node in model.graph}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        if node.op_type in ("MatMul", "Gemm", "Gather") and any(map(_constant, node.inputs)) and len(scopes) > 1:
            module = str(scopes[-2])
            if module and module not in taken:
                taken.add(module)
                node.name = module


def _constant(value: "ir.Value | None") -> bool:
    """Whether a value is a weight, or a weight transposed, which the tracer leaves to be done where it is large."""
    source = value.producer() if value is not None else None
    value = source.inputs[0] if source is not None and source.op_type == "Transpose" else value
    return value is not None and value.is_initializer()


def _remove_traces(model: "ir.Model") -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
