"""Which engines are installed, in which versions, and which of them are in each other's way.

Reads the metadata of installed packages, so that nothing heavy is imported and a broken package is still named.
"""

import contextlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

_RUNS_PLANS = ("tensorrt", "tensorrt-rtx", "cuda-bindings")
ENGINES = ("tokenizers", "numpy", "torch", "transformers", "onnx", "onnx-ir", *_RUNS_PLANS)
FLAVOURS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": (
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-directml",
        "onnxruntime-openvino",
        "onnxruntime-rocm",
        "onnxruntime-qnn",
    ),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml"),
    "openvino": ("openvino", "openvino-nightly"),
}
"""By engine the distributions that install one and the same Python package, so that only one of them may be there."""


def installed(names: Sequence[str]) -> dict[str, str]:
    """Version of each distribution of ``names`` that is installed."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def engines() -> dict[str, str]:
    """Version of each engine, and of what builds and runs for it, that is installed here."""
    return installed([name for names in FLAVOURS.values() for name in names] + list(ENGINES))


def has_engine(name: str, found: Mapping[str, str]) -> bool:
    """Whether any flavour of the engine is among the installed packages."""
    return any(flavour in found for flavour in FLAVOURS.get(name, (name,)))


def clashes(found: Mapping[str, str]) -> tuple[str, ...]:
    """For each engine of which more than one flavour is installed, a sentence with the command that mends it."""
    here = [[name for name in names if name in found] for names in FLAVOURS.values()]
    return tuple(
        f"{' and '.join(names)} overwrite each other's files: pip uninstall -y {' '.join(names)} && "
        f"pip install {names[0]}=={found[names[0]]}"
        for names in here
        if len(names) > 1
    )
