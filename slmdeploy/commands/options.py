"""What several subcommands share: options of one meaning, the progress bar, and how a made artifact is printed."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Out = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; refused when it exists, unless --force.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an artifact that is at the output.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line of stdout.")]
Data = Annotated[
    str, typer.Option("--data", help="Folder of JSON lines, a .jsonl/.parquet/.txt file, a hub id, or 'stdlib'.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; default: what the build says.")]


def progress(quiet: bool = False) -> Any:
    """A bar on a terminal; silence elsewhere, and where ``quiet``."""
    from slmdeploy.console import BarProgress
    from slmdeploy.progress import SILENT

    return SILENT if quiet or not sys.stderr.isatty() else BarProgress()


def done(artifact: Any, as_json: bool) -> None:
    """Print what a verb made: the path for people, the manifest's result for machines."""
    from slmdeploy.console import print_json

    if as_json:
        summary = {"path": str(artifact.path), "kind": artifact.kind, "content_key": artifact.content_key}
        print_json({**summary, "result": artifact.result})
    else:
        print(artifact.path)
