"""The acceptance of a GPU machine where there is none: what it says, and how it takes what is missing."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import gpu_acceptance
from slmdeploy.errors import InputError
from slmdeploy.profiling.gpu import Gpu
from slmdeploy.runtime import cuda_device, providers, tensorrt_api

GPU = Gpu(name="NVIDIA L40S", compute_capability="8.9", memory_bytes=48 << 30)


def test_without_a_gpu_it_says_so_in_a_sentence_and_checks_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_acceptance, "nvidia_gpus", tuple)
    report = gpu_acceptance.accept(Path("examples/teacher"), tmp_path, "generate-8-4")
    assert report["summary"].startswith("This machine has no NVIDIA GPU")
    assert set(report["names"]) == {"tensorrt", "tensorrt_rtx", "cuda.bindings"}
    assert (report["gpu"], report["failed"], list(tmp_path.iterdir())) == (None, [], [])
    assert "checks" not in report


def test_what_is_missing_is_left_out_with_its_reason_and_a_difference_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_acceptance, "nvidia_gpus", lambda: (GPU,))
    monkeypatch.setattr(gpu_acceptance, "lacking", lambda name, gpu: None if name == "torch FP8" else "there is none")
    monkeypatch.setattr(gpu_acceptance, "torch_products", lambda model: {"passed": False, "difference": 0.5})
    report = gpu_acceptance.accept(Path("examples/teacher"), tmp_path, "generate-8-4")
    assert report["summary"] == "NVIDIA L40S: 1 of 11 checks could be made, 1 failed."
    assert report["failed"] == ["torch FP8"]
    assert report["checks"]["cuda-int4"] == {"left_out": "there is none"}
    assert any(line == "torch FP8: failed {'difference': 0.5}" for line in gpu_acceptance.lines(report))


@pytest.mark.parametrize("error", [InputError("the plan\ndoes not run"), RuntimeError("the plan does not run")])
def test_an_error_of_a_check_that_could_be_made_is_a_failure_and_the_others_are_still_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(gpu_acceptance, "nvidia_gpus", lambda: (GPU,))
    monkeypatch.setattr(gpu_acceptance, "lacking", lambda name, gpu: None)
    monkeypatch.setattr(gpu_acceptance, "one_profile", broken)
    monkeypatch.setattr(gpu_acceptance, "torch_model", lambda model, compiled: {"ttft_ms": 1.0})
    monkeypatch.setattr(gpu_acceptance, "torch_products", lambda model: {"passed": True, "difference": 0.0})
    report = gpu_acceptance.accept(Path("examples/teacher"), tmp_path, "generate-8-4")
    assert report["failed"] == list(gpu_acceptance.PROFILES)
    assert report["checks"]["cuda-fp16"]["error"] == f"{type(error).__name__}: the plan does not run"
    assert "cuda-fp16: failed, " in "\n".join(gpu_acceptance.lines(report))
    assert report["checks"]["torch bf16"] == {"ttft_ms": 1.0}


def test_a_failure_ends_with_code_1_and_what_is_left_out_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", "--work", str(tmp_path)])
    for failed, code in (["torch FP8"], 1), ([], 0):
        report = {"summary": "done", "names": {}, "failed": failed}
        monkeypatch.setattr(gpu_acceptance, "accept", lambda *given, report=report: report)
        with pytest.raises(SystemExit) as ended:
            gpu_acceptance.main()
        assert ended.value.code == code
    assert capsys.readouterr().out == "done\ndone\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda-fp16", "no CUDA provider: install onnxruntime-gpu"),
        ("tensorrt-fp16", "TensorRT cannot be used here"),
        ("tensorrt-fp16-ort", "no TensorRT provider"),
        ("tensorrt-rtx-fp8-ort", "no TensorRT for RTX provider: pip install onnxruntime-ep-nv-tensorrt-rtx"),
    ],
)
def test_what_a_check_needs_is_looked_at_before_it(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> None:
        raise ImportError(module)

    for place in (tensorrt_api, providers):
        monkeypatch.setattr(place, "import_module", absent)
    assert reason in (gpu_acceptance.lacking(name, GPU) or "")


def test_torch_without_a_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_acceptance, "find_spec", lambda name: None)
    assert gpu_acceptance.lacking("torch bf16", GPU) == "torch and transformers are not installed"


def test_a_gpu_that_a_compiler_is_not_for_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "load", lambda name: SimpleNamespace(
        __version__="1.7.1", ComputeCapability=SimpleNamespace(SM89=89, SM120=120)
    ))  # fmt: skip
    monkeypatch.setattr(cuda_device, "runtime", lambda: None)
    hopper = replace(GPU, compute_capability="9.0")
    assert "does not compile for compute capability 9.0" in (gpu_acceptance.lacking("tensorrt-rtx-fp8", hopper) or "")
    assert gpu_acceptance.lacking("tensorrt-rtx-fp8", GPU) is None


def test_a_gpu_before_ada_has_no_fp8() -> None:
    old = Gpu(name="A100", compute_capability="8.0", memory_bytes=40 << 30)
    for name in ("tensorrt-fp8", "tensorrt-rtx-fp8-ort"):
        assert gpu_acceptance.lacking(name, old) == "compute capability 8.0 has no FP8"
    target = gpu_acceptance.target_of(GPU)
    assert target is not None
    assert target.compute_capability == "8.9"


def test_times_are_medians_after_warming_up() -> None:
    ticks = iter(np.arange(1000.0))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = next(ticks)

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    class Cuda:
        def __init__(self) -> None:
            self.Event, self.waits = Event, 0

        def synchronize(self) -> None:
            self.waits += 1

    class Torch:
        cuda = Cuda()

    calls: list[int] = []
    assert gpu_acceptance.timed(Torch, lambda: calls.append(1)) == 1.0
    assert len(calls) == Torch.cuda.waits == gpu_acceptance.WARM_UP + gpu_acceptance.ROUNDS
