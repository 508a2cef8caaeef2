"""What N processes with one build each take in memory, as the build is and prepacked: peak, share, load time.

    python benchmarks/memory_sharing.py BUILD [BUILD ...] [--processes 4] [--rounds 3] [--scratch FOLDER]

Each BUILD (a folder that generates) is measured as it is and as a copy that building/prepacking.py has worked on. In
every round each of the two is opened by one process after the other, which computes a prompt and some steps and then
stays; what counts is read from /proc once all have come so far (Linux only). Last, one process opens the folder as many
times. Figures are MB of 10^6 bytes: medians over rounds. The last line on stdout is one JSON object.

load_s     opening the folder and computing a prompt of 32 tokens, of the first process, whose file is in the page cache
peak       VmHWM of the first process: the most that was ever resident
private    anonymous memory, resident or swapped, mean of the processes: what one more process costs at least
together   sum of Pss over all processes: what all of them take, shared pages counted once
sessions   Pss of one process that holds as many models
file       model.onnx.data
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slmdeploy.building.prepacking import prepack
from slmdeploy.runtime.model import Model, load

PROMPT, STEPS = 32, 8
MB = 1e6


def work(folder: str, models: int) -> None:
    """What a child does: opens the folder, computes, says what it took and waits for its input to end."""
    started = time.perf_counter()
    opened = [_used(folder) for _ in range(models)]
    print(json.dumps({"load_s": (time.perf_counter() - started) / models, "models": len(opened)}), flush=True)
    sys.stdin.read()


def _used(folder: str) -> Model:
    model = load(folder, verify=False)
    ids = [i % model.runtime.vocab_size for i in range(PROMPT)]
    list(model.generate_ids(ids, max_new_tokens=STEPS, ignore_eos=True))
    return model


class Child:
    """A process that holds models of a folder until it is ended."""

    def __init__(self, folder: Path, models: int) -> None:
        command = [sys.executable, __file__, "--child", str(models), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.load_s: float = json.loads(self.process.stdout.readline())["load_s"]

    def memory(self) -> dict[str, float]:
        """Bytes by the names of /proc: smaps_rollup's, and VmHWM."""
        proc = Path("/proc") / str(self.process.pid)
        lines = (proc / "smaps_rollup").read_text().splitlines()[1:] + (proc / "status").read_text().splitlines()
        fields = [line.replace(":", "").split() for line in lines if line.endswith(" kB")]
        return {name: int(value) * 1024 for name, value, _ in fields}

    def end(self) -> None:
        """End the process and wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(folder: Path, processes: int) -> dict[str, float]:
    """One round."""
    children = [Child(folder, 1) for _ in range(processes)]
    memories = [child.memory() for child in children]
    for child in children:
        child.end()
    several = Child(folder, processes)
    in_one = several.memory()
    several.end()
    return {
        "load_s": children[0].load_s,
        "peak": memories[0]["VmHWM"] / MB,
        "private": statistics.mean(memory["Anonymous"] + memory["Swap"] for memory in memories) / MB,
        "together": sum(memory["Pss"] for memory in memories) / MB,
        "sessions": in_one["Pss"] / MB,
        "file": (folder / "model.onnx.data").stat().st_size / MB,
    }


def main() -> None:
    """Measure every build, as it is and prepacked, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("builds", type=Path, nargs="+")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="where the prepacked copies are made (default: the system's)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work(str(options.builds[0]), options.child)
        return
    rows = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for build in options.builds:
            packed = Path(scratch) / build.name
            shutil.copytree(build, packed)
            prepack(packed)
            os.sync()  # pages that wait to be written count as private
            rounds = [[measure(folder, options.processes) for folder in (build, packed)] for _ in range(options.rounds)]
            for name, turns in zip((build.name, f"{build.name}, prepacked"), zip(*rounds, strict=True), strict=True):
                rows[name] = {key: round(statistics.median(turn[key] for turn in turns), 2) for key in turns[0]}
            shutil.rmtree(packed)
    print(f"{'build':40}" + "".join(f"{key:>11}" for key in next(iter(rows.values()))))
    for name, row in rows.items():
        print(f"{name:40}" + "".join(f"{value:11.1f}" for value in row.values()))
    print(json.dumps({"processes": options.processes, "rounds": options.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
