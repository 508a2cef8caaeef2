"""Writes the committed results and what is made of them: docs/performance.md and its plots.

Results of a further machine have a name, which stands in the names of all their files. `files` is a pure function of
the results and the notes, which the tests hold the committed files to.
"""

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.catalogue import Peer
from benchmarks.peers.plots import plot
from benchmarks.peers.report import render
from benchmarks.peers.summary import Line, Results, summarise

RESULTS = Path("benchmarks/results")
PAGES = Path("docs")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def results_file(machine: str = "") -> Path:
    """The committed results of a machine."""
    return RESULTS / f"cpu_peers{_named(machine)}.json"


def notes_file(machine: str = "") -> Path:
    """Text by hand for its page: what limits the cells that miss their goal, and what was tried."""
    return RESULTS / f"cpu_peers{_named(machine)}_notes.md"


def _named(machine: str) -> str:
    return f"-{machine}" if machine else ""


def files(data: dict[str, Any], notes: str, machine: str = "") -> dict[Path, str]:
    """Every file that follows from the results, by its path in the repository."""
    results, stem = Results(data), f"performance{_named(machine)}"
    plots = {model: PAGES / f"{stem}-{model}.svg" for model in results.models}
    page = render(data, notes, {model: file.name for model, file in plots.items()}, results_file(machine).as_posix())
    return {PAGES / f"{stem}.md": page} | {file: plot(results, model) for model, file in plots.items()}


def write(lines: Sequence[Line], peers: Sequence[Peer], root: Path, threads: int, machine: str) -> list[Path]:
    """Summarise a journal and write results, page and plots; returns what was written."""
    data = summarise(lines, peers, about(root, threads))
    made = {results_file(machine): json.dumps(data, indent=1, ensure_ascii=False) + "\n"}
    notes = root / notes_file(machine)
    made |= files(data, notes.read_text(encoding="utf-8") if notes.exists() else "", machine)
    for file, text in made.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return list(made)


def about(root: Path, threads: int) -> dict[str, Any]:
    """Machine, commit and date."""
    from slmdeploy.profiling.hardware import detect

    machine = detect(bench=False)
    described = {
        "cpu": machine.cpu,
        "threads": threads,
        "memory_bytes": machine.memory_bytes,
        "system": f"{platform.system()} {machine.arch}",
        "isa": [flag for flag in _FLAGS if machine.isa and flag in machine.isa],
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    )
    return {"made": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit.stdout.strip(), "machine": described}
