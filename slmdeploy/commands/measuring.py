"""Figures of builds: profile here or elsewhere, estimate, evaluate, and of servers: verify-budget."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from slmdeploy.commands.options import Force, Json, Out, Threads, progress
from slmdeploy.errors import InfeasibleError, InputError


def profile(
    builds: Annotated[list[Path], typer.Argument(help="Build, graph or package folders.")],
    output: Out,
    workload: Annotated[
        list[str] | None, typer.Option(help="Such as generate-128-64, or a .toml or trace .jsonl; may be repeated.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Take the workloads of this recipe.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data folder for quality.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Checkpoint to run beside them in torch eager.")] = None,
    watch: Annotated[
        list[str] | None, typer.Option(help="Metric whose interval must become narrow; may be repeated.")
    ] = None,
    precision: Annotated[float, typer.Option(min=0.001, max=1.0, help="How narrow, as a share of the value.")] = 0.05,
    limit: Annotated[float, typer.Option(min=0.1, help="Most seconds of a build under one workload.")] = 6.0,
    search: Annotated[
        bool, typer.Option("--search", help="First find the session options under which each build is fastest.")
    ] = False,
    draft: Annotated[
        Path | None, typer.Option(help="A smaller build: measure each build with it as draft too, on text of --data.")
    ] = None,
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="Measure each build with prompt lookup too, on text of --data.")
    ] = False,
    threads: Threads = None,
    remote: Annotated[
        str | None, typer.Option(help="user@host or user@host:port: measure there, over ssh; -o is a .json file.")
    ] = None,
    remote_python: Annotated[str, typer.Option(help="Python on that machine: a name or an absolute path.")] = "python3",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure speed and quality of builds on this machine, interleaved."""
    from slmdeploy import console
    from slmdeploy.checkpoint import resolve_checkpoint
    from slmdeploy.profiling.drafts import Drafts
    from slmdeploy.profiling.profile import EFFORT, measured_rows, profile_to_file
    from slmdeploy.profiling.profile import profile as verb
    from slmdeploy.profiling.remote import profile_options, profile_remote
    from slmdeploy.specs import choose_workloads

    options: dict[str, Any] = {
        "workloads": choose_workloads(workload or [], recipe),
        "data": data,
        "baseline": resolve_checkpoint(baseline) if baseline else None,
        "effort": replace(EFFORT, precision=precision, limit_s=limit),
        "watch": tuple(watch or ()),
        "threads": threads,
        "search": search,
        "drafts": Drafts(draft, prompt_lookup),
        "force": force,
        "progress": progress(as_json),
    }
    if threads is not None and search:
        raise InputError(f"--threads {threads} does not go with --search, which finds them: leave one out")
    if remote and (draft or prompt_lookup):
        raise InputError("--draft and --prompt-lookup do not go with --remote: measure them on that machine itself")
    if remote:
        files = (recipe, data, options["baseline"])
        words = profile_options(workload or [], *files, watch or [], precision, limit, threads, search)
        made = profile_remote(remote, builds, words, output, python=remote_python, force=force)
    elif output.suffix == ".json":
        made = profile_to_file(builds, out=output, **options)
    else:
        made = verb(builds, out=output, **options).path
    rows = measured_rows(made)
    if as_json:
        console.print_json({"path": str(made), "rows": rows})
    else:
        console.out_console().print(console.measurement_table(rows))


def estimate(
    builds: Annotated[list[Path], typer.Argument(help="Build, graph or package folders of ONNX Runtime.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .json file to write.")],
    target: Annotated[str, typer.Option("--target", help="Shipped name or .toml of the hardware.")],
    workload: Annotated[list[str] | None, typer.Option(help="Such as generate-128-64; may be repeated.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Take the workloads of this recipe.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Costs fitted on another machine; default: the shipped ones.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Estimate the speed and memory of builds on hardware that is not here, labelled as estimated."""
    from slmdeploy import console
    from slmdeploy.profiling.estimate import estimate as verb
    from slmdeploy.profiling.profile import measured_rows
    from slmdeploy.specs import choose_workloads, load_target

    made = verb(
        builds,
        target=load_target(target),
        workloads=choose_workloads(workload or [], recipe),
        out=output,
        calibration=calibration,
        force=force,
    )
    rows = measured_rows(made)
    if as_json:
        console.print_json({"path": str(made), "rows": rows})
    else:
        console.out_console().print(console.measurement_table(rows))
        console.say(f"estimated, not measured: {rows[0]['basis']}")


def evaluate(
    build: Annotated[Path, typer.Argument(help="Graph, build or package folder that generates.")],
    tasks: Annotated[str, typer.Option(help="Names or patterns of tasks with commas between: hellaswag,mmlu_*")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many documents of each task.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples shown; default: what tasks say.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further tasks (.yaml).")] = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run tasks of EleutherAI's evaluation harness on a build (extra `eval`)."""
    from slmdeploy import console, console_evaluation
    from slmdeploy.evaluation.evaluate import evaluate as verb

    report = verb(
        build,
        tasks=[name.strip() for name in tasks.split(",") if name.strip()],
        out=output,
        limit=limit,
        fewshot=fewshot,
        include_path=include_path,
        threads=threads,
        force=force,
        progress=progress(as_json),
    )
    if as_json:
        console.print_json({"path": str(output), **report})
    else:
        console_evaluation.print_evaluation(report)


def verify_budget(
    url: Annotated[str, typer.Argument(help="Where the server is: http://HOST:PORT.")],
    recipe: Annotated[Path, typer.Option(help="The recipe whose workloads are sent and whose budget must hold.")],
    model: Annotated[str, typer.Option(help="The model to ask for; default: the first of /v1/models.")] = "",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with the model's tokenizer.json: texts to score or encode need it.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Where the server runs, for limits that are for one target.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key that the server asks for.")] = None,
    limit: Annotated[float, typer.Option(min=0.1, help="Most seconds of load under one workload.")] = 6.0,
    as_json: Json = False,
) -> None:
    """Send the profiler's load to a live server and say whether it keeps the budget (exit 3 where not)."""
    from slmdeploy import console, console_selection
    from slmdeploy.profiling.live import verify_budget as verb
    from slmdeploy.profiling.live_http import Server, read_key
    from slmdeploy.profiling.profile import EFFORT
    from slmdeploy.specs import load_recipe

    asked = load_recipe(recipe)
    report = verb(
        Server.at(url, model, None if api_key_file is None else read_key(api_key_file)),
        workloads=asked.workload,
        budget=asked.parsed_budget(),
        tokenizer=tokenizer,
        target=target,
        effort=replace(EFFORT, limit_s=limit),
        progress=progress(as_json),
    )
    if as_json:
        console.print_json(report.to_dict())
    else:
        console_selection.print_live(report)
    if not report.passed:
        raise InfeasibleError(f"the server does not keep the budget: {'; '.join(report.reasons)}")
