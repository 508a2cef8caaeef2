"""Which part of ONNX Runtime runs a graph: the kernels for a CPU or for CUDA, or a compiler of NVIDIA's behind it.

    cpu, cuda                 kernel by kernel
    tensorrt, tensorrt_rtx    the graph is compiled when it is opened, as a whole or not at all

A provider that is not there, or does not start, is one sentence with the remedy: the CPU never takes its place unasked.
That of TensorRT for RTX may be part of ONNX Runtime or a plug-in of its own, which NVIDIA ships for any ONNX Runtime
from 1.24 on. Written to the API; refusals and options are tested without a GPU, **nothing was run on one yet**. Knows
nothing of tokens, and of options only that they are names with strings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxruntime as ort

from .errors import InputError

_WHOLE = "session.disable_cpu_ep_fallback"
"""Makes ONNX Runtime refuse a session of which the CPU would have to run a part."""
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


@dataclass(frozen=True)
class Provider:
    """A provider of ONNX Runtime's: its name there, how people name it, what brings it, and what it needs to start."""

    name: str
    title: str
    command: str
    needs: str
    compiles: bool = False
    plugin: str | None = None
    """The package that adds it to an ONNX Runtime without it."""


_CPU = Provider("CPUExecutionProvider", "CPU", "", "")
PROVIDERS: Mapping[str, Provider] = {
    "cpu": _CPU,
    "cuda": Provider(
        "CUDAExecutionProvider",
        "CUDA",
        "install onnxruntime-gpu instead",
        "see that the driver, CUDA and cuDNN of this onnxruntime-gpu are installed",
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        "TensorRT",
        "install onnxruntime-gpu instead, and the TensorRT that it names",
        "see that the driver, CUDA and the TensorRT of this onnxruntime-gpu are installed",
        compiles=True,
    ),
    "tensorrt_rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "TensorRT for RTX",
        "pip install onnxruntime-ep-nv-tensorrt-rtx",
        "see that the driver of an NVIDIA RTX GPU is installed",
        compiles=True,
        plugin=_PLUGIN,
    ),
}
"""By what runtime.json calls them."""


def missing(key: str) -> str | None:
    """Why this ONNX Runtime has no such provider, as a sentence with the remedy; None where it has."""
    provider = PROVIDERS[key]
    if provider.name in ort.get_available_providers() or _plugin(provider) is not None:
        return None
    return f"this ONNX Runtime has no {provider.title} provider: {provider.command}"


def require(path: Path, key: str) -> None:
    """Raise InputError where the provider that ``path`` runs with is missing."""
    if reason := missing(key):
        raise InputError(f"{path} runs on an NVIDIA GPU and {reason}.")


def attach(path: Path, key: str, options: ort.SessionOptions, settings: Mapping[str, str]) -> list[Any]:
    """What InferenceSession takes as ``providers`` so that this one runs ``path``; a plug-in goes into ``options``.

    settings: the provider's own options. Raises InputError where the provider is missing or its plug-in does not start.
    """
    provider = PROVIDERS[key]
    if key == "cpu":
        return [provider.name]
    require(path, key)
    if not provider.compiles:
        return [provider.name, _CPU.name]
    options.add_session_config_entry(_WHOLE, "1")
    if provider.name in ort.get_available_providers():
        return [(provider.name, dict(settings))]
    options.add_provider_for_devices(_devices(path, provider), dict(settings))
    return []


def not_started(path: Path, provider: Provider, said: str = "") -> InputError:
    """That a provider which is there does not run a graph; ``said`` are ONNX Runtime's own words."""
    what = "does not start here, or does not take the whole graph," if provider.compiles else "does not start here,"
    reason = f" (ONNX Runtime says: {' '.join(said.split())[:240]})" if said else ""
    return InputError(
        f"{path} runs on an NVIDIA GPU, and ONNX Runtime's {provider.title} provider {what} which would leave it to "
        f"the CPU: {provider.needs}{reason}."
    )


def _plugin(provider: Provider) -> Any | None:
    """The package of a provider that is a plug-in, None where it is not installed or there is none."""
    try:
        return import_module(provider.plugin) if provider.plugin else None
    except (ImportError, OSError):  # libraries that do not load raise either
        return None


def _devices(path: Path, provider: Provider) -> list[Any]:
    """The first GPU that a plug-in finds, its library registered once in a process."""
    plugin = _plugin(provider)
    assert plugin is not None, "missing() has looked"
    found = _found(provider)
    if not found:
        try:
            ort.register_execution_provider_library(provider.name, plugin.get_library_path())
        except Exception as error:  # a library that does not load raises ONNX Runtime's own kinds, which have no base
            raise not_started(path, provider, str(error)) from error
        found = _found(provider)
    if not found:
        raise not_started(path, provider)
    return found[:1]


def _found(provider: Provider) -> list[Any]:
    return [device for device in ort.get_ep_devices() if device.ep_name == provider.name]
