"""What is read of a processor and its limits, on texts and trees of known machines."""

import pytest

from slmdeploy.profiling import cpu
from slmdeploy.profiling.cpu import Cache, CpuInfo, cgroup_cpu_quota, cgroup_memory_limit, read_cpuinfo


def test_cpuinfo_of_x86_counts_physical_cores():
    block = "processor\t: {0}\nmodel name\t: Some CPU\nphysical id\t: 0\ncore id\t\t: {1}\nflags\t\t: fpu avx2\n"
    text = "\n".join(block.format(index, index // 2) for index in range(4))
    assert read_cpuinfo(text) == CpuInfo("Some CPU", frozenset({"fpu", "avx2"}), 2)


def test_cpuinfo_of_arm_and_of_nothing():
    text = "processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0c\n"
    assert read_cpuinfo(text) == CpuInfo(None, frozenset({"fp", "asimd", "asimddp"}), None)
    assert read_cpuinfo("") == CpuInfo(None, None, None)


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


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")


def test_caches_by_level_without_those_of_instructions(tmp_path):
    rows = [("1", "Data", "48K", "0"), ("1", "Instruction", "32K", "0"), ("3", "Unified", "32M", "0-3,8")]
    for index, row in enumerate(rows):
        names = ("level", "type", "size", "shared_cpu_list")
        write(tmp_path / f"cpu0/cache/index{index}", dict(zip(names, row, strict=True)))
    found = cpu.caches(tmp_path)
    assert found == (Cache(1, "data", 48 << 10, 1), Cache(3, "unified", 32 << 20, 5))
    assert cpu.last_level_bytes(found) == 32 << 20


def test_a_machine_that_shows_no_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu.platform, "system", lambda: "Linux")
    write(tmp_path / "cpu0/cache/index0", {"level": "1", "type": "Data"})
    assert cpu.caches(tmp_path) == ()
    assert cpu.last_level_bytes(()) is None


def test_governor_and_vendor_where_they_are_shown(tmp_path):
    assert (cpu.governor(tmp_path), cpu.vendor(tmp_path)) == (None, None)
    write(tmp_path, {"cpu0/cpufreq/scaling_governor": "powersave", "sys_vendor": "Amazon EC2", "product_name": "m7a"})
    assert (cpu.governor(tmp_path), cpu.vendor(tmp_path)) == ("powersave", "Amazon EC2 m7a")


@pytest.mark.parametrize(
    ("flags", "virtual"),
    [({"fpu", "hypervisor"}, True), ({"fpu"}, False), ({"asimd"}, None), (None, None)],
)
def test_whether_the_machine_is_virtual(flags, virtual):
    assert cpu.hypervisor(None if flags is None else frozenset(flags)) is virtual


def test_steal_is_a_share_of_all_time(tmp_path):
    (tmp_path / "stat").write_text("cpu  10 0 10 70 0 0 0 10 0 0\ncpu0 1 1\n")
    assert cpu.steal_share(tmp_path / "stat") == 0.1
    assert cpu.steal_share(tmp_path / "none") is None


def test_mac_features_become_linux_names(monkeypatch):
    values = {"hw.optional.AdvSIMD": "1", "hw.optional.arm.FEAT_DotProd": "1", "hw.optional.arm.FEAT_I8MM": "0"}
    monkeypatch.setattr(cpu.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(cpu, "_sysctl", values.get)
    assert cpu.mac_isa() == {"asimd", "asimddp"}
