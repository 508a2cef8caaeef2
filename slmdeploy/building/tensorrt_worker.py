"""Compiles one ONNX graph with TensorRT, in a process of its own: a native crash or a hang ends this process alone.

    python -m slmdeploy.building.tensorrt_worker JOB.json

The job says everything (tensorrt.py writes it); the last line on stdout is one JSON object, with ``error`` or with what
was compiled. The layers are read from the compiler's own log, because an engine cannot be opened without a GPU and so
cannot be inspected; another version may write it in another way, and then the counts are missing, not wrong. Knows
nothing of folders, profiles or quality.
"""

import json
import re
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from slmdeploy.errors import InputError
from slmdeploy.runtime.cuda_device import find_gpu
from slmdeploy.runtime.tensorrt_api import PRODUCTS, Product, capability, load, network_flags

_LAYERS = "Layers:\n"
_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: (?P<inputs>.*?), Outputs:", re.MULTILINE)
_LONGEST = 400
Job = Mapping[str, Any]


class RefusedError(Exception):
    """The compiler did not take the graph; the message is its own, in one line."""


def main(job: Job) -> dict[str, Any]:
    """Compile as ``job`` says; what was made, or ``error`` with the compiler's words."""
    try:
        module = load(job["module"])
        gpu = None if job["capabilities"] else find_gpu()
        if not job["capabilities"] and gpu is None:
            raise InputError(f"{PRODUCTS[job['module']].title} compiles for the GPU at hand, and there is none here")
        started = time.monotonic()
        log = make_log(module)
        try:
            plan = compile_plan(module, job, log)
        except RefusedError as error:
            return {"error": "refused", "message": str(error)}
        Path(job["plan"]).write_bytes(plan)
    except InputError as error:
        return {"error": "input", "message": str(error)}
    return {
        "version": module.__version__,
        "plan_bytes": len(plan),
        "seconds": round(time.monotonic() - started, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "layers": layers(log.lines),
        "gpu": gpu and {"compute_capability": gpu.compute_capability, "driver": gpu.driver},
    }


def make_log(module: Any) -> Any:
    """A logger that keeps, as ``lines`` of (severity, text), what is a warning or worse and what tells of layers."""

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.lines: list[tuple[int, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(module.ILogger.Severity.WARNING) or _LAYERS in message:
                self.lines.append((int(severity), message))

    return Log()


def compile_plan(module: ModuleType, job: Job, log: Any) -> bytes:
    """The serialised engine. Raises RefusedError with the first error of the parser or the last of the builder."""
    api: Any = module
    product = PRODUCTS[job["module"]]
    builder = api.Builder(log)
    network = builder.create_network(network_flags(api, product))
    parser = api.OnnxParser(network, log)
    if not parser.parse_from_file(job["graph"]):
        raise RefusedError(_parse_error(parser.get_error(0)))
    config = builder.create_builder_config()
    _configure(api, config, job)
    for phase in job["phases"]:
        profile = builder.create_optimization_profile()
        for name, shapes in phase["shapes"].items():
            profile.set_shape(name, *(tuple(shape) for shape in shapes))
        if config.add_optimization_profile(profile) < 0:
            raise RefusedError(f"the shapes of phase {phase['name']} do not fit the graph: {_last_error(api, log)}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusedError(_last_error(api, log))
    if job["timing_cache"]:
        Path(job["timing_cache"]).write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _configure(api: Any, config: Any, job: Job) -> None:
    config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, job["workspace_bytes"])
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    if job["level"] is not None:
        config.builder_optimization_level = job["level"]
    for option in job["options"]:
        if option == "hardware-compatible":
            config.hardware_compatibility_level = api.HardwareCompatibilityLevel.AMPERE_PLUS
        else:
            config.set_flag(getattr(api.BuilderFlag, option.replace("-", "_").upper()))
    if job["capabilities"]:
        _aim(api, config, job["capabilities"], PRODUCTS[job["module"]])
    if job["timing_cache"]:
        _reuse_timings(config, Path(job["timing_cache"]))


def _aim(api: Any, config: Any, wanted: list[str], product: Product) -> None:
    values = [capability(api, product, name) for name in wanted]
    config.num_compute_capabilities = len(values)
    for index, value in enumerate(values):
        if not config.set_compute_capability(value, index):
            raise RefusedError(f"compute capability {wanted[index]} cannot be set beside the others")


def _reuse_timings(config: Any, path: Path) -> None:
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(f"{path} is a timing cache of another version or GPU: remove it, or name another file")


def _parse_error(error: Any) -> str:
    where = f"at node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
    return where + one_line(error.desc())


def _last_error(api: Any, log: Any) -> str:
    errors = [text for severity, text in log.lines if severity <= int(api.ILogger.Severity.ERROR)]
    return one_line(errors[-1]) if errors else "it gave no reason"


def one_line(text: str) -> str:
    """A message of the compiler without its line breaks, addresses of help pages and everything behind 400 letters."""
    plain = re.sub(r"\s*\(See https?://\S+[^)]*\)", "", " ".join(text.split()))
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 1] + "…"


def layers(lines: list[tuple[int, str]]) -> list[dict[str, Any]] | None:
    """Name, type and types of the operands of each layer that the log tells of; None where it tells of none."""
    dumps = [text for _, text in lines if _LAYERS in text]
    if not dumps:
        return None
    return [
        {
            "name": found["name"],
            "type": found["type"],
            "operands": sorted(set(re.findall(r"Datatype: (\w+)", found["inputs"]))),
        }
        for found in _LAYER.finditer(dumps[-1])
    ]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
