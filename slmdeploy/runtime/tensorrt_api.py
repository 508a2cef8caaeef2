"""The Python bindings of TensorRT as this project uses them: which products there are, and what differs between them.

    tensorrt       compiles for the GPU it runs on; versions 10 and 11
    tensorrt_rtx   TensorRT for RTX: compiles ahead of time for a compute capability, on any machine

Both have one API, so all code takes the module as a parameter and every name it uses is in NAMES: where one is missing
that is one sentence instead of an AttributeError. Differences between versions are in this file alone. Knows nothing of
graphs, plans or sessions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from .errors import InputError

_TYPED_ALWAYS = 11
"""From this version of TensorRT on a network takes its types from the graph, and there is no flag to ask for it."""


@dataclass(frozen=True)
class Product:
    """One of the compilers; ``majors`` are the versions that this code was written for."""

    module: str
    title: str
    command: str
    majors: tuple[int, ...]
    ahead_of_time: bool
    """Whether it compiles for a compute capability that is not here."""


PRODUCTS: Mapping[str, Product] = {
    product.module: product
    for product in (
        Product("tensorrt", "TensorRT", "pip install tensorrt", (10, 11), ahead_of_time=False),
        Product("tensorrt_rtx", "TensorRT for RTX", "pip install 'slmdeploy[tensorrt]'", (1,), ahead_of_time=True),
    )
}

COMPILING: Mapping[str, tuple[str, ...]] = {
    "": ("__version__",),
    "ILogger": ("log", "Severity"),
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "INetworkDefinition": ("num_inputs", "get_input"),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("node_name", "node_operator", "desc"),
    "IBuilderConfig": (
        "set_memory_pool_limit",
        "builder_optimization_level",
        "profiling_verbosity",
        "add_optimization_profile",
        "set_flag",
        "hardware_compatibility_level",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
    ),
    "IOptimizationProfile": ("set_shape",),
    "MemoryPoolType": ("WORKSPACE",),
    "ProfilingVerbosity": ("DETAILED", "LAYER_NAMES_ONLY"),
    "BuilderFlag": ("VERSION_COMPATIBLE", "WEIGHT_STREAMING"),
    "HardwareCompatibilityLevel": ("NONE", "AMPERE_PLUS"),
}
RUNNING: Mapping[str, tuple[str, ...]] = {
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context",
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_mode",
        "get_tensor_dtype",
        "get_tensor_shape",
        "num_optimization_profiles",
    ),
    "IExecutionContext": (
        "set_optimization_profile_async",
        "set_input_shape",
        "get_tensor_shape",
        "set_tensor_address",
        "execute_async_v3",
    ),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "DataType": ("FLOAT", "HALF", "INT64"),
}
AHEAD_OF_TIME: Mapping[str, tuple[str, ...]] = {
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ComputeCapability": (),
}


def load(name: str) -> ModuleType:
    """The module of a product. Raises InputError where it is not installed, is of another major or lacks a name."""
    product = PRODUCTS[name]
    try:
        module = import_module(name)
    except (ImportError, OSError) as error:  # bindings without their libraries raise either
        raise InputError(
            f"{product.title} cannot be used here ({' '.join(str(error).split())[:120]}): {product.command}"
        ) from error
    check(module, product)
    return module


def check(module: ModuleType, product: Product) -> None:
    """Raise InputError unless ``module`` has a known major version and every name that is used of it."""
    version = getattr(module, "__version__", "0")
    if major(module) not in product.majors:
        known = " or ".join(map(str, product.majors))
        raise InputError(f"{product.title} {version} is installed, and slmdeploy works with version {known}")
    missing = missing_names(module, product)
    if missing:
        raise InputError(
            f"{product.title} {version} has no {missing[0]}, which slmdeploy needs: install another version"
        )


def missing_names(module: ModuleType, product: Product) -> list[str]:
    """Names that are used and that ``module`` does not have, as ``Class.member``."""
    wanted = [COMPILING, RUNNING, *([AHEAD_OF_TIME] if product.ahead_of_time else [])]
    found = []
    for owner, members in (item for names in wanted for item in names.items()):
        holder = getattr(module, owner, None) if owner else module
        if holder is None:
            found.append(owner)
        else:
            found += [f"{owner}.{member}".lstrip(".") for member in members if not hasattr(holder, member)]
    return found


def major(module: ModuleType) -> int:
    """The first number of the version, 0 for one that cannot be read."""
    first = str(getattr(module, "__version__", "0")).split(".")[0]
    return int(first) if first.isdigit() else 0


def network_flags(module: Any, product: Product) -> int:
    """What create_network takes so that types come from the graph."""
    if product.module == "tensorrt" and major(module) >= _TYPED_ALWAYS:
        return 0
    return 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def capabilities(module: Any) -> dict[str, Any]:
    """The compute capabilities that a product compiles for ahead of time, ``8.9`` and so on, with their values."""
    names = [name for name in dir(module.ComputeCapability) if name.startswith("SM") and name[2:].isdigit()]
    return {f"{name[2:-1]}.{name[-1]}": getattr(module.ComputeCapability, name) for name in names}


def capability(module: Any, product: Product, name: str) -> Any:
    """The value of a compute capability such as ``8.9``; InputError where the product does not compile for it."""
    known = capabilities(module)
    if name not in known:
        raise InputError(
            f"{product.title} {module.__version__} does not compile for compute capability {name} (it does for "
            f"{', '.join(sorted(known, key=float))}): choose another target or profile"
        )
    return known[name]
