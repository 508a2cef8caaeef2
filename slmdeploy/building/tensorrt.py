"""Compiles a build's graph with TensorRT: model.plan and its recipe beside model.onnx, and what the plan holds.

    phases from the workload -> a job -> the compiler in a process of its own -> plan, recipe, counts of its layers

The compiler is native code that can crash, hang or take all memory, and its log is long; here each of that becomes one
sentence. A graph that this product cannot compile is refused before, where we know it (FP8 under compute capability
8.9). Nothing is run: a plan compiled without a GPU has been executed nowhere, and says so. Knows nothing of precision
or quality.
"""

import json
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from slmdeploy.building.onnxruntime import MODEL, SCORE
from slmdeploy.building.tensorrt_shapes import encoder_phases, fix_capacity, phases_of, score_phases, taken_by
from slmdeploy.errors import InputError, ResourceError
from slmdeploy.runtime.bundle import read_runtime, sha256_file
from slmdeploy.runtime.encoder_config import is_encoder, read_encoder
from slmdeploy.runtime.tensorrt_api import PRODUCTS, load
from slmdeploy.runtime.tensorrt_plan import PLAN, RECIPE, Phase, Recipe
from slmdeploy.specs import Compiler, Workload

_WORKER = "slmdeploy.building.tensorrt_worker"
_COMPILED = ".compiled.onnx"
_FUSED = re.compile(r"mha|attention", re.IGNORECASE)
"""How the compiler names kernels that compute a whole attention."""
_NO_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|cannot allocate|bad_alloc", re.IGNORECASE)
_PRODUCT, _FUSED_KIND, _FUSED_PRODUCT = "gemm", "runtime_fusion", re.compile(r"Fc(?=_|[A-Z])")
"""How it calls products: a kind of their own, or fused with what is around them, by the name."""
_FLOATS = {"FP8": "fp8", "Half": "fp16", "BFloat16": "bf16", "Float": "fp32"}


@dataclass(frozen=True)
class Compiled:
    """A plan that was made: its recipe, and what the compiler said it holds; ``layers`` None where it said nothing."""

    recipe: Recipe
    plan_bytes: int
    seconds: float
    peak_bytes: int
    layers: list[dict[str, Any]] | None

    def recorded(self) -> dict[str, Any]:
        """For the result of a build."""
        return {
            "compiler": self.recipe.title,
            "compute_capabilities": list(self.recipe.compute_capabilities),
            "phases": [phase.name for phase in self.recipe.phases],
            "plan_bytes": self.plan_bytes,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "products": self.products,
            "fused_attentions": self.fused_attentions,
        }

    @property
    def products(self) -> dict[str, int] | None:
        """Matrix products by the type of their operands, of all phases together."""
        if self.layers is None:
            return None
        types = [_operand_type(layer["operands"]) for layer in self.layers if _is_product(layer)]
        return {name: types.count(name) for name in sorted(set(types))}

    @property
    def fused_attentions(self) -> int | None:
        """Kernels that compute a whole attention, of all phases together."""
        if self.layers is None:
            return None
        # A product keeps its module's name, and that may be attention.output.
        return sum(bool(_FUSED.search(layer["name"])) and not _is_product(layer) for layer in self.layers)

    def sentence(self) -> str:
        """How far that proves the graph."""
        where = "ahead of time, without a GPU" if self.recipe.driver is None else "on this GPU"
        count = len(self.recipe.phases)
        held = "" if self.layers is None else f": {self._counts()} in {count} phase{'s' if count > 1 else ''}"
        return f"{self.recipe.title}, {where}, for {' and '.join(self.recipe.compute_capabilities)}{held}"

    def _counts(self) -> str:
        products = [f"{count} {name} products" for name, count in (self.products or {}).items()]
        return ", ".join([*products, f"{self.fused_attentions} fused attentions"])


def _is_product(layer: dict[str, Any]) -> bool:
    fused = layer["type"] == _FUSED_KIND and _FUSED_PRODUCT.search(layer["name"])
    return layer["type"] == _PRODUCT or bool(fused)


def _operand_type(operands: list[str]) -> str:
    """The narrowest type among operands: float32 stands beside FP8 as its scale."""
    return next((name for label, name in _FLOATS.items() if label in operands), "other")


def missing(compiler: Compiler) -> str | None:
    """Why nothing can be compiled here by a compiler that needs its GPU at hand; None where it can be.

    Raises InputError for a product that could be installed here and is not.
    """
    product = PRODUCTS[compiler.module]
    try:
        load(compiler.module)
    except InputError as error:
        if product.ahead_of_time:
            raise
        return str(error)
    return None


