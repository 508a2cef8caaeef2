"""Marks a build for ONNX Runtime's TensorRT providers, the other way in: the graph is compiled when it is opened.

    phases from the workload -> provider.json -> runtime.json names the provider

Nothing is compiled here, so a target needs not be named and no compiler be installed; what the provider makes of the
graph is seen where it runs. Knows nothing of precision or quality.
"""

from pathlib import Path

import onnx_ir as ir

from slmdeploy.building.onnxruntime import MODEL, write_runtime
from slmdeploy.building.tensorrt_shapes import phases_of, taken_by
from slmdeploy.errors import InputError
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.provider_options import ProviderOptions, write_options
from slmdeploy.runtime.providers import PROVIDERS
from slmdeploy.specs import Compiler, Workload

THROUGH = "onnxruntime"
"""What a profile's ``compiler.through`` says for it."""


def check_for_provider(graph: Path) -> None:
    """Raise InputError for a graph that scores, or whose cache is written in place: no provider promises to do that."""
    config = read_runtime(graph)
    if config.tasks != ("generate",):
        raise InputError(
            f"{graph} has the task score, which ONNX Runtime's TensorRT providers do not run here: export it with "
            "--task generate"
        )
    if config.interface == "static":
        raise InputError(
            f"{graph} has a static cache, which ONNX Runtime's TensorRT providers do not run: export it with --opset 23"
        )


def mark_for_provider(folder: Path, compiler: Compiler, workload: Workload | None) -> str:
    """Have ``folder`` opened by the provider of the product that ``compiler`` names; why it is not compiled yet.

    Raises InputError for a workload that is not the model's.
    """
    config, model = read_runtime(folder), ir.load(folder / MODEL)
    phases = tuple(taken_by(phase, model) for phase in phases_of(config, workload))
    write_options(folder, ProviderOptions(compiler.workspace_bytes, compiler.level, phases))
    write_runtime(folder, folder, provider=compiler.module, numerics_only=False)
    return f"ONNX Runtime's {PROVIDERS[compiler.module].title} provider compiles it when it is opened"
