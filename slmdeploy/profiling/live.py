"""The verb `verify-budget`: the profiler's load against a live server, held to a recipe's budget as `select` holds it.

The same requests, arrivals, rounds, percentiles and intervals as `profile`, over HTTP, so that a limit means the same
before and after deployment: the unfavourable end of the 95 % interval must be within it. What a server cannot show from
outside (quality, memory, size, queues, ratios to a baseline) is listed as not checked. A request that got no answer
fails the whole. Knows nothing of HTTP (live_http.py) or of how limits are judged (selection/judging.py).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slmdeploy.errors import InputError
from slmdeploy.metrics import LATENCIES, PERCENTILES
from slmdeploy.profiling.live_client import LiveClient
from slmdeploy.profiling.live_http import Server, answer, first_model
from slmdeploy.profiling.live_texts import IdRequests, TextRequests
from slmdeploy.profiling.measure import Effort, Runner, measure
from slmdeploy.profiling.profile import EFFORT, owners
from slmdeploy.profiling.summary import Outcome
from slmdeploy.progress import SILENT, Progress
from slmdeploy.selection.judging import check_names, judge, sentence, unmet
from slmdeploy.selection.outcome import Verdict
from slmdeploy.selection.rows import Row
from slmdeploy.specs import Budget, Constraint, Workload

_LATENCIES = {f"{name}_{label}" for name in LATENCIES if name != "queue_ms" for label in PERCENTILES}
_RATES = {"tokens_per_s", "items_per_s", "texts_per_s", "requests_per_s", "goodput_per_s"}
SHOWN = _LATENCIES | _RATES
"""Metrics that a server shows to whoever only sends requests."""
_ASK_S = 30.0


@dataclass(frozen=True)
class Unchecked:
    """A limit that was not held against the server, and why."""

    constraint: str
    reason: str


@dataclass(frozen=True)
class LiveReport:
    """What a server made of a budget. `reasons` has a sentence for each limit that is not met; `failures` those of
    requests without an answer; `workloads` figures and intervals by workload, as in a row of measurement.json."""

    url: str
    model: str
    verdicts: tuple[Verdict, ...]
    preferences: tuple[Verdict, ...]
    unchecked: tuple[Unchecked, ...]
    reasons: tuple[str, ...]
    requests: int
    failures: tuple[str, ...]
    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every limit that was checked is met and every request was answered."""
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"passed": self.passed, **asdict(self)}


def verify_budget(
    server: Server,
    *,
    workloads: Sequence[Workload],
    budget: Budget,
    tokenizer: Path | None = None,
    target: str | None = None,
    effort: Effort = EFFORT,
    seed: int = 0,
    progress: Progress = SILENT,
) -> LiveReport:
    """Load ``server`` with ``workloads`` and judge the limits of ``budget`` that a server shows.

    ``tokenizer`` is a folder with the served model's tokenizer.json, needed for texts to score or encode; ``target`` is
    the machine that limits for one target are meant for. Raises InputError where no limit can be checked or the server
    answers nothing, SpecError for a limit that names what does not exist.
    """
    checked, unchecked = _split(budget, workloads, target)
    texts = IdRequests() if tokenizer is None else TextRequests(tokenizer)
    server = server if server.model else Server(server.url, first_model(server, _ASK_S), server.key)
    clients = {one.name: _client(server, one, texts) for one in workloads}
    outcomes: dict[str, Outcome] = {}
    for workload in workloads:
        progress.start(f"load {workload.name}", None, "turns")
        found = measure(
            [Runner("server", clients[workload.name], may_be_dropped=False)],
            workload,
            vocab_size=texts.vocab_size,
            effort=effort,
            seed=seed,
            watch=[limit.figure for limit in (*checked.constraints, *checked.preferences)],
            done=lambda name: progress.advance(note=name),
        )
        outcomes[workload.name] = _visible(found["server"], clients[workload.name])
    progress.finish()
    return _report(server, workloads, checked, unchecked, outcomes, clients, target)


