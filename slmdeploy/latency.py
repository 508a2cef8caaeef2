"""How long a checkpoint takes on this machine under a profile: exported, built and timed, once, and then remembered.

The clock that `prune --latency` shapes a model by. What it times is what would be deployed: the same export, the same
build, the same runtime. Quality gates are off, since the models are slices that say nothing sensible; nothing of them
is kept but their time. Knows nothing of how shapes are chosen.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from slmdeploy.building.build import build
from slmdeploy.building.timing import generation_seconds, turns
from slmdeploy.checkpoint import CONTEXT_FIELDS, read_config
from slmdeploy.compress.shapes import Goal
from slmdeploy.errors import InputError
from slmdeploy.exporting.export import export
from slmdeploy.profiling.hardware import Machine, detect
from slmdeploy.profiling.quality_cache import cache_folder
from slmdeploy.runtime.model import Model, load
from slmdeploy.specs import Gate, LatencyLimit, Profile, parse_latency
from slmdeploy.version import __version__

FORMAT = 1
STEPS = 16
"""New tokens that the time per token is a mean over."""
WARM_UP, ROUNDS = 2, 15
OPEN_GATE = Gate(max_kl=1e9, min_top1=0.0, max_ppl_ratio=1e9, min_cosine=0.0, max_logit_difference=1e9)


class BuildClock:
    """Times builds of checkpoints under one profile for one limit; ``table`` is the JSON file of what it knows."""

    def __init__(self, profile: Profile, limit: LatencyLimit, table: Path | None = None) -> None:
        if profile.engine == "tensorrt":
            raise InputError(
                f"profile {profile.name} has the engine tensorrt, whose builds nothing here can run and time: use a "
                "profile of the engines onnxruntime or openvino"
            )
        self.profile, self.limit = profile, limit
        self.table = table or cache_folder().parent / "latencies.json"
        self.machine = _machine(detect(bench=False))

    def identity(self) -> dict[str, Any]:
        """The profile and the limit."""
        return {"limit": str(self.limit), "profile": self.profile.model_dump(mode="json")}

    def check(self, checkpoint: Path) -> None:
        """Raise InputError for a checkpoint whose context is shorter than what is to be timed."""
        config = read_config(checkpoint)
        known = [config[name] for name in CONTEXT_FIELDS if isinstance(config.get(name), int)]
        needed = self.limit.tokens + 1 + self._steps
        if known and min(known) < needed:
            raise InputError(
                f"{self.limit} needs a context of {needed} tokens to be timed in, and {checkpoint} has {min(known)}: "
                "name fewer tokens"
            )

    def milliseconds(self, key: Mapping[str, Any], make: Callable[[Path], None]) -> float:
        """The median time of the checkpoint that ``make`` writes, from the table where ``key`` is known there."""
        about = {**key, **self.identity(), "machine": self.machine, "slmdeploy": __version__}
        del about["limit"]
        about["metric"] = f"{self.limit.metric}_{self.limit.tokens}_ms"
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        known = read_table(self.table)
        if name not in known:
            with tempfile.TemporaryDirectory(prefix="slmdeploy-latency-") as scratch:
                took = self._time(Path(scratch), make)
            # read again, since another process may have added to it meanwhile
            known = {**read_table(self.table), name: {"ms": took, **about, "profile": self.profile.name}}
            _write(self.table, known)
        return float(known[name]["ms"])

    @property
    def _steps(self) -> int:
        return 0 if self.limit.metric == "ttft" else STEPS

    def _time(self, scratch: Path, make: Callable[[Path], None]) -> float:
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir()
        make(checkpoint)
        graph = export(checkpoint, out=scratch / "graph", tasks=("generate",), parity=False).path
        open_profile = self.profile.model_copy(update={"gate": OPEN_GATE})
        made = build(graph, profile=open_profile, out=scratch / "build").path
        return time_model(load(made), self.limit)


def goal_of(text: str, profile: Profile, table: Path | None = None) -> Goal:
    """What `prune` takes as its goal: the limit that ``text`` says, on builds under ``profile`` on this machine."""
    limit = parse_latency(text)
    return Goal(limit, BuildClock(profile, limit, table))


def time_model(model: Model, limit: LatencyLimit) -> float:
    """Median milliseconds to the first token of a prompt of ``limit.tokens``, or per token behind it."""
    prompt = [1 + place % (model.runtime.vocab_size - 1) for place in range(limit.tokens)]
    steps = 0 if limit.metric == "ttft" else STEPS
    found = []
    for counts in turns(WARM_UP, ROUNDS):
        first, rest = generation_seconds(model, prompt, steps)
        if counts:
            found.append(1000 * (first if steps == 0 else rest / steps))
    return median(found)


def read_table(file: Path) -> dict[str, dict[str, Any]]:
    """The times that are known by key. Raises InputError for a file that is not such a table."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries: dict[str, dict[str, Any]] = content["entries"]
        if content["format"] != FORMAT or not all(0 < float(one["ms"]) < float("inf") for one in entries.values()):
            raise ValueError("it is of another format, or a time is no time")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no table of latencies ({error}): remove it, it will be measured again") from error
    return entries


def _write(file: Path, entries: dict[str, dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"format": FORMAT, "entries": entries}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def _machine(machine: Machine) -> dict[str, Any]:
    """Of a machine, what times depend on."""
    return {"cpu": machine.cpu, "arch": machine.arch, "threads": machine.threads, "engines": machine.engines}
