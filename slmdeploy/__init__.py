"""Efficient small language models: distil, prune, export, build per hardware profile, measure, select, package.

    import slmdeploy
    slmdeploy.run("examples/quickstart.toml", out="work/quickstart")
    model = slmdeploy.load("work/quickstart/package")
    print(model.generate("def main(").text)

The verbs are the subcommands of the command line. Each is imported when first used, so that running a package never
imports what made it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slmdeploy.version import __version__

if TYPE_CHECKING:
    from slmdeploy.building.build import build
    from slmdeploy.building.recompile import recompile
    from slmdeploy.compress.distill import distill
    from slmdeploy.compress.encoder_verbs import distill_encoder, finetune
    from slmdeploy.compress.prune import prune
    from slmdeploy.evaluation.evaluate import evaluate
    from slmdeploy.exporting.export import export
    from slmdeploy.packaging.package import package
    from slmdeploy.pipeline import run
    from slmdeploy.profiling.profile import profile
    from slmdeploy.reporting.report import report
    from slmdeploy.runtime.encoder_model import EncoderModel
    from slmdeploy.runtime.model import Model
    from slmdeploy.runtime.opening import load
    from slmdeploy.selection import select
    from slmdeploy.selection.capacity import plan
    from slmdeploy.verification import verify

_HOMES = {
    "EncoderModel": "runtime.encoder_model",
    "Model": "runtime.model",
    "build": "building.build",
    "distill": "compress.distill",
    "distill_encoder": "compress.encoder_verbs",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "finetune": "compress.encoder_verbs",
    "load": "runtime.opening",
    "package": "packaging.package",
    "plan": "selection.capacity",
    "profile": "profiling.profile",
    "prune": "compress.prune",
    "recompile": "building.recompile",
    "report": "reporting.report",
    "run": "pipeline",
    "select": "selection",
    "verify": "verification",
}

__all__ = [
    "EncoderModel",
    "Model",
    "__version__",
    "build",
    "distill",
    "distill_encoder",
    "evaluate",
    "export",
    "finetune",
    "load",
    "package",
    "plan",
    "profile",
    "prune",
    "recompile",
    "report",
    "run",
    "select",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slmdeploy' has no attribute {name!r}")
    return getattr(import_module(f"slmdeploy.{_HOMES[name]}"), name)
