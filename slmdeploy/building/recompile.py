"""The verb `recompile`: a build for TensorRT gets a plan of the compiler and GPU at hand, of the graph that it ships.

    check the build -> the compiler as its profile says -> a copy without the old plan -> compile -> a new artifact

For a plan that another version or for another GPU made, which opening refuses, and for a graph that was left to be
compiled where its GPU is. The build itself stays as it is, its hashes too; graph, gates and quality are taken over,
since nothing of them changes. Knows nothing of precision.
"""

import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slmdeploy.artifacts import Artifact, open_artifact, writing
from slmdeploy.building.ort_providers import THROUGH
from slmdeploy.building.tensorrt import Compiled, compile_graph
from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.progress import SILENT, Progress
from slmdeploy.runtime.cuda_device import find_gpu
from slmdeploy.runtime.tensorrt_api import PRODUCTS, capability, load
from slmdeploy.runtime.tensorrt_plan import PLAN, RECIPE, read_recipe
from slmdeploy.specs import Compiler, Target, Workload


def recompile(
    build: Path, *, out: Path, target: Target | None = None, force: bool = False, progress: Progress | None = None
) -> Artifact:
    """Write ``build`` with a new plan to ``out``.

    ``target`` says what for, where the compiler works ahead of time; None: the GPU here, else what the old plan was
    for. Raises InputError for a build that has no graph for a compiler, where that is not installed or refuses the
    graph; ResourceError where it runs out of memory or time; OutputExistsError.
    """
    made = open_artifact(build, "build")
    compiler, workload = _settings(made)
    product, module = PRODUCTS[compiler.module], load(compiler.module)
    capabilities = _capabilities(made, target) if product.ahead_of_time else ()
    for name in capabilities:
        capability(module, product, name)
    plan = made.plan | {"compiler": f"{product.title} {module.__version__}", "compute_capabilities": list(capabilities)}
    if target is not None:
        plan["target"] = target.name
    bar = progress or SILENT
    with writing(out, kind="build", plan=plan, inputs={"build": build}, force=force) as draft:
        for name in made.manifest["files"]:
            if name not in (PLAN, RECIPE):
                (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(build / name, draft.path / name)
        bar.start(f"compile with {product.title}", None, "plans")
        compiled = compile_graph(draft.path, compiler, capabilities, workload)
        bar.finish()
        ladder = _climbed(made.result["verification"], compiled)
        draft.result |= made.result | {"compiled": compiled.recorded(), "verification": ladder}
    return open_artifact(out, "build")


def _settings(made: Artifact) -> tuple[Compiler, Workload | None]:
    """How the build's profile has it compiled, and for which workload."""
    profile = made.plan.get("profile")
    compiler = profile.get("compiler") if isinstance(profile, dict) and profile.get("engine") == "tensorrt" else None
    if compiler is None:
        raise InputError(f"{made.path} is no build for TensorRT's compiler: give one of a profile such as tensorrt-fp8")
    try:
        found = Compiler.model_validate(compiler)
        workload = Workload.model_validate(made.plan["workload"]) if made.plan.get("workload") else None
    except ValidationError as error:
        raise CorruptArtifactError(
            f"{made.path}: the plan in its manifest cannot be read ({error.errors()[0]['msg']}); build it again."
        ) from error
    if found.through == THROUGH:
        raise InputError(f"{made.path} is compiled by ONNX Runtime when it is opened, so there is nothing to compile")
    return found, workload


def _capabilities(made: Artifact, target: Target | None) -> tuple[str, ...]:
    """What is compiled for, ahead of time."""
    if target is not None:
        if target.compute_capability is None:
            raise InputError(f"target {target.name!r} is no NVIDIA GPU: name one that is with --target")
        return (target.compute_capability,)
    if gpu := _gpu():
        return (gpu,)
    if (made.path / RECIPE).is_file():
        return read_recipe(made.path).compute_capabilities
    raise InputError(f"{made.path} has no plan yet and there is no GPU here: name what to compile for with --target")


def _gpu() -> str | None:
    """The compute capability of the GPU here, None where there is none that cuda-bindings reach."""
    try:
        gpu = find_gpu()
    except InputError:  # no cuda-bindings, so nothing here has been set up for a GPU
        return None
    return gpu.compute_capability if gpu else None


def _climbed(ladder: dict[str, Any], compiled: Compiled) -> dict[str, Any]:
    """The ladder of the old build with the rung of the new plan."""
    rung = f"compiled ({compiled.recipe.title})"
    parts = [rung if "compiled" in part else part for part in str(ladder["summary"]).split(", ")]
    return ladder | {"summary": ", ".join(parts), "compiled": compiled.sentence()}
