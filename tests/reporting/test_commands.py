"""Commands: each that a report gives is one that the command line takes, with the settings of the plan."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.reporting.commands import commands
from slmdeploy.reporting.reading import read_run
from slmdeploy.reporting.records import Run, Stage
from slmdeploy.specs import DistillStage, EncoderStage, PrunePlan
from tests.test_docs import parse


def test_every_command_parses(run: Run, run_folder: Path) -> None:
    found = [*commands(run), *commands(read_run(run_folder / "measurement"))]
    assert len(found) == 12
    for line in found:
        name, *arguments = shlex.split(line)
        assert name == "slmdeploy"
        parse(arguments)


@pytest.mark.parametrize(
    "part",
    [
        "run synthetic.toml -o RUN",
        "prune teacher -o RUN/pruned --data RUN/data --ratio 0.5 --method osscar --seed 0",
        "distill teacher RUN/pruned -o RUN/distilled-1 --data RUN/data --steps 240 --loss forward_kl",
        "export RUN/distilled-1 -o RUN/graph --task generate --task score --labels ' no' ' yes'",
        "build RUN/graph -o RUN/builds/cpu-int4 --profile cpu-int4 --target x86-64-avx512-vnni --data RUN/data",
        "--precision 0.05 --limit 6.0 --watch score_ms_p99 --recipe synthetic.toml --baseline teacher",
        "estimate RUN/builds/cpu-fp32 RUN/builds/cpu-int8 RUN/builds/cpu-int8-split RUN/builds/cpu-int4 "
        "-o RUN/estimates/x86-64-amx.json --target x86-64-amx --recipe synthetic.toml",
        "select RUN/measurement RUN/estimates/x86-64-amx.json -o RUN/selection --budget 'auc_ratio >= 0.95'",
    ],
)
def test_commands_hold_the_plan(run: Run, part: str) -> None:
    assert part in "\n".join(commands(run))


def stage(run: Run, name: str, plan: dict[str, Any], folder: str = "made", **inputs: str) -> Run:
    """The run with this stage alone."""
    return replace(run, stages=(Stage(name, folder, "0" * 64, 1.0, False, plan, inputs),))


def last(run: Run) -> str:
    """The last command, which the command line takes."""
    line = commands(run)[-1]
    parse(shlex.split(line)[1:])
    return line


def test_every_setting_of_a_stage_that_is_an_option_is_said(run: Run) -> None:
    settings = DistillStage(steps=3, loss="skew_kl", skew=0.2, layer_map=(0, 3), hidden_weight=0.5).model_dump(
        mode="json"
    )
    line = last(stage(run, "distill 1", {"stage": settings}, data="data", teacher="teacher", student="student"))
    for name, value in settings.items():
        if name in ("warmup_share", "eval_rows", "beta", "gradient_checkpointing", "layer_map"):
            continue  # no option, or off; the last is below
        assert f"--{name.replace('_', '-')} {value}" in line
    assert "--layer-map 0 --layer-map 3" in line
    assert line.startswith("slmdeploy distill teacher teacher -o RUN/made --data DATA "), "none was pruned"
    shares = PrunePlan(ratio=0.5, hidden_ratio=0.25, allocation="global", attention_ratio=0.0).settings
    line = last(stage(run, "prune", shares, data="data", checkpoint="checkpoint"))
    assert all(f"--{name.replace('_', '-')} {value}" in line for name, value in shares.items())


def test_a_later_round_prunes_what_the_training_before_it_made(run: Run) -> None:
    plan = {"ratio": None, "goal": {"limit": "ttft_512_ms<=20", "profile": {"name": "cpu-int4"}}}
    (pruned,) = stage(run, "prune 2", plan, data="data", checkpoint="distill between 1").stages
    (between,) = stage(
        run, "distill between 1", {"stage": {"steps": 2}}, "between", teacher="teacher", student="prune 1"
    ).stages
    line = last(replace(run, stages=(between, pruned)))
    assert line.startswith("slmdeploy prune RUN/between -o RUN/made")
    assert line.endswith("--latency 'ttft_512_ms<=20' --profile cpu-int4")


def test_an_encoders_stages_name_its_columns(run: Run) -> None:
    columns = {"text": "review", "pair": None, "label": "mood"}
    stages = EncoderStage(steps=3, dtype="bf16").model_dump(mode="json")
    line = last(stage(run, "finetune", {"stage": stages, "columns": columns}, checkpoint="checkpoint"))
    assert "finetune teacher -o RUN/made --data DATA --text review --label mood --steps 3" in line
    assert line.endswith("--bf16")
    plan = {"stage": stages, "columns": columns}
    line = last(stage(run, "distill 1", plan, teacher="teacher", student="student"))
    assert "distill teacher STUDENT -o RUN/made --data DATA --text review --label mood --steps 3" in line
    line = last(stage(run, "prune", {"ratio": 0.5, "columns": columns}, checkpoint="checkpoint"))
    assert "--text review --ratio 0.5" in line


def test_a_package_says_its_kind(run: Run) -> None:
    plan = {"kind": "server", "max_bytes": 9, "trial": True}
    (measured,) = stage(run, "profile", {}, "measurement").stages
    (made,) = stage(run, "package", plan, "package", build="build", measurement="profile").stages
    line = last(replace(run, stages=(measured, made)))
    assert line.endswith("-o RUN/package --measurement RUN/measurement --kind server --max-bytes 9 --try")


def test_workloads_whose_name_says_all_are_named(run: Run) -> None:
    lengths = {"prompt_tokens": 128, "new_tokens": 64}
    known = {"name": "generate-128-64", "task": "generate", **lengths}
    other = known | {"prompt_tokens": 129}
    for workloads, said in (([known], "--workload generate-128-64"), ([known, other], "--recipe synthetic.toml")):
        plan = run.measurement.plan | {"workloads": workloads}
        changed = replace(run, measurement=run.measurement.model_copy(update={"plan": plan}))
        assert said in "\n".join(commands(changed))


def test_words_that_a_shell_would_read_are_quoted(run: Run) -> None:
    rows = [row.model_copy(update={"path": "a; rm -rf $HOME"}) for row in run.rows]
    alone = replace(run, measurement=run.measurement.model_copy(update={"rows": rows}), stages=())
    (line,) = commands(alone)
    assert "a; rm -rf $HOME" in shlex.split(line)
