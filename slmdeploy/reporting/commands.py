"""The commands that make a run again, step by step, from the plans in its manifests.

A verb's plan is its settings with all defaults, so what it says can be said on the command line; which settings have an
option is listed here, and tests parse every command. Where the folder of a run is, is left to the reader: paths are
those of a folder called RUN. Knows nothing of what a setting means.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slmdeploy.errors import InputError
from slmdeploy.reporting.records import Row, Run, Stage
from slmdeploy.specs import named_workload

_PRUNE = (
    "ratio", "attention_ratio", "query_ratio", "layer_ratio", "hidden_ratio", "method", "allocation",
    "calibration_tokens", "seed",
)  # fmt: skip
_DISTILL = (
    "steps", "batch_rows", "length", "gradient_accumulation", "learning_rate", "optimizer", "loss", "beta", "skew",
    "temperature", "ce_share", "score_share", "score_loss", "score_items", "hidden_weight", "attention_weight",
    "layer_map", "on_policy", "seq_kd_texts", "response_tokens", "sample_temperature", "cached_rows", "cached_top",
    "dtype", "gradient_checkpointing", "save_steps", "seed",
)  # fmt: skip
_FINETUNE = (
    "steps", "batch_rows", "length", "gradient_accumulation", "learning_rate", "gradient_checkpointing", "save_steps",
    "seed",
)  # fmt: skip
_OF_ENCODERS = (*_FINETUNE, "loss", "temperature", "ce_share", "relation_weight", "dtype")
_PACKAGE = ("kind", "max_bytes", "lock")
_EXPORT = ("dialect", "opset", "max_length", "pooling")
_TEACHER, _STUDENT = "TEACHER", "STUDENT"


def commands(run: Run) -> list[str]:
    """Shell lines, each one `slmdeploy` call: the whole run first where there was one, then its steps."""
    if not run.stages:
        return [shlex.join(_profile(run, [row.path for row in run.rows if _here(row)], "measurement", None))]
    found = [["slmdeploy", "run", f"{run.name}.toml", "-o", "RUN"]]
    folders = {stage.name: f"RUN/{stage.folder}" for stage in run.stages}
    for stage in run.stages:
        found += _steps(run, stage, folders)
    return [shlex.join(words) for words in found]


def _here(row: Row) -> bool:
    return row.role == "candidate" and not row.estimated


def _steps(run: Run, stage: Stage, folders: Mapping[str, str]) -> Iterator[list[str]]:
    out = ["-o", folders[stage.name]]
    teacher = run.baseline.path if run.baseline else _TEACHER
    data = ["--data", folders.get(stage.inputs.get("data", "data"), str(stage.plan.get("data", "DATA")))]
    builds = [folder for name, folder in folders.items() if name.startswith("build ")]
    verb = stage.name.split(" ")[0]
    if verb in ("prune", "finetune", "distill"):
        yield ["slmdeploy", verb, *_models(stage, folders, teacher), *out, *data, *_settings(stage, verb)]
    elif verb == "export":
        tasks = [word for task in stage.plan.get("tasks", ()) for word in ("--task", task)]
        labels = ["--labels", *stage.plan["labels"]] if stage.plan.get("labels") else []
        words = [*tasks, *labels, *_options(stage.plan, _EXPORT)]
        yield ["slmdeploy", "export", folders.get(stage.sources[0], teacher), *out, *words]
    elif verb == "build":
        named = ["--profile", stage.plan["profile"]["name"], "--target", stage.plan["target"]]
        yield ["slmdeploy", "build", folders.get(stage.sources[0], "GRAPH"), *out, *named, *data]
    elif verb == "profile":
        yield _profile(run, builds, folders[stage.name], data)
    elif verb == "estimate":
        target = stage.name.removeprefix("estimate ")
        yield ["slmdeploy", "estimate", *builds, *out, "--target", target, "--recipe", f"{run.name}.toml"]
    elif verb == "select":
        measured = [folder for name, folder in folders.items() if name.split(" ")[0] in ("profile", "estimate")]
        yield ["slmdeploy", "select", *measured, *out, *_budget(run)]
    elif verb == "package" and run.selection:
        source = folders.get(stage.inputs.get("measurement", ""))
        measured = ["--measurement", source] if source else []
        words = [*measured, *_options(stage.plan, _PACKAGE), *(["--try"] if stage.plan.get("trial") else [])]
        yield ["slmdeploy", "package", f"RUN/builds/{run.selection.chosen}", *out, *words]


def _models(stage: Stage, folders: Mapping[str, str], teacher: str) -> Iterator[str]:
    """The checkpoints that a stage of compression reads, in the order of its command line."""
    # Only an encoder's student may be another checkpoint than the teacher or what a stage made of it.
    own = {"student": _STUDENT} if "columns" in stage.plan else {}
    for name in ("checkpoint", "teacher", "student"):
        if name in stage.inputs:
            yield folders.get(stage.inputs[name], own.get(name, teacher))


def _settings(stage: Stage, verb: str) -> list[str]:
    """What a stage of compression was told: columns of an encoder's table, then options."""
    plan, columns = stage.plan, stage.plan.get("columns")
    words = _options(columns or {}, ("text", "pair") if verb == "prune" else ("text", "pair", "label"))
    if verb == "prune":
        goal = plan.get("goal")
        limit = ["--latency", goal["limit"], "--profile", goal["profile"]["name"]] if goal else []
        return [*words, *_options(plan, _PRUNE), *limit]
    if verb == "finetune":
        return [*words, *_options(plan["stage"], _FINETUNE), *(["--bf16"] if plan["stage"]["dtype"] == "bf16" else [])]
    return [*words, *_options(plan["stage"], _OF_ENCODERS if columns else _DISTILL)]


def _options(plan: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The settings of a plan as options; what is off or empty has none."""
    words: list[str] = []
    for name in names:
        value, option = plan.get(name), "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif isinstance(value, list | tuple):
            words += [word for one in value for word in (option, str(one))]
        elif value is not None and value is not False:
            words += [option, str(value)]
    return words


def _profile(run: Run, builds: Sequence[str], out: str, data: Sequence[str] | None) -> list[str]:
    """Shipped workloads by name, others by the recipe that has them."""
    plan = run.measurement.plan
    names = [str(workload["name"]) for workload in plan.get("workloads", ())]
    words = ["slmdeploy", "profile", *builds, "-o", out, *(data or ())]
    effort = plan.get("effort", {})
    words += _options({"precision": effort.get("precision"), "limit": effort.get("limit_s")}, ("precision", "limit"))
    words += [word for metric in plan.get("watch", ()) for word in ("--watch", str(metric))]
    if names and all(map(_shipped, plan["workloads"])):
        words += [word for name in names for word in ("--workload", name)]
    elif names:
        words += ["--recipe", f"{run.name}.toml"]
    return [*words, "--baseline", run.baseline.path] if run.baseline else words


def _shipped(workload: Mapping[str, Any]) -> bool:
    """Whether the name of a workload says all of it."""
    try:
        found = named_workload(str(workload["name"])).model_dump(mode="json")
    except InputError:
        return False
    return all(found.get(key) == value for key, value in workload.items())


def _budget(run: Run) -> list[str]:
    assert run.selection, "a run that has a step select has its selection"
    words = [word for limit in run.selection.budget for word in ("--budget", limit)]
    words += [word for limit in run.selection.preferences for word in ("--prefer", limit)]
    return [*words, "--objective", run.selection.objective]