def _client(server: Server, workload: Workload, texts: IdRequests | TextRequests) -> LiveClient:
    return LiveClient(lambda request, left_s: answer(server, request, workload.task, left_s), texts.made)


def _split(budget: Budget, workloads: Sequence[Workload], target: str | None) -> tuple[Budget, tuple[Unchecked, ...]]:
    """The limits that the server can be held to, and the others with their reasons."""
    names = Row("server", {f"{one.name}:{metric}": 0.0 for one in workloads for metric in SHOWN})
    unchecked: dict[str, str] = {}

    def kept(limits: Sequence[Constraint]) -> tuple[Constraint, ...]:
        check_names(Budget(constraints=tuple(one.model_copy(update={"target": None}) for one in limits)), [names])
        reasons = {limit: _why_not(limit, target) for limit in limits}
        unchecked.update({str(limit): why for limit, why in reasons.items() if why})
        return tuple(limit for limit, why in reasons.items() if not why)

    checked = Budget(
        constraints=kept(budget.constraints), preferences=kept(budget.preferences), objective=budget.objective
    )
    if not checked.constraints:
        raise InputError(
            f"no limit of this budget can be checked at a server: give one on {', '.join(sorted(LATENCIES))} or a rate"
        )
    return checked, tuple(Unchecked(*one) for one in unchecked.items())


def _why_not(limit: Constraint, target: str | None) -> str | None:
    """Why a limit cannot be held against the server; None where it can."""
    if limit.target is not None and limit.target != target:
        return f"it is for {limit.target}; where the server runs there, say so with --target"
    if limit.metric in SHOWN:
        return None
    if limit.metric.startswith("queue_ms"):
        return "a server does not show from outside when work begins"
    return "it belongs to the build: select checks it"


def _visible(outcome: Outcome, client: LiveClient) -> Outcome:
    """The outcome without what cannot be known from outside: queues, this machine's energy, times inside an event."""
    for name in list(outcome.metrics):
        if name not in SHOWN or (client.spread and name.startswith("itl_ms")):
            del outcome.metrics[name]
            outcome.drawn.pop(name, None)
    return outcome


def _report(
    server: Server,
    workloads: Sequence[Workload],
    budget: Budget,
    unchecked: tuple[Unchecked, ...],
    outcomes: dict[str, Outcome],
    clients: dict[str, LiveClient],
    target: str | None,
) -> LiveReport:
    row = _row(server, workloads, outcomes, target)
    verdicts = judge(row, budget.constraints)
    failures = tuple(reason for client in clients.values() for reason in client.failures)
    requests = sum(client.sent for client in clients.values())
    refused = (
        f"{len(failures)} of {requests} requests got no answer, the first because {failures[0]}" if failures else ""
    )
    return LiveReport(
        url=server.url,
        model=server.model,
        verdicts=verdicts,
        preferences=judge(row, budget.preferences),
        unchecked=unchecked,
        reasons=(*([refused] if refused else []), *(sentence(row, one) for one in unmet(verdicts))),
        requests=requests,
        failures=tuple(dict.fromkeys(failures)),
        workloads={one.name: outcomes[one.name].to_dict(one) for one in workloads},
    )


def _row(server: Server, workloads: Sequence[Workload], outcomes: dict[str, Outcome], target: str | None) -> Row:
    """The server as a row that limits are judged on: figures by workload, and once without one (metrics.py)."""
    metrics = {f"{name}:{metric}": value for name, one in outcomes.items() for metric, value in one.metrics.items()}
    intervals = {f"{name}:{metric}": ends for name, one in outcomes.items() for metric, ends in one.intervals.items()}
    for metric, name in owners(workloads, {one: set(found.metrics) for one, found in outcomes.items()}):
        metrics[metric] = outcomes[name].metrics[metric]
        intervals[metric] = intervals[f"{name}:{metric}"]
    return Row(server.url, metrics, intervals, target=target)
