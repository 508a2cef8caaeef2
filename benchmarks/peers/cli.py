"""The command line of the comparison: choose, prepare, run, write the page."""

import fnmatch
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from benchmarks.peers import page
from benchmarks.peers.cases import CASES
from benchmarks.peers.catalogue import PEERS, Peer, ik_peers, our_peers
from benchmarks.peers.rounds import Journal, Plan, run
from benchmarks.peers.setup import ROOT, NotRun, Places, ensure
from benchmarks.peers.shapes import SHAPES, Shape

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_MODELS = "smollm2-135m,qwen2.5-0.5b,llama-3.2-1b,minilm-6-384,bert-base"
_QUICK = {"models": "smollm2-135m,minilm-6-384", "cases": "ttft_512,decode_1,balanced,encode_*,rss,load,size"}
T = TypeVar("T")


def chosen(given: str, named: Iterable[tuple[str, T]], what: str) -> tuple[T, ...]:
    """Everything whose name matches one of the comma-separated patterns, in the order of the patterns."""
    named = list(named)
    found: dict[str, T] = {}
    for pattern in filter(None, map(str.strip, given.split(","))):
        hits = {name: one for name, one in named if fnmatch.fnmatch(name, pattern)}
        if not hits:
            raise typer.BadParameter(
                f"no {what} is called {pattern!r}; there are {', '.join(name for name, _ in named)}"
            )
        found |= hits
    return tuple(found.values())


@app.command(help=__doc__)
def main(
    models: Annotated[str, typer.Option(help="names or patterns, separated by commas")] = _MODELS,
    engines: Annotated[str, typer.Option(help="names or patterns; slmdeploy's are 'slmdeploy PROFILE'")] = "*",
    cases: Annotated[str, typer.Option(help="names or patterns")] = "*",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    minutes: Annotated[float, typer.Option(help="begin no further process after this time")] = float("inf"),
    threads: Annotated[int, typer.Option(min=1)] = 2,
    work: Annotated[Path, typer.Option(help="checkpoints, builds and the journal of cells")] = ROOT / "work/cpu_peers",
    envs: Annotated[Path | None, typer.Option(help="environments of the engines; default: WORK/envs")] = None,
    ik: Annotated[Path | None, typer.Option(help="compiled tree of ik_llama.cpp, with bin/llama-bench")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="one decoder, one encoder, few cases, ten minutes")] = False,
    keep_builds: Annotated[bool, typer.Option(help="run our builds though sources have changed since")] = False,
    machine: Annotated[str, typer.Option(help="a name for the results, to keep those of several machines")] = "",
    prepare_only: Annotated[bool, typer.Option("--prepare-only")] = False,
    report_only: Annotated[bool, typer.Option("--report-only")] = False,
) -> None:
    """Measure and write the page."""
    console = Console(stderr=True, highlight=False)
    if quick:
        models, cases, minutes, rounds = _QUICK["models"], _QUICK["cases"], min(minutes, 10.0), min(rounds, 3)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work.absolute() / "inductor"))
    table = (*our_peers(), *PEERS, *(ik_peers(str(ik.absolute())) if ik else ()))
    shapes = chosen(models, SHAPES.items(), "model")
    peers = chosen(engines, [(peer.name, peer) for peer in table], "engine")
    places = Places(work.absolute(), (envs or work / "envs").absolute(), keep_builds)
    journal = Journal(work / "cells.jsonl")
    if not report_only:
        prepare(shapes, peers, places, console)
    if not (prepare_only or report_only):
        columns = chosen(cases, [(case.name, case) for case in CASES], "case")
        until = time.monotonic() + minutes * 60
        run(Plan(shapes, peers, columns, rounds, threads, until), journal, places, console.print)
    if not prepare_only:
        write_page(journal, table, threads, machine, console)


def prepare(shapes: Sequence[Shape], peers: Sequence[Peer], places: Places, console: Console) -> None:
    """Everything that takes long and is no part of a figure; what cannot be had is said and left to the report."""
    for shape in shapes:
        for peer in peers:
            if not peer.runs(shape):
                continue
            started = time.monotonic()
            try:
                ensure(peer, shape, places)
            except NotRun as reason:
                console.print(f"{shape.name} {peer.name}: not run: {reason}")
            else:
                if time.monotonic() - started > 1:
                    console.print(f"{shape.name} {peer.name}: made in {time.monotonic() - started:.0f} s")


def write_page(journal: Journal, table: Sequence[Peer], threads: int, machine: str, console: Console) -> None:
    """The summary that is committed, and the page that is made of it."""
    for file in page.write(journal.lines, table, ROOT, threads, machine):
        console.print(f"wrote {file}")
