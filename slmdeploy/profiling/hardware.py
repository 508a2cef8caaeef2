"""What this machine is, as one immutable noun, and which target it matches.

Puts together what the system tells (cpu.py, gpu.py), what is installed (engines.py) and what a short benchmark finds
(microbench.py); works in containers and needs no extra. What a system does not tell is None and is called unknown,
never guessed. What can be built here is doctor.py's to say.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from slmdeploy.profiling import cpu, microbench
from slmdeploy.profiling.cpu import Cache
from slmdeploy.profiling.engines import clashes, engines
from slmdeploy.profiling.gpu import Gpu, nvidia_gpus
from slmdeploy.specs import Target


@dataclass(frozen=True)
class Machine:
    """This machine; None means that the system does not tell. ``isa`` uses the names of Linux's /proc/cpuinfo.

    Bandwidth is in bytes per second of all cores together, peaks in operations per second (a multiplication and an
    addition are two) of 1024 x 1024 matrix products; all three are None where nothing was measured. ``steal_share`` is
    the share of CPU time since the start that the hypervisor gave to others.
    """

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
    gpus: tuple[Gpu, ...] = ()
    fp32_peak_ops_per_s: float | None = None
    int8_peak_ops_per_s: float | None = None
    caches: tuple[Cache, ...] = ()
    governor: str | None = None
    hypervisor: bool | None = None
    vendor: str | None = None
    steal_share: float | None = None

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


def detect(*, bench: bool = True) -> Machine:
    """Describe this machine; with ``bench`` also measure bandwidth and peaks (about a second and a half)."""
    info = cpu.cpuinfo()
    memory, limit = cpu.memory_bytes(), cpu.cgroup_memory_limit()
    here = engines()
    machine = Machine(
        system=platform.platform(),
        arch={"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower()),
        cpu=info.model,
        isa=info.flags,
        physical_cores=info.physical_cores,
        logical_cores=os.cpu_count() or 1,
        affinity_cores=cpu.affinity_cores(),
        quota_cores=cpu.cgroup_cpu_quota(),
        memory_bytes=memory,
        memory_limit_bytes=limit,
        read_bandwidth_bytes_per_s=None,
        python=platform.python_version(),
        engines=here,
        problems=clashes(here),
        gpus=nvidia_gpus(),
        caches=cpu.caches(),
        governor=cpu.governor(),
        hypervisor=cpu.hypervisor(info.flags),
        vendor=cpu.vendor(),
        steal_share=cpu.steal_share(),
    )
    return measured(machine) if bench else machine


def measured(machine: Machine) -> Machine:
    """The machine with its bandwidth and its peaks, measured now."""
    return replace(
        machine,
        read_bandwidth_bytes_per_s=microbench.read_bandwidth(machine.threads, machine.usable_memory_bytes),
        fp32_peak_ops_per_s=microbench.fp32_peak(),
        int8_peak_ops_per_s=microbench.int8_peak(machine.threads),
    )


def match_target(machine: Machine, targets: Sequence[Target]) -> tuple[Target | None, str]:
    """The most capable CPU target whose instructions this machine all has, and why; None and why when there is none."""
    same = [target for target in targets if target.kind == "cpu" and target.arch == machine.arch]
    if not same:
        return None, f"no target is for the architecture {machine.arch}"
    if machine.isa is None:
        names = ", ".join(sorted(target.name for target in same))
        return None, f"this system does not tell its instruction set, so name a target: {names}"
    fitting = [target for target in same if machine.isa.issuperset(target.isa)]
    if not fitting:
        missing = {target.name: sorted(set(target.isa) - machine.isa) for target in same}
        return None, "; ".join(f"{name} needs {', '.join(flags)}" for name, flags in missing.items())
    best = max(fitting, key=lambda target: (len(target.isa), target.name))
    return best, f"{machine.arch} with {', '.join(best.isa) or 'no special instructions'}"


def match_gpus(machine: Machine, targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Each GPU with the target of its compute capability, None where no target has it."""
    # Of several boards of one capability the first by name stands for all: a family before one in a desktop.
    boards = sorted((target.name, target.compute_capability) for target in targets if target.kind == "gpu")
    by_capability = {capability: name for name, capability in reversed(boards)}
    return [{**asdict(gpu), "target": by_capability.get(gpu.compute_capability)} for gpu in machine.gpus]
