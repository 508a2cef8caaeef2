"""The acceptance of a GPU machine where there is none: what it says, and how it takes what is missing."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_acceptance
from slmdeploy.errors import InputError
from slmdeploy.profiling.gpu import Gpu

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
    def missing(*arguments: object, **options: object) -> None:
        raise InputError("there is none\nhere")

    monkeypatch.setattr(gpu_acceptance, "nvidia_gpus", lambda: (GPU,))
    monkeypatch.setattr(gpu_acceptance, "one_profile", missing)
    monkeypatch.setattr(gpu_acceptance, "torch_model", missing)
    monkeypatch.setattr(gpu_acceptance, "torch_products", lambda model, gpu: {"passed": False, "difference": 0.5})
    report = gpu_acceptance.accept(Path("examples/teacher"), tmp_path, "generate-8-4")
    assert report["summary"] == "NVIDIA L40S: 1 of 8 checks could be made, 1 failed."
    assert report["failed"] == ["torch FP8"]
    assert report["checks"]["cuda-int4"] == {"left_out": "InputError: there is none here"}
    assert any(line == "torch FP8: failed {'difference': 0.5}" for line in gpu_acceptance.lines(report))


def test_a_gpu_before_ada_has_no_fp8_products() -> None:
    old = Gpu(name="A100", compute_capability="8.0", memory_bytes=40 << 30)
    assert "has no FP8" in gpu_acceptance.torch_products(Path("nowhere"), old)["left_out"]
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
