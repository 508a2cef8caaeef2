"""From records of requests to metrics: what one turn of one candidate showed, and what all its turns come to.

A turn is the smallest thing that is kept (journal.py) and its JSON form is `Turn.to_dict`. metrics.py defines each
figure. Knows nothing of processes, rounds or how requests were sent.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from slmdeploy.metrics import LATENCIES, PERCENTILES
from slmdeploy.profiling.statistics import Floats, Interval, draws, interval, percentile_draws, spread
from slmdeploy.specs import Workload

SERVICE = {"generate": "e2e_ms", "score": "score_ms", "embed": "encode_ms", "classify": "encode_ms"}
"""What each task calls the time of a whole request."""
UNITS = {"generate": "tokens", "score": "items", "embed": "texts", "classify": "texts"}
"""What each task's throughput counts."""
SERVICE_TIME = "service_ms"
"""Samples of the time from the beginning of work on a request to its end, without the wait."""
RAMP = 0.2
"""Share of a turn's first requests whose latencies are left out where requests queue: they found the queue empty."""
MOST_SAMPLES = 2000
NOISY_SPREAD = 0.25
"""(p90 - p10) / p50 of the service time above which a measurement is called noisy."""
NOISY_STEAL = 0.02
"""Share of the machine's CPU time taken by the hypervisor above which a measurement is called noisy."""

Record = Mapping[str, Any]


@dataclass
class Turn:
    """What one turn showed: samples in milliseconds by name, and what was done in which time.

    ``good`` counts answered requests within the workload's goodput limits, None where it has none.
    """

    samples: dict[str, list[float]]
    units: int
    requests: int
    answered: int
    wall_s: float
    good: int | None = None
    joules: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `Turn(**that)` is the same turn."""
        return asdict(self)


def turn_of(workload: Workload, requests: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> Turn:
    """Sum up the records of driving.drive, which are in the order of ``requests``."""
    skipped = int(RAMP * len(records)) if workload.queues else 0
    samples: dict[str, list[float]] = {}
    good = 0
    for place, record in enumerate(records):
        latencies = _latencies(workload, record)
        if not record.get("unanswered"):
            good += _is_good(workload, latencies)
        if place >= skipped:
            for name, values in latencies.items():
                samples.setdefault(name, []).extend(values)
    answered = [
        (request, record) for request, record in zip(requests, records, strict=False) if "unanswered" not in record
    ]
    end = max((record["end_s"] for _, record in answered), default=0.0)
    return Turn(
        samples={name: [float(f"{value:.5g}") for value in values] for name, values in samples.items()},
        units=sum(_units(request) for request, _ in answered),
        requests=len(records),
        answered=len(answered),
        wall_s=end - min((record["arrival_s"] for record in records), default=0.0),
        good=good if workload.goodput else None,
    )


def _units(request: Mapping[str, Any]) -> int:
    match request["op"]:
        case "generate":
            return int(request["new_tokens"])
        case "score":
            return len(request["item_ids"])
    return len(request["rows"])


def _latencies(workload: Workload, record: Record) -> dict[str, list[float]]:
    """Samples of one request by name; a request that was given up has what is certain: that it took longer."""
    wait, whole = (1e3 * (record[end] - record["arrival_s"]) for end in ("begin_s", "end_s"))
    found = {"queue_ms": [wait]} if workload.queues else {}
    if "unanswered" in record:
        first = {"ttft_ms": [whole]} if workload.task == "generate" else {}
        return found | first | {SERVICE[workload.task]: [whole]}
    found[SERVICE_TIME] = [whole - wait]
    if workload.scenario == "offline":  # all arrive at once: a latency would say where in the line one stood
        return found
    if workload.task != "generate":
        return found | {SERVICE[workload.task]: [whole]}
    stamps = record["stamps_ms"]
    found |= {"ttft_ms": [wait + stamps[0]], "e2e_ms": [wait + stamps[-1]]}
    if len(stamps) > 1:
        found["tpot_ms"] = [(stamps[-1] - stamps[0]) / (len(stamps) - 1)]
        found["itl_ms"] = [later - earlier for earlier, later in pairwise(stamps)]
    return found


def _is_good(workload: Workload, latencies: Mapping[str, Sequence[float]]) -> bool:
    return all(max(latencies.get(name, [0.0])) <= limit for name, limit in (workload.goodput or {}).items())


@dataclass
class Outcome:
    """One workload on one candidate: metrics, the draws that their intervals come from, and how they came about."""

    metrics: dict[str, float]
    drawn: dict[str, Floats]
    samples: dict[str, list[float]]
    requests: int
    unanswered: int
    spread: float
    steal: float | None = None
    settled: bool = True
    repeated: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    items_curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def intervals(self) -> dict[str, Interval]:
        """95 % bootstrap intervals of the metrics."""
        return {name: interval(values) for name, values in self.drawn.items()}

    @property
    def noisy(self) -> bool:
        """Whether the spread of service times or the hypervisor's share makes small differences meaningless."""
        return self.spread > NOISY_SPREAD or (self.steal or 0.0) > NOISY_STEAL

    def to_dict(self, workload: Workload) -> dict[str, Any]:
        """The workload's entry in a row of measurement.json."""
        kept = {name: thinned(values) for name, values in self.samples.items()}
        return {
            "task": workload.task,
            "scenario": workload.scenario,
            "hot": workload.hot,
            "requests": self.requests,
            "unanswered": self.unanswered,
            "metrics": self.metrics,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "samples": kept,
            "spread": self.spread,
            "steal": self.steal,
            "noisy": self.noisy,
            "settled": self.settled,
            "repeated": self.repeated,
            "curve": self.curve,
            "items_curve": self.items_curve,
        }


