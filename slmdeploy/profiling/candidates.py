"""Who is measured: builds, graphs, packages and the baseline checkpoint, and what is known of each before it runs.

Knows nothing of how they are measured; profile.py puts figures into the rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slmdeploy.artifacts import digest, open_artifact
from slmdeploy.checkpoint import CONTEXT_FIELDS, read_config
from slmdeploy.errors import InputError
from slmdeploy.metrics import RATIO, RELATIVE, with_ratios
from slmdeploy.profiling.statistics import Floats, Interval, interval, ratio_interval
from slmdeploy.profiling.summary import Outcome
from slmdeploy.runtime.bundle import FOR_OTHERS, RuntimeConfig, read_runtime
from slmdeploy.runtime.encoder_config import is_encoder, read_encoder
from slmdeploy.runtime.openvino_session import WEIGHTS
from slmdeploy.runtime.tensorrt_plan import PLAN
from slmdeploy.runtime.tensorrt_session import not_here

_RUNNABLE = ("graph", "build", "package")
_LOADED = {".onnx", ".data", ".xml", ".safetensors", ".json", ".jinja", ".txt", ".model"}
"""Suffixes of the files that running a folder reads, beside OpenVINO's weights; a checkpoint also holds logs, cards and
other things that end in .bin."""
OPTIONS = ("threads", "spinning", "prefill_chunk")
"""Of a session: what a row says that it ran with."""


@dataclass
class Candidate:
    """One folder to measure, and what is found out about it. ``kv_token_bytes`` is None where the engine decides."""

    name: str
    path: Path
    role: str
    tasks: tuple[str, ...]
    max_length: int
    tokenizer: Path
    facts: dict[str, Any]
    labels: tuple[str, ...] = ()
    kv_token_bytes: int | None = None
    cuts_prompts: bool = False
    """Whether it can run a prompt in pieces."""
    takes_batches: bool = False
    """Whether it can run several requests together."""
    drafting: tuple[str, ...] = ()
    """Arguments of worker.py that make it guess ahead (drafts.py)."""
    metrics: dict[str, float] = field(default_factory=dict)
    drawn: dict[str, Floats] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    hello: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    """What the search for its session options compared and chose (search.py)."""

    def row(self, baseline: "Candidate | None", target: str | None) -> dict[str, Any]:
        """The candidate's row of measurement.json."""
        reference = baseline.metrics if baseline else {}
        return {
            "build": self.name,
            "path": str(self.path),
            "role": self.role,
            **self.facts,
            "target": target,
            "source": "measured",
            "options": self._options(),
            "search": self.search,
            "tasks": list(self.tasks),
            "worker": self.hello,
            "metrics": with_ratios(self.metrics, reference),
            "intervals": {name: list(ends) for name, ends in self._intervals(baseline).items()},
            "workloads": self.workloads,
            "quality": self.counts,
            "noisy": any(workload["noisy"] for workload in self.workloads.values()),
        }

    def _options(self) -> dict[str, Any]:
        batch = (self.search or {}).get("options", {}).get("batch")
        drafting = {"drafting": " ".join(self.drafting)} if self.drafting else {}
        found = {key: self.hello[key] for key in OPTIONS if key in self.hello} | ({"batch": batch} if batch else {})
        return found | drafting

    def _intervals(self, baseline: "Candidate | None") -> dict[str, Interval]:
        found = {name: interval(values) for name, values in self.drawn.items()}
        for name, values in self.drawn.items():
            if baseline is not None and name in baseline.drawn and name not in RELATIVE:
                ends = (1.0, 1.0) if baseline is self else ratio_interval(values, baseline.drawn[name])
                found |= {} if ends is None else {name + RATIO: ends}
        return found


def find(builds: Sequence[Path], baseline: Path | None, *, running: bool = True) -> list[Candidate]:
    """The candidates, the baseline first. Raises InputError where one is no model, or cannot be run if ``running``."""
    found = [] if baseline is None else [_baseline(baseline)]
    for name, path in zip(unique_names(builds), builds, strict=True):
        found.append(_build(name, path, running))
    first: dict[str, Path] = {}
    for candidate in found:
        # Candidates with the same tokenizer share one path, which is how quality knows that their ids agree.
        content = hashlib.sha256(candidate.tokenizer.read_bytes()).hexdigest()
        candidate.tokenizer = first.setdefault(content, candidate.tokenizer)
        candidate.metrics["size_bytes"] = size_bytes(candidate.path)
    return found


