"""ONNX Runtime's GPU providers without a GPU: what each is given, and refusals where one is missing or fails."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from slmdeploy.errors import InputError
from slmdeploy.runtime import bundle, providers
from slmdeploy.runtime.providers import PROVIDERS
from slmdeploy.runtime.session import open_session
from tests.runtime.test_provider_options import OPTIONS

TENSORRT = {
    "device_id", "trt_max_workspace_size", "trt_engine_cache_enable", "trt_engine_cache_path", "trt_fp16_enable",
    "trt_int8_enable", "trt_timing_cache_enable", "trt_timing_cache_path", "trt_builder_optimization_level",
    "trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes", "trt_cuda_graph_enable",
}  # fmt: skip
"""Names in ONNX Runtime's documentation of the provider."""
RTX = {
    "device_id", "nv_max_workspace_size", "nv_runtime_cache_path", "nv_profile_min_shapes", "nv_profile_opt_shapes",
    "nv_profile_max_shapes", "enable_cuda_graph", "nv_multi_profile_enable",
}  # fmt: skip
"""Names in the header that onnxruntime-ep-nv-tensorrt-rtx 0.5.0 ships."""


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """y = x + x."""
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Add", [x, x])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", x.shape, x.type
    made = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 21}, name="g")
    path = tmp_path / "model.onnx"
    ir.save(ir.Model(made, ir_version=10), path)
    return path


def opened(graph: Path, provider: str, settings: Mapping[str, str] | None = None) -> ort.InferenceSession:
    return open_session(graph, threads=1, spinning=False, provider=provider, settings=settings)


class Recorder:
    """InferenceSession's arguments, and a session that runs with the first of its providers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[SimpleNamespace] = []
        monkeypatch.setattr(ort, "InferenceSession", self)

    def __call__(self, path: str, options: ort.SessionOptions, **given: Any) -> Any:
        call = SimpleNamespace(options=options, **given)
        self.calls.append(call)
        first = call.providers[0] if call.providers else PROVIDERS["tensorrt_rtx"].name
        return SimpleNamespace(get_providers=lambda: [first[0] if isinstance(first, tuple) else first])


def test_the_names_are_those_that_runtime_json_may_have_and_onnxruntime_knows() -> None:
    assert tuple(PROVIDERS) == bundle.PROVIDERS
    assert {provider.name for provider in PROVIDERS.values()} <= set(ort.get_all_providers())


def test_a_graph_runs_on_the_cpu_without_ado(graph: Path) -> None:
    x = np.array([1, 2], np.float32)
    assert opened(graph, "cpu").run(None, {"x": x})[0].tolist() == [2, 4]


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("cuda", "no CUDA provider: install onnxruntime-gpu instead"),
        ("tensorrt", "no TensorRT provider: install onnxruntime-gpu instead, and the TensorRT that it names"),
        ("tensorrt_rtx", "no TensorRT for RTX provider: pip install onnxruntime-ep-nv-tensorrt-rtx"),
    ],
)
def test_a_provider_that_is_missing_is_one_sentence_with_the_remedy(
    graph: Path, key: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(providers, "import_module", absent)
    with pytest.raises(InputError, match=f"model.onnx runs on an NVIDIA GPU and this ONNX Runtime has {remedy}"):
        opened(graph, key)


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("key", ["cuda", "tensorrt", "tensorrt_rtx"])
def test_one_that_does_not_start_is_not_replaced_by_the_cpu(
    graph: Path, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # An onnxruntime-gpu without NVIDIA's libraries lists its providers and then leaves everything to the CPU.
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDERS[key].name, "CPUExecutionProvider"])
    with pytest.raises(InputError, match=rf"{PROVIDERS[key].title} provider does not start here.*leave it to the CPU"):
        opened(graph, key)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("key", "known"), [("tensorrt", TENSORRT), ("tensorrt_rtx", RTX)])
def test_the_options_of_a_phase_have_documented_names_and_go_to_the_provider_alone(
    graph: Path, key: str, known: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDERS[key].name, "CPUExecutionProvider"])
    settings = OPTIONS.of("decode", key, Path("/cache"))
    opened(graph, key, settings)
    (call,) = recorder.calls
    assert call.providers == [(PROVIDERS[key].name, settings)]
    assert call.enable_fallback is False
    assert call.options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert set(settings) <= known
    assert "/cache" in settings.values()
    assert str(1 << 30) in settings.values()


def test_cuda_keeps_the_cpu_beside_it(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    opened(graph, "cuda")
    assert recorder.calls[0].providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]


class Plugin:
    """A plug-in's package and ONNX Runtime's side of it: ``gpus`` are found once its library is registered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int, failure: Exception | None = None) -> None:
        self.registered: list[tuple[str, str]] = []
        self._gpus, self._failure = gpus, failure
        package = SimpleNamespace(get_library_path=lambda: "/lib/ep.so")
        monkeypatch.setattr(providers, "import_module", lambda name: package)
        monkeypatch.setattr(ort, "register_execution_provider_library", self._register)
        monkeypatch.setattr(ort, "get_ep_devices", self._devices)

    def _register(self, name: str, path: str) -> None:
        if self._failure:
            raise self._failure
        self.registered.append((name, path))

    def _devices(self) -> list[Any]:
        name = PROVIDERS["tensorrt_rtx"].name
        return [SimpleNamespace(ep_name=name, index=index) for index in range(self._gpus * len(self.registered))]


def test_a_plug_in_is_registered_once_and_given_its_first_gpu(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, given = Plugin(monkeypatch, gpus=2), []
    Recorder(monkeypatch)
    monkeypatch.setattr(
        ort.SessionOptions, "add_provider_for_devices", lambda self, devices, options: given.append((devices, options))
    )
    for _ in range(2):
        opened(graph, "tensorrt_rtx", {"enable_cuda_graph": "0"})
    assert plugin.registered == [(PROVIDERS["tensorrt_rtx"].name, "/lib/ep.so")]
    assert [(len(devices), devices[0].index, options) for devices, options in given] == [
        (1, 0, {"enable_cuda_graph": "0"})
    ] * 2


@pytest.mark.parametrize(
    ("failure", "said"), [(RuntimeError("libcuda.so.1: cannot open"), r"says: libcuda\.so\.1"), (None, "is installed")]
)
def test_a_plug_in_without_a_gpu_or_driver_is_refused(
    graph: Path, failure: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Plugin(monkeypatch, gpus=0, failure=failure)
    with pytest.raises(InputError, match=rf"TensorRT for RTX provider does not start here.*{said}"):
        opened(graph, "tensorrt_rtx")
