"""Commands: each that a report gives is one that the command line takes, with the settings of the plan."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from slmdeploy.reporting.commands import commands
from slmdeploy.reporting.reading import read_run
from slmdeploy.reporting.records import Run
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
