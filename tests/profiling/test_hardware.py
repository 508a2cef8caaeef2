"""The machine as a noun, and the target that it matches."""

import json
from dataclasses import replace

import pytest

from slmdeploy.profiling import cpu, gpu, hardware, microbench
from slmdeploy.profiling.hardware import Gpu, detect, match_gpus, match_target
from tests.profiling.machines import MACHINE, gpu_target, target

AVX2, VNNI = target("avx2", ["avx2"]), target("vnni", ["avx2", "avx512_vnni"])
ARM = target("arm", ["asimddp"], arch="aarch64")


@pytest.mark.parametrize(
    ("changes", "threads"),
    [
        ({}, 4),
        ({"affinity_cores": 2}, 2),
        ({"quota_cores": 1.5}, 1),
        ({"quota_cores": 0.5}, 1),
        ({"physical_cores": None}, 8),
    ],
)
def test_threads(changes, threads):
    assert replace(MACHINE, **changes).threads == threads


def test_usable_memory():
    assert MACHINE.usable_memory_bytes == 100
    assert replace(MACHINE, memory_limit_bytes=50).usable_memory_bytes == 50
    assert replace(MACHINE, memory_bytes=None).usable_memory_bytes is None


def test_the_most_capable_target_whose_instructions_are_all_here():
    assert match_target(MACHINE, [VNNI, AVX2, ARM])[0] == AVX2
    capable = replace(MACHINE, isa=frozenset({"avx2", "avx512_vnni", "sse"}))
    assert match_target(capable, [AVX2, VNNI]) == (VNNI, "x86_64 with avx2, avx512_vnni")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"isa": frozenset()}, "avx2 needs avx2; vnni needs avx2, avx512_vnni"),
        ({"arch": "riscv64"}, "no target is for the architecture riscv64"),
        ({"isa": None}, "this system does not tell its instruction set, so name a target: avx2, vnni"),
    ],
)
def test_no_match_says_why(changes, reason):
    assert match_target(replace(MACHINE, **changes), [AVX2, VNNI, ARM]) == (None, reason)


def test_gpus_and_their_targets():
    h100, t4 = Gpu("NVIDIA H100", "9.0", 80 << 30), Gpu("NVIDIA T4", "7.5", 16 << 30)
    found = match_gpus(replace(MACHINE, gpus=(h100, t4)), [AVX2, gpu_target("hopper", "9.0")])
    assert [one["target"] for one in found] == ["hopper", None]


def test_a_system_that_tells_nothing(monkeypatch):
    monkeypatch.setattr(cpu, "text", lambda path: "")
    monkeypatch.setattr(cpu.platform, "system", lambda: "Windows")
    monkeypatch.setattr(cpu.os, "sysconf_names", {})
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    machine = detect(bench=False)
    assert (machine.isa, machine.memory_bytes, machine.quota_cores, machine.gpus) == (None, None, None, ())
    assert (machine.governor, machine.vendor, machine.hypervisor, machine.steal_share) == (None, None, None, None)
    assert machine.threads >= 1


def test_this_machine_as_json(monkeypatch):
    monkeypatch.setattr(microbench, "_SECONDS", 0.01)
    facts = json.loads(json.dumps(detect().to_dict()))
    figures = ("read_bandwidth_bytes_per_s", "fp32_peak_ops_per_s", "int8_peak_ops_per_s")
    assert all(facts[name] > 0 for name in figures)
    assert facts["threads"] >= 1
    assert hardware.engines().items() <= facts["engines"].items()


def test_nothing_is_measured_without_the_benchmark():
    assert detect(bench=False).read_bandwidth_bytes_per_s is None
