"""The run: for each round and model every engine in turn, each in a process of its own, one JSON line per cell.

A line is written as soon as its cell is measured, and a rerun leaves out every cell whose line is there for the same
engine, version, model, case and round: so a killed run goes on where it stopped. Each line has the machine's load when
its process began and the share of time that was stolen while it ran.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.cases import CASES, Case, Missing, measure, settle, value_of
from benchmarks.peers.catalogue import Peer
from benchmarks.peers.setup import ROOT, NotRun, Places, ensure, python_of, version_key, weight_bytes
from benchmarks.peers.shapes import Shape
from slmdeploy.errors import SlmdeployError
from slmdeploy.profiling.process import WorkerProcess

LIMITS = "limits"
_ASK_SECONDS = 300.0
_ANEW = {"missing": "it is opened anew for each measurement"}
Line = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure, for how many rounds, and until when no further process is begun (time.monotonic)."""

    shapes: tuple[Shape, ...]
    peers: tuple[Peer, ...]
    cases: tuple[Case, ...]
    rounds: int
    threads: int
    until: float = float("inf")


class Journal:
    """The lines of all runs so far, in a file that is only appended to."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[Line] = read_lines(file)
        self._done = {_key(line) for line in self.lines if "failed" not in line}

    def has(self, **key: object) -> bool:
        """Whether the cell was measured, or its engine said that it cannot; failures are tried again."""
        return _key(key) in self._done

    def write(self, line: Line) -> None:
        """Append a line, at once on disk."""
        with self._file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self.lines.append(line)
        if "failed" not in line:
            self._done.add(_key(line))


def read_lines(file: Path) -> list[Line]:
    """The lines of a journal; a last line that a killed run cut short is left out."""
    if not file.exists():
        return []
    text = file.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _key(line: dict[str, Any]) -> tuple[object, ...]:
    return tuple(line.get(name) for name in ("engine", "version", "model", "case", "round"))


def run(plan: Plan, journal: Journal, places: Places, say: Say) -> None:
    """All rounds, or as many as there is time for."""
    for round_ in range(plan.rounds):
        if not journal.has(engine=LIMITS, case=LIMITS, round=round_):
            journal.write(_limits(plan.threads, round_))
        for shape in plan.shapes:
            for peer in _rotated([peer for peer in plan.peers if peer.runs(shape)], round_):
                if time.monotonic() > plan.until:
                    say(f"out of time in round {round_ + 1}: the same command goes on from here")
                    return
                for threads, cases in by_threads(plan):
                    _turn(replace(plan, cases=cases), threads, journal, places, shape, peer, round_, say)


def by_threads(plan: Plan) -> list[tuple[int, tuple[Case, ...]]]:
    """The cases of each process: those that take the plan's threads, then those that have a number of their own."""
    threads = dict.fromkeys(case.threads or plan.threads for case in plan.cases)
    return [(n, tuple(case for case in plan.cases if (case.threads or plan.threads) == n)) for n in threads]


def _rotated(peers: Sequence[Peer], round_: int) -> Iterable[Peer]:
    """Every round begins with another engine, so that none always follows the same one."""
    start = round_ * 2 % len(peers) if peers else 0
    return [*peers[start:], *peers[:start]]


def _turn(
    plan: Plan, threads: int, journal: Journal, places: Places, shape: Shape, peer: Peer, round_: int, say: Say
) -> None:
    """One engine's process in one round: every cell that is not there yet."""
    key = {"engine": peer.name, "version": version_key(peer, shape, plan.threads), "model": shape.name, "round": round_}
    wanted = [case for case in plan.cases if case.applies(shape, peer.is_ours)]
    wanted = [case for case in wanted if not journal.has(**key, case=case.name)]
    if not wanted:
        return
    started, stolen = time.monotonic(), stolen_ticks()
    about: Line = {"load": os.getloadavg()[0], "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    reasons: dict[str, str] = {}

    def write(case: Case, outcome: Line) -> None:
        steal = stolen_share(stolen, stolen_ticks())
        journal.write({**key, "case": case.name, **outcome, **about, "steal": steal})
        reasons.update({str(why): case.name for name, why in outcome.items() if name in ("missing", "failed")})

    try:
        folder = ensure(peer, shape, places)
        command = worker_command(peer, folder, places, threads)
        with WorkerProcess(peer.name, command, threads=threads, timeout_s=_ASK_SECONDS) as client:
            about["versions"] = client.hello["versions"]
            for case, outcome in measured(client, wanted, shape, round_, weight_bytes(folder)):
                write(case, outcome)
    except NotRun as reason:
        for case in wanted:
            write(case, {"missing": places.hidden(str(reason))})
    except SlmdeployError as error:
        for case in wanted:
            if not journal.has(**key, case=case.name):
                write(case, {"failed": places.hidden(str(error))[:500]})
    took = f"{time.monotonic() - started:.0f} s"
    say(f"round {round_ + 1} {shape.name} {peer.name}, threads {threads}: {took} {'; '.join(reasons)}")


def worker_command(peer: Peer, folder: Path, places: Places, threads: int) -> list[str]:
    """The command of an engine's process."""
    options = ["--threads", str(threads), "--options", json.dumps(peer.options)]
    return [str(python_of(peer, places)), "-m", "benchmarks.peers.worker", peer.module, str(folder), *options]


def measured(
    client: Any, wanted: Sequence[Case], shape: Shape, round_: int, size: int
) -> Iterable[tuple[Case, dict[str, Any]]]:
    """Each case with its value and repetitions, or the reason why the engine has none."""
    first_ms, peak = settle(client, shape, round_)
    opened = client.hello["load_s"]
    figures = {"rss": (peak or 0) / 1e6, "size": size / 1e6}
    if opened is not None:
        figures["load"] = opened + first_ms / 1e3
    for case in wanted:
        if case.measure is None:
            value = figures.get(case.name)
            yield case, _ANEW if value is None else {"value": value, "repetitions": [value]}
            continue
        try:
            repetitions = measure(case, client, shape, round_)
        except Missing as reason:
            yield case, {"missing": str(reason)}
        else:
            yield case, {"value": value_of(repetitions), "repetitions": repetitions}


def _limits(threads: int, round_: int) -> Line:
    command = [sys.executable, "-m", "benchmarks.peers.limits", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    values = json.loads(done.stdout.splitlines()[-1])
    return {"engine": LIMITS, "case": LIMITS, "round": round_, "values": values, "load": os.getloadavg()[0]}


def stolen_ticks(file: Path = Path("/proc/stat")) -> tuple[int, int]:
    """Ticks stolen by the hypervisor and ticks in all since the machine started, over all cores."""
    ticks = [int(word) for word in file.read_text().splitlines()[0].split()[1:9]]
    return ticks[7], sum(ticks)


def stolen_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    """The share of time between two readings that was stolen."""
    return (after[0] - before[0]) / max(1, after[1] - before[1])


def default_cases() -> tuple[Case, ...]:
    """All of them."""
    return CASES
