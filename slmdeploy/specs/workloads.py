"""Workload: one kind of request and how requests arrive; and the grammar of the names that stand for the usual ones.

A name says a workload in full, so any length can be asked for without a file: `generate-128-64` (prompt, new tokens),
`score-512-32x16` (prefix, items x tokens), `score-512-32x16-hot`, `embed-8x128` (texts x tokens), `classify-128`; each
also with `-offline`, `-server-20` (20 requests per second, Poisson), `-concurrent-4`, and `-batch-8` behind those.
Scenario names are MLPerf's. Knows nothing of how a workload is run (profiling/).
"""

import re
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from slmdeploy.errors import InputError
from slmdeploy.specs.base import AboveZero, Positive, Spec

Task = Literal["generate", "score", "embed", "classify"]
Scenario = Literal["single-stream", "offline", "server", "concurrent", "trace"]

ENCODER_TASKS = ("embed", "classify")
"""The tasks whose requests are texts that an encoder runs."""

_LENGTHS = {
    "generate": ("prompt_tokens", "new_tokens"),
    "score": ("prefix_tokens", "items", "item_tokens"),
    "embed": ("texts", "text_tokens"),
    "classify": ("texts", "text_tokens"),
}
"""What each task needs; a trace has the lengths of each of its requests instead."""

_ONLY_IN = {"rate_per_s": "server", "concurrency": "concurrent", "trace": "trace"}


class Workload(Spec):
    """One kind of request and how requests arrive. Lengths are in tokens; ``items`` are candidates per request.

    ``texts`` are texts per request of an encoder, each of ``text_tokens``, special tokens among them.
    Scenarios: single-stream, one request behind the other; offline, all at once; server, open-loop Poisson arrivals at
    ``rate_per_s``; concurrent, ``concurrency`` clients that each wait for their answer; trace, the arrivals and lengths
    of the file ``trace`` (docs/measurement.md). ``batch`` requests at most are taken together. ``hot``: of score, the
    prefix is resident before the clock starts. ``requests`` bounds how many one candidate runs. ``sweep`` adds latency
    against load to a server workload, and latency against the number of items to a single-stream score workload.
    ``goodput`` are limits on the latencies of one request: those that meet them count as goodput.
    """

    name: str
    task: Task
    scenario: Scenario = "single-stream"
    prompt_tokens: Positive | None = None
    new_tokens: Positive | None = None
    prefix_tokens: Positive | None = None
    items: Positive | None = None
    item_tokens: Positive | None = None
    texts: Positive | None = None
    text_tokens: Positive | None = None
    hot: bool = False
    rate_per_s: AboveZero | None = None
    concurrency: Positive | None = None
    trace: str | None = None
    batch: Positive = 1
    sweep: bool = False
    goodput: dict[Literal["ttft_ms", "tpot_ms", "e2e_ms", "score_ms", "encode_ms"], AboveZero] | None = None
    requests: Positive = 2000

    @model_validator(mode="after")
    def _lengths_fit_the_task(self) -> Self:
        needed = () if self.scenario == "trace" else _LENGTHS[self.task]
        for name in dict.fromkeys(name for names in _LENGTHS.values() for name in names):
            if (getattr(self, name) is not None) != (name in needed):
                verb = "needs" if name in needed else "does not take"
                who = "scenario = 'trace'" if self.scenario == "trace" else f"task = {self.task!r}"
                raise ValueError(f"{who} {verb} {name}")
        return self

    @model_validator(mode="after")
    def _keys_fit_the_scenario(self) -> Self:
        for name, scenario in _ONLY_IN.items():
            if (getattr(self, name) is not None) != (self.scenario == scenario):
                verb = "needs" if self.scenario == scenario else "does not take"
                raise ValueError(f"scenario = {self.scenario!r} {verb} {name}")
        if self.hot and self.task != "score":
            raise ValueError("hot goes with task = 'score': it is the shared prefix that is resident")
        if self.batch > 1 and (self.task == "score" or self.scenario == "single-stream"):
            raise ValueError("batch goes with several requests of a task other than score, whose items are packed")
        if self.sweep and self.scenario != "server" and (self.task, self.scenario) != ("score", "single-stream"):
            raise ValueError("sweep goes with scenario = 'server', or with task = 'score' in 'single-stream'")
        return self

    @property
    def queues(self) -> bool:
        """Whether requests may have to wait for one another, so that latencies hold the wait."""
        return self.scenario in ("server", "concurrent", "trace")


_NAME = re.compile(
    r"(?:(?P<generate>generate)-(?P<prompt_tokens>\d+)-(?P<new_tokens>\d+)"
    r"|(?P<score>score)-(?P<prefix_tokens>\d+)-(?P<items>\d+)x(?P<item_tokens>\d+)(?P<hot>-hot)?"
    r"|(?P<encode>embed|classify)-(?:(?P<texts>\d+)x)?(?P<text_tokens>\d+))"
    r"(?:-(?P<offline>offline)|-server-(?P<rate_per_s>\d+(?:\.\d+)?)|-concurrent-(?P<concurrency>\d+))?"
    r"(?:-batch-(?P<batch>\d+))?(?P<sweep>-sweep)?"
)
_FORMS = "generate-128-64, score-512-32x16, score-512-32x16-hot, embed-8x128 or classify-128"


def named_workload(name: str) -> Workload:
    """The workload that a name says. Raises InputError with the forms that there are."""
    match = _NAME.fullmatch(name)
    if not match:
        raise InputError(
            f"there is no workload {name!r}: write one like {_FORMS}, with -offline, -server-20 or -concurrent-4 "
            "behind it where that is meant, or name a .toml or .jsonl file"
        )
    found = {key: value for key, value in match.groupdict().items() if value is not None}
    fields: dict[str, Any] = {"name": name, "task": found.get("generate") or found.get("score") or found.get("encode")}
    fields |= {key: int(found[key]) for names in _LENGTHS.values() for key in names if key in found}
    if fields["task"] in ENCODER_TASKS:
        fields.setdefault("texts", 1)
    fields |= {"hot": "hot" in found, "sweep": "sweep" in found, "batch": int(found.get("batch", 1))}
    if "offline" in found:
        fields["scenario"] = "offline"
    elif "rate_per_s" in found:
        fields |= {"scenario": "server", "rate_per_s": float(found["rate_per_s"])}
    elif "concurrency" in found:
        fields |= {"scenario": "concurrent", "concurrency": int(found["concurrency"])}
    try:
        return Workload.model_validate(fields)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"workload {name!r}: {reason}") from error


SUGGESTED = (
    "generate-128-64",
    "generate-512-64",
    "generate-512-300",
    "score-512-1x16",
    "score-512-32x16",
    "score-512-32x16-hot",
    "score-2048-32x64",
    "score-2048-100x180-hot",
    "embed-128",
    "embed-8x128",
    "embed-32x128-offline",
    "classify-8x32",
)
"""Names of the workloads of arXiv 2502.14305's service and of common practice, for those who ask what there is."""