def unique_names(builds: Sequence[Path]) -> list[str]:
    """A short name for each build: its folder's name, with the parent's where two would be the same."""
    if not builds:
        raise InputError("no build was given: name at least one folder made by `slmdeploy build`")
    paths = [path.resolve() for path in builds]
    if len(set(paths)) < len(paths):
        raise InputError(f"{next(p for p in paths if paths.count(p) > 1)} was given twice: name each build once")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("distinct paths have distinct names")


def _build(name: str, path: Path, running: bool) -> Candidate:
    artifact = open_artifact(path)
    if artifact.kind not in _RUNNABLE:
        raise InputError(f"{path} is a {artifact.kind}: profile measures what `slmdeploy build` or `export` made")
    runtime = read_encoder(path) if is_encoder(path) else read_runtime(path)
    if running and runtime.numerics_only and (reason := not_here(path)):
        raise InputError(
            f"{path} is for a GPU and cannot be measured here, where its speed on this CPU would say nothing: {reason}"
        )
    chosen = artifact.plan.get("profile")
    facts = {
        "content_key": artifact.content_key,
        "profile": chosen["name"] if isinstance(chosen, dict) else chosen,
        "precision": runtime.precision,
        "graph": digest(path) if artifact.kind == "graph" else artifact.inputs.get("graph", {}).get("digest"),
        "gates": artifact.result.get("gates", {}),
        "passed": artifact.result.get("passed", True),
        "speed": artifact.result.get("speed"),
    }
    candidate = Candidate(name, path, "candidate", runtime.tasks, runtime.max_length, path / "tokenizer.json", facts)
    candidate.takes_batches = not isinstance(runtime, RuntimeConfig)  # every encoder does; of decoders see below
    if isinstance(runtime, RuntimeConfig):
        candidate.labels = runtime.score.labels if runtime.score else ()
        if runtime.engine == "onnxruntime":  # what OpenVINO stores is its own business
            candidate.cuts_prompts = candidate.takes_batches = runtime.interface == "shared"
            candidate.kv_token_bytes = 2 * sum(runtime.kv_heads) * runtime.head_dim * np.dtype(runtime.cache).itemsize
    return candidate


def _baseline(path: Path) -> Candidate:
    config = path / "config.json"
    for needed in (config, path / "tokenizer.json"):
        if not needed.is_file():
            raise InputError(f"{needed} does not exist: the baseline must be a checkpoint folder with its tokenizer")
    fields = read_config(path)
    max_length = next((fields[name] for name in CONTEXT_FIELDS if isinstance(fields.get(name), int)), None)
    if max_length is None:
        raise InputError(f"{config}: one of {', '.join(CONTEXT_FIELDS)} must be the context length in tokens")
    facts: dict[str, Any] = {
        "content_key": None,
        "profile": None,
        "precision": "torch-eager-fp32",
        "graph": None,
        "gates": {},
        "passed": True,
        "speed": None,
    }
    return Candidate("baseline", path, "baseline", ("generate", "score"), max_length, path / "tokenizer.json", facts)


def size_bytes(folder: Path) -> int:
    """Bytes of the files at the top of ``folder`` that running it reads."""
    return sum(
        file.stat().st_size
        for file in folder.iterdir()
        if file.is_file() and (file.suffix in _LOADED or file.name in (WEIGHTS, PLAN)) and file.name not in FOR_OTHERS
    )


def fp32_of(candidate: Candidate, candidates: Sequence[Candidate]) -> str | None:
    """The name of the fp32 candidate that was made from the same graph, if there is one beside ``candidate``."""
    return next(
        (
            other.name
            for other in candidates
            if other is not candidate and other.facts["graph"] and other.facts["precision"] == "fp32"
            and other.facts["graph"] == candidate.facts["graph"]
        ),
        None,
    )  # fmt: skip


def baseline_of(candidates: Sequence[Candidate]) -> Candidate | None:
    """The baseline among them."""
    return next((candidate for candidate in candidates if candidate.role == "baseline"), None)
