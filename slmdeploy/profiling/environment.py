"""What else the machine did while something was measured: stolen time, load, energy; None where it does not tell.

Linux's /proc and /sys, and NVIDIA's management library where a driver has installed it; nothing here is guessed for a
system that has neither. Knows nothing of workloads.
"""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

_STAT = Path("/proc/stat")
_POWERCAP = Path("/sys/class/powercap")


def cpu_ticks(stat: Path = _STAT) -> list[int] | None:
    """The machine's CPU time by state since it started (Linux), None elsewhere."""
    if not stat.exists():
        return None
    return [int(value) for value in stat.read_text().splitlines()[0].split()[1:9]]


def steal_share(before: Sequence[int] | None, after: Sequence[int] | None) -> float | None:
    """Share of CPU time between two `cpu_ticks` that the hypervisor gave to others; None where it cannot be read."""
    if before is None or after is None:
        return None
    spent = [later - earlier for earlier, later in zip(before, after, strict=True)]
    return spent[7] / sum(spent) if sum(spent) else 0.0


def energy_joules() -> float | None:
    """Joules since some moment of all that can be read: processor packages (RAPL) and GPUs (NVML); None without either.

    Counters wrap, RAPL's after some minutes of full load, so a difference that is negative is no figure.
    """
    found = [value for value in (rapl_joules(), nvml_joules(_nvml())) if value is not None]
    return sum(found) if found else None


def rapl_joules(powercap: Path = _POWERCAP) -> float | None:
    """The sum of the processor packages' RAPL counters; None where one of them cannot be read."""
    values = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:  # a part of a package, whose energy is in the package's already
            continue
        try:
            values.append(int((zone / "energy_uj").read_text()))
        except (OSError, ValueError):  # root alone may read it on most systems
            return None
    return sum(values) / 1e6 if values else None


@cache
def _nvml() -> Any:
    """NVIDIA's management library, initialised; None where there is no driver."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


def nvml_joules(library: Any) -> float | None:
    """The sum of the GPUs' energy counters (nvmlDeviceGetTotalEnergyConsumption, Volta and later); else None."""
    count = ctypes.c_uint()
    if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return None
    total = 0
    for index in range(count.value):
        device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
            return None
        if library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)) != 0:
            return None
        total += millijoules.value
    return total / 1e3 if count.value else None


def surroundings() -> dict[str, Any]:
    """Load of the last minute and the cores that this process may run on, as they are now."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {"load_average": load, "affinity": cores}
