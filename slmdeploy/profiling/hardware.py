"""What this machine is: instruction set, cores, limits, memory, bandwidth, engines; which target it matches, what runs.

Reads what the system tells (/proc, /sys, sysctl, nvidia-smi) and measures read bandwidth with numpy; works in
containers and needs no extra. What a system does not tell is None and is called unknown, never guessed: Windows does
not list its instruction set here. Engines are found by package metadata, so nothing heavy is imported.
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from slmdeploy.specs import Profile, Target

_ENGINES = ("onnxruntime", "tokenizers", "numpy", "torch", "transformers", "onnx", "onnx-ir", "openvino", "tensorrt")
_FLAVOURS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm")
"""Distributions that all install the Python package `onnxruntime`, so that only one of them may be there."""

_MAC_FEATURES = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
}
"""macOS sysctl names and the names that Linux gives the same instructions."""

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_BANDWIDTH_BYTES = 256 << 20
_BANDWIDTH_SECONDS = 0.4


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as nvidia-smi tells it."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """This machine; None means that the system does not tell. ``isa`` uses the names of Linux's /proc/cpuinfo."""

    system: str
    arch: str
    cpu: str | None
    isa: frozenset[str] | None
    physical_cores: int | None
    logical_cores: int
    affinity_cores: int
    quota_cores: float | None
    memory_bytes: int | None
    memory_limit_bytes: int | None
    read_bandwidth_bytes_per_s: float | None
    python: str
    engines: dict[str, str]
    problems: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = field(default=())

    @property
    def threads(self) -> int:
        """Threads that can run at once for good: physical cores within the affinity mask and the cgroup's quota."""
        cores = min(self.physical_cores or self.logical_cores, self.affinity_cores)
        return max(1, min(cores, int(self.quota_cores or cores)))

    @property
    def usable_memory_bytes(self) -> int | None:
        """Memory that the process may use: the machine's, or the cgroup's limit where that is lower."""
        known = [value for value in (self.memory_bytes, self.memory_limit_bytes) if value is not None]
        return min(known, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the derived fields."""
        isa = None if self.isa is None else sorted(self.isa)
        return {**asdict(self), "isa": isa, "threads": self.threads, "usable_memory_bytes": self.usable_memory_bytes}


def detect(*, bandwidth: bool = True) -> Machine:
    """Describe this machine; with ``bandwidth`` also measure how fast it reads memory (about half a second)."""
    cpuinfo = read_cpuinfo(_text(Path("/proc/cpuinfo")))
    memory = memory_bytes()
    limit = cgroup_memory_limit()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = [value for value in (memory, limit) if value]
    return Machine(
        system=platform.platform(),
        arch=_arch(platform.machine()),
        cpu=cpuinfo.model or _sysctl("machdep.cpu.brand_string"),
        isa=cpuinfo.flags or _mac_isa(),
        physical_cores=cpuinfo.physical_cores or _sysctl_int("hw.physicalcpu"),
        logical_cores=os.cpu_count() or 1,
        affinity_cores=cores,
        quota_cores=cgroup_cpu_quota(),
        memory_bytes=memory,
        memory_limit_bytes=limit,
        read_bandwidth_bytes_per_s=read_bandwidth(cores, min(known, default=None)) if bandwidth else None,
        python=platform.python_version(),
        engines=installed(_ENGINES + _FLAVOURS),
        problems=clashes(installed(_FLAVOURS)),
        gpus=nvidia_gpus(),
    )


@dataclass(frozen=True)
class CpuInfo:
    """What /proc/cpuinfo tells, None where it does not."""

    model: str | None
    flags: frozenset[str] | None
    physical_cores: int | None


def read_cpuinfo(text: str) -> CpuInfo:
    """Parse /proc/cpuinfo of x86 (``flags``) or Arm (``Features``); an empty text tells nothing."""
    blocks = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in text.strip().split("\n\n")
        if "processor" in block
    ]
    if not blocks:
        return CpuInfo(None, None, None)
    flags = blocks[0].get("flags") or blocks[0].get("Features")
    pairs = {
        (block["physical id"], block["core id"]) for block in blocks if "core id" in block and "physical id" in block
    }
    return CpuInfo(blocks[0].get("model name"), frozenset(flags.split()) if flags else None, len(pairs) or None)


def _arch(machine: str) -> str:
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _sysctl(name: str) -> str | None:
    if platform.system() != "Darwin":
        return None
    run = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=10, check=False)
    return run.stdout.strip() or None


def _sysctl_int(name: str) -> int | None:
    value = _sysctl(name)
    return int(value) if value else None


def _mac_isa() -> frozenset[str] | None:
    if platform.system() != "Darwin":
        return None
    return frozenset(flag for name, flag in _MAC_FEATURES.items() if _sysctl(name) == "1")


def memory_bytes() -> int | None:
    """The machine's memory, None where the system does not tell it this way (Windows)."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cgroup_cpu_quota(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float | None:
    """CPUs that the process's cgroup and those above it (v2, else v1) let it use on average, None without a limit."""
    quotas = []
    for folder in _cgroups(root, "cpu", membership):
        words = _text(folder / "cpu.max").split()
        words = words or [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if all(word.isdigit() and int(word) > 0 for word in words):  # else "max", -1 or no such file: no limit here
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def cgroup_memory_limit(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes that the process's cgroup and those above it (v2, else v1) allow, None without a limit."""
    texts = [
        (_text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")).strip()
        for folder in _cgroups(root, "memory", membership)
    ]
    # v1 has no word for "no limit": it gives the largest multiple of a page that 63 bits hold.
    return min((int(text) for text in texts if text.isdigit() and int(text) < 1 << 62), default=None)


def _cgroups(root: Path, controller: str, membership: Path) -> list[Path]:
    """The folders whose limits apply: the process's group and all above it, of v2 and of v1's ``controller``."""
    found = []
    for line in _text(membership).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        inner = top / group.strip("/")
        # In a container the group's path is often the host's and not visible: the top is then the container's own.
        found += [inner, *(parent for parent in inner.parents if parent == top or top in parent.parents)]
    return found


def read_bandwidth(threads: int, memory: int | None) -> float:
    """Bytes per second that ``threads`` threads together read from memory; the best of several passes.

    The arrays are larger than the caches of most machines, so a very large shared cache makes it too high. numpy
    releases the interpreter while it reduces.
    """
    total = min(_BANDWIDTH_BYTES, (memory or 4 * _BANDWIDTH_BYTES) // 4)
    parts = [np.ones(max(1, total // threads // 8), np.int64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        until = time.perf_counter() + _BANDWIDTH_SECONDS
        while time.perf_counter() < until:
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - started))
    return best


def installed(names: Sequence[str]) -> dict[str, str]:
    """Version of each distribution of ``names`` that is installed."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def clashes(flavours: dict[str, str]) -> tuple[str, ...]:
    """A sentence with the command that mends it, when more than one flavour of ONNX Runtime is installed."""
    if len(flavours) < 2:
        return ()
    wanted = flavours.get("onnxruntime") or next(iter(flavours.values()))
    return (
        f"{' and '.join(flavours)} overwrite each other's files: pip uninstall -y {' '.join(flavours)} && "
        f"pip install onnxruntime=={wanted}",
    )


def nvidia_gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; none where it is not installed or finds no driver."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    run = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return read_gpus(run.stdout) if run.returncode == 0 else ()


def read_gpus(text: str) -> tuple[Gpu, ...]:
    """Parse nvidia-smi's lines `name, compute capability, MiB`."""
    rows = re.findall(r"^(.+), (\d+\.\d+), (\d+)$", text, re.MULTILINE)
    return tuple(Gpu(name.strip(), capability, int(mib) << 20) for name, capability, mib in rows)


def match_target(machine: Machine, targets: Sequence[Target]) -> tuple[Target | None, str]:
    """The most capable CPU target whose instructions this machine all has, and why; None and why when there is none."""
    same = [target for target in targets if target.kind == "cpu" and target.arch == machine.arch]
    if not same:
        return None, f"no target is for the architecture {machine.arch}"
    if machine.isa is None:
        return None, f"this system does not tell its instruction set, so name a target: {_names(same)}"
    fitting = [target for target in same if machine.isa.issuperset(target.isa)]
    if not fitting:
        missing = {target.name: sorted(set(target.isa) - machine.isa) for target in same}
        return None, "; ".join(f"{name} needs {', '.join(flags)}" for name, flags in missing.items())
    best = max(fitting, key=lambda target: (len(target.isa), target.name))
    return best, f"{machine.arch} with {', '.join(best.isa) or 'no special instructions'}"


def match_gpus(machine: Machine, targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Each GPU with the target of its compute capability, None where no target has it."""
    by_capability = {target.compute_capability: target.name for target in targets if target.kind == "gpu"}
    return [{**asdict(gpu), "target": by_capability.get(gpu.compute_capability)} for gpu in machine.gpus]


def buildable(profiles: Sequence[Profile], machine: Machine, target: Target | None) -> list[tuple[Profile, bool, str]]:
    """For each profile whether it can be built and run here, and why (not); a slow one can, and the reason says so.

    Where the system does not tell its instruction set, the target's counts.
    """
    isa = machine.isa if machine.isa is not None else frozenset(target.isa if target else ())
    return [(profile, *_judge(profile, isa, machine.engines, target)) for profile in profiles]


def _judge(profile: Profile, isa: frozenset[str], engines: dict[str, str], target: Target | None) -> tuple[bool, str]:
    missing = [flag for flag in profile.requires.isa if flag not in isa]
    if missing:
        return False, f"needs {', '.join(missing)}, which this machine does not have"
    if target is not None and profile.engine not in target.engines:
        return False, f"{profile.engine} does not run on {target.name}, which has {', '.join(target.engines)}"
    if not any(name in engines for name in (_FLAVOURS if profile.engine == "onnxruntime" else (profile.engine,))):
        return False, f"{profile.engine} is not installed: pip install {profile.engine}"
    fast = profile.requires.slow_without
    slow = fast and isa.isdisjoint(fast)
    return True, f"runs, but slowly without {' or '.join(fast)}" if slow else "all it needs is here"


def doctor(targets: Sequence[Target], profiles: Sequence[Profile]) -> dict[str, Any]:
    """The report of `slmdeploy doctor`: the machine, its target and why, what can be built here, and problems."""
    machine = detect()
    target, reason = match_target(machine, targets)
    return {
        "machine": machine.to_dict(),
        "target": target.name if target else None,
        "target_reason": reason,
        "gpus": match_gpus(machine, targets),
        "profiles": [
            {"name": profile.name, "buildable": ok, "reason": why}
            for profile, ok, why in buildable(profiles, machine, target)
        ],
        "problems": list(machine.problems),
    }


def _names(targets: Sequence[Target]) -> str:
    return ", ".join(sorted(target.name for target in targets))
