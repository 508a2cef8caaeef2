"""What else the machine did while something was measured: stolen time, load, energy; None where it does not tell.

Linux's /proc and /sys alone; nothing here is guessed for a system that has neither. Knows nothing of workloads.
"""

import os
from collections.abc import Sequence
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


def energy_joules(powercap: Path = _POWERCAP) -> float | None:
    """The sum of the processor packages' RAPL counters, in joules since some moment; None where they cannot be read.

    Counters wrap after some minutes of full load, so a difference that is negative is no figure.
    """
    values = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:  # a part of a package, whose energy is in the package's already
            continue
        try:
            values.append(int((zone / "energy_uj").read_text()))
        except (OSError, ValueError):  # root alone may read it on most systems
            return None
    return sum(values) / 1e6 if values else None


def surroundings() -> dict[str, Any]:
    """Load of the last minute and the cores that this process may run on, as they are now."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {"load_average": load, "affinity": cores}
