"""Writes the committed results and what is made of them: docs/performance.md and its plots.

`files` is a pure function of the results and the notes, which the tests hold the committed files to.
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
from benchmarks.peers.summary import LIMITS, Line, Results, summarise

RESULTS = Path("benchmarks/results/cpu_peers.json")
NOTES = Path("benchmarks/results/cpu_peers_notes.md")
"""Text by hand for the page: what limits the cells that miss their goal, and what was tried."""
PAGE = Path("docs/performance.md")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def files(data: dict[str, Any], notes: str) -> dict[Path, str]:
    """Every file that follows from the results, by its path in the repository."""
    results = Results(data)
    plots = {PAGE.parent / f"performance-{model}.svg": plot(results, model) for model in results.models}
    return {PAGE: render(data, notes, [file.name for file in plots]), **plots}


def write(lines: Sequence[Line], peers: Sequence[Peer], root: Path, threads: int) -> list[Path]:
    """Summarise a journal and write results, page and plots; returns what was written."""
    rounds = {line["round"] for line in lines if line["engine"] != LIMITS}
    data = summarise(lines, peers, {**about(root, threads), "rounds": len(rounds)})
    made = {RESULTS: json.dumps(data, indent=1, ensure_ascii=False) + "\n"}
    made |= files(data, (root / NOTES).read_text() if (root / NOTES).exists() else "")
    for file, text in made.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return list(made)


def about(root: Path, threads: int) -> dict[str, Any]:
    """Machine, commit and date."""
    from slmdeploy.profiling.hardware import detect

    machine = detect(bandwidth=False)
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
