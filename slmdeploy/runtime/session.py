"""ONNX Runtime sessions as this project runs them: options, load errors, interface check, bindings without copies.

Knows tensors by name and shape, nothing of tokens or sampling. What the options are for: without spinning threads
decode is 20 % slower where the cores are ours, but threads of a session that has just run must not keep those of the
next one (prompts, steps and scores may have one each) from the cores for long; memory patterns are off because every
step has another attention mask shape, and ONNX Runtime would plan and keep one pattern for each. A graph that does not
load, or whose inputs and outputs are not those that runtime.json calls for, is a CorruptArtifactError; nothing is
guessed.
"""

import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from .bundle import RuntimeConfig
from .errors import CorruptArtifactError, ResourceError
from .providers import PROVIDERS, attach, not_started

Array = npt.NDArray[np.floating] | npt.NDArray[np.int64]

_FATAL_ONLY = 4
_SPIN_US = "100"
"""Longer than the pause between two operators or two steps; ONNX Runtime's own default is many times that."""
_FEATURES: Mapping[str, bool] = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
"""The instruction sets that numpy has found by asking the processor; there is no public name for it."""
_FAILURES: tuple[type[Exception], ...] = (
    MemoryError,
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


def open_session(
    path: Path,
    *,
    threads: int,
    spinning: bool,
    as_written: bool = False,
    provider: str = "cpu",
    settings: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Load a graph; `threads` 0 leaves the number to ONNX Runtime (one per physical core).

    as_written: without fusions, which ONNX Runtime tries on FP8 too and has no kernels for. settings: the provider's
    own options. Raises InputError where the provider is missing or does not start.
    """
    options = ort.SessionOptions()
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    # ONNX Runtime would write its own lines to stderr beside the one sentence that we raise.
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    if not has_exact_products():
        # Products in wider numbers: right everywhere, but three times slower where the CPU has no need of it.
        options.add_session_config_entry("session.x64quantprecision", "1")
    providers = attach(path, provider, options, settings or {})
    wanted = PROVIDERS[provider]
    try:
        # With its fallback ONNX Runtime would print, and then leave the graph to the CPU.
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=False)
    except _FAILURES as error:
        found = _sentence(path, "does not load", error)
        if wanted.compiles and not isinstance(found, ResourceError):
            raise not_started(path, wanted, str(error)) from error
        raise found from error
    except (RuntimeError, ValueError) as error:  # a provider's own failures
        if provider == "cpu":
            raise
        raise not_started(path, wanted, str(error)) from error
    if session.get_providers()[0] != wanted.name:
        raise not_started(path, wanted)
    return session


@cache
def has_exact_products() -> bool:
    """Whether ONNX Runtime multiplies 8-bit numbers exactly on this CPU by itself: x86 without VNNI saturates.

    numpy asks the processor itself, so an emulated one is seen too, but it knows only the AVX-512 form of VNNI. The
    other form is taken from Linux's list where both agree that there is no AVX-512.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if _FEATURES.get("AVX512VNNI", False):
        return True
    flags = _linux_flags()
    return "avx_vnni" in flags and "avx512f" not in flags and not _FEATURES.get("AVX512F", False)


def _linux_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The instruction sets that Linux lists; empty elsewhere."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def _sentence(path: Path, what: str, error: Exception) -> CorruptArtifactError | ResourceError:
    reason = " ".join(str(error).split())[:240]
    if isinstance(error, MemoryError) or "bad_alloc" in reason or "allocate memory" in reason:
        return ResourceError(f"{path} {what}: there is not enough memory; free some or use a smaller model.")
    return CorruptArtifactError(f"{path} {what}; make or unpack it again (ONNX Runtime says: {reason}).")


def physical_cores() -> int:
    """Cores that this process may use, counting one for the hardware threads of a core; Linux only, else CPUs."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(allowed)
    return len(siblings)


def check_interface(
    session: ort.InferenceSession,
    path: Path,
    config: RuntimeConfig,
    inputs: Mapping[str, str],
    output: str,
    *,
    kv_rows: bool = False,
) -> None:
    """Refuse a graph whose inputs, outputs, element types or KV shapes are not those of runtime.json.

    inputs: names and element types of all inputs beside the past. kv_rows: the past is [1, length, heads x head_dim]
    rather than [batch, heads, length, head_dim].
    """
    cache = {"float32": "float"}.get(config.cache, config.cache)
    past, present = (dict.fromkeys(names, cache) for names in kv_names(config.layers))
    found_inputs = {node.name: node for node in session.get_inputs()}
    found_outputs = {node.name: node for node in session.get_outputs()}
    for found, wanted in ((found_inputs, dict(inputs) | past), (found_outputs, {output: "float"} | present)):
        if set(found) != set(wanted):
            odd = min(set(found) ^ set(wanted))
            state = "has an unexpected" if odd in found else "lacks the"
            raise CorruptArtifactError(f"{path} {state} input or output {odd}, by what runtime.json says; rebuild it.")
        for name, element in wanted.items():
            if found[name].type != f"tensor({element})":
                raise CorruptArtifactError(f"{path}: {name} is {found[name].type}, not tensor({element}); rebuild it.")
    for name, heads in zip(past, (heads for heads in config.kv_heads for _ in range(2)), strict=True):
        shape, dim = found_inputs[name].shape, config.head_dim
        wanted_shape = [1, "length", heads * dim] if kv_rows else ["batch", heads, "length", dim]
        fixed = [(found, size) for found, size in zip(shape, wanted_shape, strict=False) if isinstance(size, int)]
        if len(shape) != len(wanted_shape) or any(found not in (size, None) for found, size in fixed):
            expected = ", ".join(map(str, wanted_shape))
            raise CorruptArtifactError(
                f"{path}: {name} has shape {shape}, not [{expected}] as runtime.json says; rebuild it."
            )


def kv_names(layers: int) -> tuple[list[str], list[str]]:
    """Names of the past inputs and the present outputs: key and value of layer 0, of layer 1, …"""
    ends = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return [f"past_key_values.{end}" for end in ends], [f"present.{end}" for end in ends]


def as_value(array: Array) -> ort.OrtValue:
    """An OrtValue over the memory of a contiguous array, which it keeps alive: writing to one changes the other."""
    return ort.OrtValue.ortvalue_from_numpy(array)


class Binding:
    """Inputs and outputs of one session bound to memory of ours: what keeps its shape is bound once, not per run."""

    def __init__(self, session: ort.InferenceSession, path: Path) -> None:
        self._session, self._path = session, path
        self._binding = session.io_binding()

    def set_input(self, name: str, value: ort.OrtValue) -> None:
        """Read `name` from this memory in the runs to come."""
        self._binding.bind_ortvalue_input(name, value)

    def set_output(self, name: str, value: ort.OrtValue) -> None:
        """Write `name` into this memory in the runs to come; its shape must be the one that the graph computes."""
        self._binding.bind_ortvalue_output(name, value)

    def allocate_output(self, name: str, device: str = "cpu") -> None:
        """Let ONNX Runtime allocate `name` anew in each run to come, on "cpu" or "cuda"."""
        self._binding.bind_output(name, device)

    def outputs(self) -> list[ort.OrtValue]:
        """What the last run has written, in the order in which the outputs were bound."""
        values: list[ort.OrtValue] = self._binding.get_outputs()
        return values

    def clear_outputs(self) -> None:
        """Compute nothing that is not asked for anew."""
        self._binding.clear_binding_outputs()

    def run(self) -> None:
        """One run of the graph over what is bound."""
        try:
            self._session.run_with_iobinding(self._binding)
        except _FAILURES as error:
            raise _sentence(self._path, "does not run", error) from error
