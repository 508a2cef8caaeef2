"""What nvidia-smi prints, read; and machines without it."""

from slmdeploy.profiling import gpu
from slmdeploy.profiling.gpu import Gpu, nvidia_gpus, read_cuda, read_gpus

LISTED = "NVIDIA H100 80GB HBM3, 9.0, 81559, 570.86.15\nNVIDIA T4, 7.5, 15360, 570.86.15\n"
BANNER = "| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: 12.8     |\n"


def test_gpus_as_nvidia_smi_lists_them():
    h100, t4 = read_gpus(LISTED, "12.8")
    assert h100 == Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559 << 20, "570.86.15", "12.8")
    assert (t4.compute_capability, t4.cuda) == ("7.5", "12.8")
    assert read_gpus("No devices were found\n") == ()


def test_the_cuda_version_of_the_driver():
    assert read_cuda(BANNER) == "12.8"
    assert read_cuda("| CUDA Version: N/A |") is None


def put_smi(folder, monkeypatch, text):
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_machine_with_gpus(tmp_path, monkeypatch):
    put_smi(tmp_path, monkeypatch, f"test $# = 2 && printf '{LISTED}' || printf '{BANNER}'")
    assert [found.cuda for found in nvidia_gpus()] == ["12.8", "12.8"]


def test_no_program_no_driver_and_one_that_hangs(tmp_path, monkeypatch):
    put_smi(tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert nvidia_gpus() == ()
    put_smi(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(gpu, "_TIMEOUT_S", 0.05)
    assert nvidia_gpus() == ()
    (tmp_path / "nvidia-smi").unlink()
    assert nvidia_gpus() == ()
