"""What the system tells of this machine's processor and memory: instructions, cores, caches, governor, limits.

Reads /proc, /sys and cgroups on Linux and sysctl on macOS. What a system does not tell is None or empty and never
guessed: Windows tells nothing of this but its number of CPUs, and virtual machines mostly hide the governor. Measures
nothing (microbench.py) and knows no target (hardware.py).
"""

import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAC_FEATURES = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
}
"""macOS sysctl names and the names that Linux gives the same instructions."""

_MAC_CACHES = ((1, "data", "hw.l1dcachesize"), (2, "unified", "hw.l2cachesize"), (3, "unified", "hw.l3cachesize"))
_CPUS = Path("/sys/devices/system/cpu")
_DMI = Path("/sys/class/dmi/id")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class CpuInfo:
    """What /proc/cpuinfo tells, None where it does not."""

    model: str | None
    flags: frozenset[str] | None
    physical_cores: int | None


@dataclass(frozen=True)
class Cache:
    """One cache as one core sees it; ``shared_by`` counts the CPUs that share it, None where it is not told."""

    level: int
    kind: str
    bytes: int
    shared_by: int | None


def text(path: Path) -> str:
    """The file's text, empty where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_cpuinfo(content: str) -> CpuInfo:
    """Parse /proc/cpuinfo of x86 (``flags``) or Arm (``Features``); an empty text tells nothing."""
    blocks = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in content.strip().split("\n\n")
        if "processor" in block
    ]
    if not blocks:
        return CpuInfo(None, None, None)
    flags = blocks[0].get("flags") or blocks[0].get("Features")
    pairs = {
        (block["physical id"], block["core id"]) for block in blocks if "core id" in block and "physical id" in block
    }
    return CpuInfo(blocks[0].get("model name"), frozenset(flags.split()) if flags else None, len(pairs) or None)


def cpuinfo() -> CpuInfo:
    """`read_cpuinfo` of this machine, or what sysctl tells in its place."""
    found = read_cpuinfo(text(Path("/proc/cpuinfo")))
    return CpuInfo(
        found.model or _sysctl("machdep.cpu.brand_string"),
        found.flags or mac_isa(),
        found.physical_cores or _sysctl_int("hw.physicalcpu"),
    )


def affinity_cores() -> int:
    """CPUs that this process may be scheduled on; all of them where the system has no affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def caches(root: Path = _CPUS) -> tuple[Cache, ...]:
    """The data and unified caches of the first CPU by level; those of instructions are left out."""
    found = [_cache(folder) for folder in sorted((root / "cpu0" / "cache").glob("index*"))]
    mac = [Cache(level, kind, size, None) for level, kind, name in _MAC_CACHES if (size := _sysctl_int(name))]
    return tuple(cache for cache in found if cache) or tuple(mac)


def _cache(folder: Path) -> Cache | None:
    level, kind, size, shared = (text(folder / name).strip() for name in ("level", "type", "size", "shared_cpu_list"))
    if not level.isdigit() or kind not in ("Data", "Unified") or not size[:-1].isdigit():
        return None
    sharers = sum(1 for _ in cpu_list(shared)) if shared else None
    return Cache(int(level), kind.lower(), int(size[:-1]) * _UNITS.get(size[-1], 0), sharers)


def cpu_list(ranges: str) -> Iterator[int]:
    """CPU numbers of a list as the kernel writes it.

    >>> list(cpu_list("0-2,8"))
    [0, 1, 2, 8]
    """
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def last_level_bytes(found: tuple[Cache, ...]) -> int | None:
    """Bytes of the largest cache that one core reaches, None where no cache is told."""
    return max((cache.bytes for cache in found), default=None)


def governor(root: Path = _CPUS) -> str | None:
    """The frequency governor of the first CPU, None where the machine shows none (most virtual machines)."""
    return text(root / "cpu0" / "cpufreq" / "scaling_governor").strip() or None


def hypervisor(flags: frozenset[str] | None) -> bool | None:
    """Whether the CPU says that it is a virtual machine's; None where its flags are not told or are not x86's."""
    return None if flags is None or "fpu" not in flags else "hypervisor" in flags


def vendor(root: Path = _DMI) -> str | None:
    """Maker and product of the machine as its firmware gives them: a cloud's instance type stands here."""
    words = [text(root / name).strip() for name in ("sys_vendor", "product_name")]
    return " ".join(word for word in words if word) or None


def steal_share(stat: Path = Path("/proc/stat")) -> float | None:
    """Share of the CPU time since the machine started that its hypervisor gave to others; None where not told."""
    spent = [int(word) for word in text(stat).partition("\n")[0].split()[1:9]]
    total = sum(spent)
    return spent[7] / total if len(spent) == 8 and total else None


def memory_bytes() -> int | None:
    """The machine's memory, None where the system does not tell it this way (Windows)."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cgroup_cpu_quota(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float | None:
    """CPUs that the process's cgroup and those above it (v2, else v1) let it use on average, None without a limit."""
    quotas = []
    for folder in _cgroups(root, "cpu", membership):
        words = text(folder / "cpu.max").split()
        words = words or [text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if all(word.isdigit() and int(word) > 0 for word in words):  # else "max", -1 or no such file: no limit here
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def cgroup_memory_limit(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes that the process's cgroup and those above it (v2, else v1) allow, None without a limit."""
    limits = [
        (text(folder / "memory.max") or text(folder / "memory.limit_in_bytes")).strip()
        for folder in _cgroups(root, "memory", membership)
    ]
    # v1 has no word for "no limit": it gives the largest multiple of a page that 63 bits hold.
    return min((int(limit) for limit in limits if limit.isdigit() and int(limit) < 1 << 62), default=None)


def _cgroups(root: Path, controller: str, membership: Path) -> list[Path]:
    """The folders whose limits apply: the process's group and all above it, of v2 and of v1's ``controller``."""
    found = []
    for line in text(membership).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        inner = top / group.strip("/")
        # In a container the group's path is often the host's and not visible: the top is then the container's own.
        found += [inner, *(parent for parent in inner.parents if parent == top or top in parent.parents)]
    return found


def mac_isa() -> frozenset[str] | None:
    """What macOS tells of the instruction set in Linux's names, None on other systems."""
    if platform.system() != "Darwin":
        return None
    return frozenset(flag for name, flag in _MAC_FEATURES.items() if _sysctl(name) == "1")


def _sysctl(name: str) -> str | None:
    if platform.system() != "Darwin":
        return None
    run = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=10, check=False)
    return run.stdout.strip() or None


def _sysctl_int(name: str) -> int | None:
    value = _sysctl(name)
    return int(value) if value and value.isdigit() else None
