"""Resident memory of a process over time, and by how much it grew once it had settled.

Growth is the larger of two figures after the first fifth of the time, so that neither a slow leak nor a late one hides:
the trend (the median of the slopes between all pairs of samples, Theil and Sen, which single steps do not move) times
the time, and the median of the last fifth less that of the second. Linux alone: reads /proc. Knows no server.
"""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Sample = tuple[float, int]
"""Seconds since the watch began, and resident bytes."""
_PARTS = 5


@dataclass(frozen=True)
class Growth:
    """settled_bytes: median of the second fifth; slope_bytes_per_s: the trend behind the first; growth_bytes: above."""

    settled_bytes: int
    slope_bytes_per_s: float
    growth_bytes: int


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


def open_files(pid: int) -> int:
    """Files and sockets that a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def growth(samples: Sequence[Sample]) -> Growth:
    """What became of the memory. Raises ValueError where a fifth of the time has no sample."""
    started, span = samples[0][0], samples[-1][0] - samples[0][0]
    parts: list[list[Sample]] = [[] for _ in range(_PARTS)]
    for sample in samples:
        parts[min(_PARTS - 1, int(_PARTS * (sample[0] - started) / span)) if span else 0].append(sample)
    if not all(parts):
        raise ValueError(
            f"{len(samples)} samples of memory in {span:.1f} s are too few to tell its growth: load longer"
        )
    settled, last = (statistics.median(size for _, size in parts[index]) for index in (1, _PARTS - 1))
    slope = _slope([sample for part in parts[1:] for sample in part])
    by_trend = slope * (samples[-1][0] - parts[1][0][0])
    return Growth(int(settled), slope, int(max(by_trend, last - settled)))


def _slope(samples: Sequence[Sample]) -> float:
    times, sizes = np.array(samples, np.float64).T
    first, second = np.triu_indices(len(samples), 1)
    return float(np.median((sizes[second] - sizes[first]) / (times[second] - times[first])))


@contextmanager
def watched(pid: int, every_s: float) -> Iterator[list[Sample]]:
    """A list to which a thread adds a sample every so many seconds for as long as the block lasts."""
    samples: list[Sample] = []
    started, ended = time.monotonic(), threading.Event()

    def look() -> None:
        while not ended.wait(every_s):
            samples.append((time.monotonic() - started, resident_bytes(pid)))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
