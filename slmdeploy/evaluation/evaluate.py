"""The verb `evaluate`: tasks of EleutherAI's evaluation harness on a build, into one JSON file.

The figures are the harness' own, metric by metric with their standard errors; this says for which build they hold and
how they came about. They stay apart from measurements, because they say nothing about a machine.
Knows neither how requests are answered nor what tasks consist of.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmdeploy.artifacts import scratch
from slmdeploy.errors import InputError, OutputExistsError
from slmdeploy.extras import require
from slmdeploy.progress import SILENT, Progress
from slmdeploy.runtime.bundle import read_manifest
from slmdeploy.runtime.model import Model, load
from slmdeploy.version import __version__

if TYPE_CHECKING:
    from slmdeploy.evaluation.harness import BuildModel

RESAMPLES = 1000
"""Resamples behind the standard errors of metrics that have no formula for it, such as perplexity: 2 % of the error."""


def evaluate(
    build: Path,
    *,
    tasks: Sequence[str],
    out: Path,
    limit: int | None = None,
    fewshot: int | None = None,
    include_path: Path | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run ``tasks`` on a graph, build or package that generates; writes ``out`` (JSON) and returns what is in it.

    ``limit`` takes so many documents of each task, ``fewshot`` shows so many solved ones before each instead of what
    the task says, ``include_path`` is a folder of further tasks. docs/measurement.md has the form of the file. Raises
    MissingExtraError without the extra `eval`, OutputExistsError, InputError for an encoder, a build that does not
    generate, and a task that is unknown, cannot be loaded or asks for what builds do not do.
    """
    if out.is_dir() or (out.exists() and not force):
        raise OutputExistsError(f"{out} exists already: name another .json file, or pass --force to replace a file")
    require("eval", "lm_eval")
    from slmdeploy.evaluation.catalogue import Catalogue
    from slmdeploy.evaluation.harness import BuildModel

    model = generating(build, threads)
    catalogue = Catalogue(include_path)
    names = catalogue.names(tasks)
    answering = BuildModel(model, progress)
    plan = {"tasks": names, "limit": limit, "fewshot": fewshot, "resamples": RESAMPLES}
    report = _about(build, model) | {"plan": plan} | _run(answering, catalogue, plan)
    with scratch(out, "evaluation") as folder:
        file = folder / out.name
        file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        file.replace(out)
    return report


def generating(build: Path, threads: int | None) -> Model:
    """The model of a folder that can generate; InputError for any other."""
    model = load(build, threads=threads)
    if "generate" not in model.tasks:
        raise InputError(f"{build} was made for {' and '.join(model.tasks)} alone: export it with --task generate")
    return model


def _run(answering: "BuildModel", catalogue: Any, plan: Mapping[str, Any]) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    with redirect_stdout(sys.stderr):  # the harness prints remarks, and stdout holds results alone
        found = simple_evaluate(
            answering,
            tasks=list(plan["tasks"]),
            task_manager=catalogue,
            limit=plan["limit"],
            num_fewshot=plan["fewshot"],
            bootstrap_iters=plan["resamples"],
            log_samples=False,
        )
    return {
        "results": {name: _task(name, row, found) for name, row in found["results"].items()},
        "cut_contexts": answering.cut,
    }


def _about(build: Path, model: Model) -> dict[str, Any]:
    manifest = read_manifest(build)
    return {
        "schema": 1,
        "slmdeploy": __version__,
        "lm_eval": version("lm_eval"),
        "made": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "build": {
            "path": str(build),
            "kind": manifest.kind,
            "content_key": manifest.content_key,
            "precision": model.runtime.precision,
            "max_length": model.runtime.max_length,
        },
    }


def _task(name: str, row: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """A task, or a group of tasks, as it stands in the file."""
    better = found["higher_is_better"].get(name, {})
    metrics = []
    for key in (key for key in row if "," in key):
        metric, _, chosen = key.partition(",")
        if not metric.endswith("_stderr"):
            error = _number(row.get(f"{metric}_stderr,{chosen}"))
            one = {"metric": metric, "filter": chosen, "value": _number(row[key]), "stderr": error}
            metrics.append(one | {"higher_is_better": better.get(metric)})
    return {
        "version": found["versions"].get(name),
        "fewshot": found["n-shot"].get(name),
        "documents": row.get("sample_len"),
        "metrics": metrics,
    }


def _number(value: object) -> float | None:
    """A finite number as JSON has it; None for what the harness could not compute."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
