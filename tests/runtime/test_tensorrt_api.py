"""Names that are used of NVIDIA's bindings exist in them; versions, and differences between them."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from slmdeploy.errors import InputError, ResourceError
from slmdeploy.runtime import cuda_device, tensorrt_api
from slmdeploy.runtime.tensorrt_api import PRODUCTS


def test_every_name_that_is_used_is_in_the_bindings() -> None:
    module = pytest.importorskip("tensorrt_rtx")
    assert tensorrt_api.missing_names(module, PRODUCTS["tensorrt_rtx"]) == []
    # The two products share their API but for compiling ahead of time, so this stands for the other one too.
    assert tensorrt_api.missing_names(module, PRODUCTS["tensorrt"]) == []
    assert tensorrt_api.load("tensorrt_rtx") is module
    assert {"7.5", "8.9", "12.0"} <= set(tensorrt_api.capabilities(module))


def test_every_name_that_is_used_is_in_cuda_bindings() -> None:
    api = pytest.importorskip("cuda.bindings.runtime")
    assert [name for name in cuda_device.NAMES if not hasattr(api, name)] == []
    kinds, modes, attributes = api.cudaMemcpyKind, api.cudaStreamCaptureMode, api.cudaDeviceAttr
    assert hasattr(kinds, "cudaMemcpyHostToDevice")
    assert hasattr(kinds, "cudaMemcpyDeviceToHost")
    assert hasattr(modes, "cudaStreamCaptureModeThreadLocal")
    assert hasattr(attributes, "cudaDevAttrComputeCapabilityMajor")
    assert hasattr(attributes, "cudaDevAttrComputeCapabilityMinor")


def bindings(version: str) -> Any:
    module = ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    return module


def test_another_major_version_is_refused() -> None:
    with pytest.raises(InputError, match=r"TensorRT 9\.3 is installed, and slmdeploy works with version 10 or 11"):
        tensorrt_api.check(bindings("9.3"), PRODUCTS["tensorrt"])


def test_a_missing_name_is_a_sentence() -> None:
    with pytest.raises(InputError, match=r"TensorRT 11\.4 has no ILogger, which slmdeploy needs"):
        tensorrt_api.check(bindings("11.4"), PRODUCTS["tensorrt"])


@pytest.mark.parametrize(("name", "version", "flags"), [("tensorrt", "10.9", 2), ("tensorrt", "11.4", 0)])
def test_only_versions_before_11_are_told_to_take_types_from_the_graph(name: str, version: str, flags: int) -> None:
    module = SimpleNamespace(__version__=version, NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1))
    assert tensorrt_api.network_flags(module, PRODUCTS[name]) == flags


def test_errors_of_cuda_become_sentences() -> None:
    class Error(int):
        name = "cudaErrorMemoryAllocation"

    assert cuda_device.checked(None, (0, 7)) == 7
    with pytest.raises(ResourceError, match="not enough free memory"):
        cuda_device.checked(None, (Error(2), None))
    with pytest.raises(ResourceError, match="refused a call"):
        cuda_device.checked(None, (9, None))


def test_a_machine_without_a_driver_has_no_gpu() -> None:
    assert cuda_device.find_gpu(SimpleNamespace(cudaGetDeviceCount=lambda: (35, None))) is None
