"""The command line: puts the subcommands together, turns every error into one sentence and an exit code.

The subcommands are in commands/: they parse, call one function and print, and nothing heavy is imported at their top.
Results go to stdout (with --json as one JSON object on the last line), everything else to stderr. Exit codes: 0 ok,
1 our bug, 2 bad input, 3 budget infeasible, 4 parity or quality gate failed or a regression found, 5 corrupt artifact,
6 out of disk, memory or permission, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from slmdeploy.commands import choosing, encoders, looking, making, measuring, running, serving
from slmdeploy.commands.options import Json, Out, progress
from slmdeploy.errors import InfeasibleError, SlmdeployError

app = typer.Typer(
    name="slmdeploy",
    help="Efficient small language models: from a teacher checkpoint to a verified package that meets a budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe (TOML), e.g. examples/quickstart.toml.")],
    output: Out,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Use this checkpoint as the teacher.")] = None,
    as_json: Json = False,
) -> None:
    """Do every step of a recipe in order; a second run does only what has changed."""
    from slmdeploy import console, pipeline

    outcome = pipeline.run(recipe, output, model=model, progress=progress(), say=console.say)
    if as_json:
        console.print_json(outcome.to_dict())
    else:
        console.print_outcome(outcome)
    if not outcome.feasible:
        raise InfeasibleError(outcome.reason)


for _command in (
    making.prune,
    making.distill,
    encoders.finetune,
    making.export,
    making.build,
    making.recompile,
    measuring.profile,
    measuring.estimate,
    choosing.select,
    choosing.plan,
    measuring.evaluate,
    measuring.verify_budget,
    choosing.package,
    choosing.unpack,
    choosing.report,
    looking.verify,
    running.generate,
    running.score,
    running.embed,
    running.classify,
    serving.serve,
    looking.doctor,
    looking.targets,
    looking.profiles,
):
    app.command()(_command)


def version(show: bool) -> None:
    """Print the version and leave."""
    if show:
        from slmdeploy.version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Efficient small language models: from a teacher checkpoint to a verified package that meets a budget."""


def main() -> None:
    """The console script: every error of ours is one sentence on stderr and the exit code of its class."""
    try:
        app()
    except SlmdeployError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