def compile_graph(
    folder: Path, compiler: Compiler, capabilities: tuple[str, ...], workload: Workload | None = None
) -> Compiled:
    """Compile the graph in ``folder`` for compute capabilities such as ``8.9`` and write plan and recipe beside it.

    That is model.onnx, or score.onnx of a folder that only scores.

    No capability means the GPU of this machine, which is the only one that the product tensorrt compiles for.
    Raises InputError for a graph or capability that the compiler refuses, and where it crashes; ResourceError where it
    runs out of memory or time.
    """
    source, phases, capacity = _subject(folder, workload)
    graph, model = source, ir.load(source)
    phases = tuple(taken_by(phase, model) for phase in phases)
    try:
        if capacity is not None:
            fix_capacity(model, capacity)
            graph = folder / _COMPILED
            ir.save(model, graph)
        found = _run(_job(graph, folder / PLAN, compiler, capabilities, phases), compiler)
    finally:
        (folder / _COMPILED).unlink(missing_ok=True)
    gpu = found["gpu"]
    recipe = Recipe(
        module=compiler.module,
        version=found["version"],
        compute_capabilities=capabilities or (gpu["compute_capability"],),
        driver=None if capabilities else gpu["driver"],
        graph_sha256=sha256_file(source),
        phases=phases,
        capacity=capacity,
        workspace_bytes=compiler.workspace_bytes,
        level=compiler.level,
        options=compiler.options,
    )
    (folder / RECIPE).write_text(json.dumps(recipe.to_json(), indent=1) + "\n", encoding="utf-8")
    return Compiled(recipe, *(found[key] for key in ("plan_bytes", "seconds", "peak_bytes", "layers")))


def _subject(folder: Path, workload: Workload | None) -> tuple[Path, tuple[Phase, ...], int | None]:
    """The graph that is compiled, its phases, and the length of its static cache where it has one."""
    if is_encoder(folder):
        return folder / MODEL, encoder_phases(read_encoder(folder), workload), None
    config = read_runtime(folder)
    if config.tasks == ("score",):
        return folder / SCORE, score_phases(config, workload), None
    return folder / MODEL, phases_of(config, workload), config.max_length if config.interface == "static" else None


def _job(
    graph: Path, plan: Path, compiler: Compiler, capabilities: tuple[str, ...], phases: tuple[Phase, ...]
) -> dict[str, Any]:
    return {
        "module": compiler.module,
        "graph": str(graph),
        "plan": str(plan),
        "capabilities": list(capabilities),
        "phases": [{"name": phase.name, "shapes": phase.shapes} for phase in phases],
        "workspace_bytes": compiler.workspace_bytes,
        "level": compiler.level,
        "options": list(compiler.options),
        "timing_cache": compiler.timing_cache,
    }


def _run(job: dict[str, Any], compiler: Compiler) -> dict[str, Any]:
    """What the worker found; its failures as one sentence each."""
    title = PRODUCTS[compiler.module].title
    with tempfile.TemporaryDirectory(prefix="slmdeploy-tensorrt-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", _WORKER, str(file)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=compiler.timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise ResourceError(
                f"{title} had not compiled the graph after {compiler.timeout_s} s and was stopped: raise timeout_s, or "
                "lower level, in the profile"
            ) from None
    return _answer(done, title)


def _answer(done: "subprocess.CompletedProcess[str]", title: str) -> dict[str, Any]:
    last = done.stdout.rstrip().rpartition("\n")[2]
    if done.returncode != 0 or not last.startswith("{"):
        raise _crash(done, title)
    found: dict[str, Any] = json.loads(last)
    match found.get("error"):
        case "input":
            raise InputError(found["message"])
        case "refused" if _NO_MEMORY.search(found["message"]):
            raise ResourceError(
                f"{title} ran out of memory over the graph: lower workspace_bytes, or use a smaller one"
            )
        case "refused":
            raise InputError(f"{title} does not compile the graph: {found['message']}")
    return found


def _crash(done: "subprocess.CompletedProcess[str]", title: str) -> InputError | ResourceError:
    if done.returncode == -signal.SIGKILL or _NO_MEMORY.search(done.stderr) or "MemoryError" in done.stderr:
        return ResourceError(f"{title} ran out of memory over the graph: free some, or lower workspace_bytes")
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    said = done.stderr.strip().rpartition("\n")[2][:240] or "nothing"
    return InputError(f"{title} crashed over the graph ({ended}; it said: {said}): use another version or profile")