def thinned(values: Sequence[float]) -> list[float]:
    """At most MOST_SAMPLES of the samples, evenly spaced in the order of measuring."""
    if len(values) <= MOST_SAMPLES:
        return list(values)
    return [values[int(place)] for place in np.linspace(0, len(values) - 1, MOST_SAMPLES)]


def summarise(workload: Workload, turns: Sequence[Turn], *, name: str = "", seed: int = 0) -> Outcome:
    """The metrics of one candidate's turns of one workload (metrics.py defines them).

    ``name`` is the candidate's: it takes part in the seed, so that two candidates' draws are independent.
    """
    own_seed = zlib.crc32(f"{seed} {name}".encode())
    samples: dict[str, list[float]] = {}
    for turn in turns:
        for sample, values in turn.samples.items():
            samples.setdefault(sample, []).extend(values)
    metrics: dict[str, float] = {}
    drawn: dict[str, Floats] = {}
    for sample in (one for one in LATENCIES if one in samples):
        _percentiles(sample, samples[sample], own_seed, metrics, drawn)
    if workload.scenario != "single-stream":
        _rates(workload, turns, own_seed, metrics, drawn)
    energies = [turn.joules for turn in turns if turn.joules is not None]
    if energies and len(energies) == len(turns):
        metrics["energy_j_per_request"] = sum(energies) / sum(turn.requests for turn in turns)
    return Outcome(
        metrics,
        drawn,
        samples,
        sum(turn.requests for turn in turns),
        sum(turn.requests - turn.answered for turn in turns),
        # Where requests queue they find threads awake or asleep, and those of a trace differ in length: the spread says
        # nothing of noise there.
        spread(samples[SERVICE_TIME]) if samples.get(SERVICE_TIME) and not workload.queues else 0.0,
    )


def _percentiles(
    sample: str, values: Sequence[float], seed: int, metrics: dict[str, float], drawn: dict[str, Floats]
) -> None:
    # A percentile needs a request beyond it; 99.9 and not 100, because 100 - 99.9 is a little less than 0.1.
    labels = [name for name, percent in PERCENTILES.items() if name == "p50" or len(values) * (100 - percent) >= 99.9]
    percents = [PERCENTILES[label] for label in labels]
    table = percentile_draws(values, percents, seed)
    for column, (label, value) in enumerate(zip(labels, np.percentile(values, percents), strict=True)):
        metrics[f"{sample}_{label}"], drawn[f"{sample}_{label}"] = float(value), table[:, column]


def _rates(
    workload: Workload, turns: Sequence[Turn], seed: int, metrics: dict[str, float], drawn: dict[str, Floats]
) -> None:
    columns = {f"{UNITS[workload.task]}_per_s": [turn.units for turn in turns]}
    columns["requests_per_s"] = [turn.answered for turn in turns]
    if workload.goodput:
        columns["goodput_per_s"] = [turn.good or 0 for turn in turns]
    seconds = [turn.wall_s for turn in turns]
    for name, done in columns.items():
        table = np.array([done, seconds], np.float64).T
        if table[:, 1].sum() <= 0:
            continue
        metrics[name] = float(table[:, 0].sum() / table[:, 1].sum())
        drawn[name] = draws(table, lambda drawn: drawn[..., 0].sum(-1) / drawn[..., 1].sum(-1), seed)
