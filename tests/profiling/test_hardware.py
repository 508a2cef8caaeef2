"""What is read of a machine, on texts of known machines; matching and building by instruction sets."""

from dataclasses import replace

import pytest

from slmdeploy.profiling import hardware
from slmdeploy.profiling.hardware import (
    Gpu,
    Machine,
    buildable,
    cgroup_cpu_quota,
    cgroup_memory_limit,
    clashes,
    detect,
    doctor,
    match_gpus,
    match_target,
    read_bandwidth,
    read_cpuinfo,
    read_gpus,
)
from slmdeploy.specs import Profile, Target

MACHINE = Machine(
    system="Linux",
    arch="x86_64",
    cpu="x",
    isa=frozenset({"avx2", "fma"}),
    physical_cores=4,
    logical_cores=8,
    affinity_cores=8,
    quota_cores=None,
    memory_bytes=100,
    memory_limit_bytes=None,
    read_bandwidth_bytes_per_s=1e10,
    python="3.11",
    engines={"onnxruntime": "1.31.1"},
)


def target(name, isa=(), arch="x86_64", engines=("onnxruntime",), **facts):
    return Target(name=name, summary="", kind="cpu", arch=arch, isa=isa, engines=engines, **facts)


def gpu_target(name, capability):
    return Target(name=name, summary="", kind="gpu", compute_capability=capability, engines=("tensorrt",))


def profile(isa=(), slow_without=()):
    return Profile.model_validate(
        {
            "name": "p",
            "summary": "",
            "engine": "onnxruntime",
            "weights": {"scheme": "fp32"},
            "requires": {"isa": isa, "slow_without": slow_without},
        }
    )


AVX2, VNNI = target("avx2", ["avx2"]), target("vnni", ["avx2", "avx512_vnni"])
ARM = target("arm", ["asimddp"], arch="aarch64")


def test_cpuinfo_of_x86_counts_physical_cores():
    block = "processor\t: {0}\nmodel name\t: Some CPU\nphysical id\t: 0\ncore id\t\t: {1}\nflags\t\t: fpu avx2\n"
    text = "\n".join(block.format(index, index // 2) for index in range(4))
    assert read_cpuinfo(text) == hardware.CpuInfo("Some CPU", frozenset({"fpu", "avx2"}), 2)


def test_cpuinfo_of_arm_and_of_nothing():
    text = "processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0c\n"
    assert read_cpuinfo(text) == hardware.CpuInfo(None, frozenset({"fp", "asimd", "asimddp"}), None)
    assert read_cpuinfo("") == hardware.CpuInfo(None, None, None)


@pytest.mark.parametrize(
    ("files", "membership", "quota", "memory"),
    [
        ({"cpu.max": "150000 100000", "memory.max": "4096"}, "0::/", 1.5, 4096),
        ({"cpu.max": "max 100000", "memory.max": "max"}, "0::/", None, None),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000", "a/b/memory.max": "10"}, "0::/a/b", 2.0, 10),
        ({"cpu.max": "100000 100000"}, "0::/not/seen/from/inside", 1.0, None),
        (
            {
                "cpu/cpu.cfs_quota_us": "50000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            "3:cpu,cpuacct:/x\n2:memory:/x",
            0.5,
            None,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", None, None),
        ({}, "", None, None),
    ],
)
def test_cgroup_limits(tmp_path, files, membership, quota, memory):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "self").write_text(membership)
    assert cgroup_cpu_quota(tmp_path, tmp_path / "self") == quota
    assert cgroup_memory_limit(tmp_path, tmp_path / "self") == memory


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


@pytest.mark.parametrize(
    ("wanted", "changes", "ok", "why"),
    [
        (profile(["avx2"]), {}, True, "all it needs is here"),
        (profile(["avx512_vnni"]), {}, False, "needs avx512_vnni, which this machine does not have"),
        (profile(slow_without=["avx512_vnni"]), {}, True, "runs, but slowly without avx512_vnni"),
        (profile(slow_without=["avx512_vnni", "x"]), {}, True, "runs, but slowly without avx512_vnni or x"),
        (profile(slow_without=["avx512_vnni", "avx2"]), {}, True, "all it needs is here"),
        (profile(), {"engines": {}}, False, "onnxruntime is not installed: pip install onnxruntime"),
        (profile(), {"engines": {"onnxruntime-gpu": "1.31"}}, True, "all it needs is here"),
        (profile(["avx2"]), {"isa": None}, True, "all it needs is here"),
    ],
)
def test_buildable(wanted, changes, ok, why):
    assert buildable([wanted], replace(MACHINE, **changes), AVX2) == [(wanted, ok, why)]


def test_an_engine_that_the_target_lacks():
    ((_, ok, why),) = buildable([profile()], MACHINE, gpu_target("gpu", "9.0"))
    assert (ok, why) == (False, "onnxruntime does not run on gpu, which has tensorrt")


def test_clash_of_flavours_gives_the_command():
    assert clashes({"onnxruntime": "1.31.1"}) == ()
    (problem,) = clashes({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"})
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime==1.31.1" in problem


def test_gpus_as_nvidia_smi_lists_them():
    text = "NVIDIA H100 80GB HBM3, 9.0, 81559\nNVIDIA T4, 7.5, 15360\n"
    h100, t4 = read_gpus(text)
    assert h100 == Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559 << 20)
    found = match_gpus(replace(MACHINE, gpus=(h100, t4)), [AVX2, gpu_target("hopper", "9.0")])
    assert [gpu["target"] for gpu in found] == ["hopper", None]
    assert read_gpus("No devices were found\n") == ()


def test_a_system_that_tells_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_text", lambda path: "")
    monkeypatch.setattr(hardware.platform, "system", lambda: "Windows")
    monkeypatch.setattr(hardware.os, "sysconf_names", {})
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    machine = detect(bandwidth=False)
    assert (machine.isa, machine.memory_bytes, machine.quota_cores, machine.gpus) == (None, None, None, ())
    assert machine.threads >= 1


def test_mac_features_become_linux_names(monkeypatch):
    values = {"hw.optional.AdvSIMD": "1", "hw.optional.arm.FEAT_DotProd": "1", "hw.optional.arm.FEAT_I8MM": "0"}
    monkeypatch.setattr(hardware.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(hardware, "_sysctl", values.get)
    assert hardware._mac_isa() == {"asimd", "asimddp"}


def test_bandwidth_is_plausible(monkeypatch):
    monkeypatch.setattr(hardware, "_BANDWIDTH_SECONDS", 0.02)
    assert 1e8 < read_bandwidth(1, 256 << 20) < 1e13


def test_doctor_names_target_profiles_and_problems(monkeypatch):
    monkeypatch.setattr(hardware, "detect", lambda: replace(MACHINE, problems=("two flavours",)))
    report = doctor([AVX2, VNNI], [profile(["avx512_vnni"])])
    assert (report["target"], report["target_reason"]) == ("avx2", "x86_64 with avx2")
    assert report["profiles"] == [
        {"name": "p", "buildable": False, "reason": "needs avx512_vnni, which this machine does not have"}
    ]
    assert report["problems"] == ["two flavours"]
    assert report["machine"]["isa"] == ["avx2", "fma"]
