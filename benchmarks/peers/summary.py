"""From the lines of a journal to the figures of the page: medians with spread, ratios to peers, shares of limits.

Pure functions of data. `summarise` makes the JSON that is committed; `Results` reads it for the page.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.peers.cases import CASES, Case
from benchmarks.peers.catalogue import Peer
from benchmarks.peers.shapes import SHAPES

FORMAT = 1
LIMITS = "limits"
Line = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median, quartile range as a share of it, and over how many rounds."""

    median: float
    spread: float
    rounds: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; the spread of a single one is 0."""
    middle = statistics.median(values)
    if len(values) < 2:
        return Spread(middle, 0.0, len(values))
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, (high - low) / middle if middle else 0.0, len(values))


def newest(lines: Iterable[Line]) -> list[Line]:
    """The lines of the newest version that ran each case of a model, a later line in the place of an earlier one."""
    lines = list(lines)
    version = {(line["engine"], line["model"], line["case"]): line["version"] for line in lines if "version" in line}
    found: dict[tuple[object, ...], Line] = {}
    for line in lines:
        if line["engine"] == LIMITS or version[line["engine"], line["model"], line["case"]] == line["version"]:
            found[line["engine"], line.get("model"), line["case"], line["round"]] = line
    return list(found.values())


def summarise(lines: Iterable[Line], peers: Sequence[Peer], about: dict[str, Any]) -> dict[str, Any]:
    """The committed JSON: ``about`` (machine, commit, date), load and steal, limits, engines, cells."""
    kept = newest(lines)
    measured = [line for line in kept if line["engine"] != LIMITS]
    names = {line["engine"] for line in measured}
    versions = {line["engine"]: line["versions"] for line in measured if "versions" in line}
    return {
        "format": FORMAT,
        **about,
        "load": _range([line["load"] for line in measured if "load" in line]),
        "steal": _range([line["steal"] for line in measured if "steal" in line]),
        "limits": _limits([line["values"] for line in kept if line["engine"] == LIMITS]),
        "engines": [_engine(peer, versions.get(peer.name, {})) for peer in peers if peer.name in names],
        "cells": list(_cells(measured)),
    }


def _engine(peer: Peer, versions: dict[str, str]) -> dict[str, Any]:
    return {
        "name": peer.name,
        "ours": peer.is_ours,
        "weight_bits": peer.weight_bits,
        "scoring": peer.scoring,
        "form": asdict(peer.form),
        "versions": versions,
    }


def _range(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "highest": max(values)} if values else None


def _limits(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {name: asdict(spread([values[name] for values in rounds])) for name in (rounds[0] if rounds else {})}


def _cells(lines: Sequence[Line]) -> Iterable[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["engine"], line["model"], line["case"]), []).append(line)
    for (engine, model, case), group in groups.items():
        values = [line["value"] for line in group if "value" in line]
        cell: dict[str, Any] = {"engine": engine, "model": model, "case": case}
        if values:
            yield cell | asdict(spread(values))
        else:
            yield cell | {"reason": next(line.get("missing") or line["failed"] for line in reversed(group))}


class Results:
    """The committed JSON, with the questions that the page asks of it."""

    def __init__(self, data: dict[str, Any]) -> None:
        if data.get("format") != FORMAT:
            raise ValueError(f"results have format {data.get('format')!r}, and this page reads {FORMAT}")
        self.data = data
        self.engines: dict[str, dict[str, Any]] = {engine["name"]: engine for engine in data["engines"]}
        self._cells = {(cell["engine"], cell["model"], cell["case"]): cell for cell in data["cells"]}

    @property
    def models(self) -> list[str]:
        """Those with cells, in the order of shapes.py."""
        have = {model for _, model, _ in self._cells}
        return [name for name in SHAPES if name in have]

    def cases(self, model: str) -> list[Case]:
        """Those with cells for a model."""
        have = {case for _, other, case in self._cells if other == model}
        return [case for case in CASES if case.name in have]

    def rounds(self, model: str) -> int:
        """The most that a figure of a model is the median of."""
        return max(cell.get("rounds", 0) for (_, other, _), cell in self._cells.items() if other == model)

    def cell(self, engine: str, model: str, case: str) -> dict[str, Any] | None:
        """A figure, or a reason why there is none, or None where nothing was tried."""
        return self._cells.get((engine, model, case))

    def value(self, engine: str, model: str, case: str) -> float | None:
        """The median, None where there is none."""
        return (self.cell(engine, model, case) or {}).get("median")

    def best(self, model: str, case: Case, which: Callable[[dict[str, Any]], bool]) -> tuple[str, float] | None:
        """The best of the engines that ``which`` lets through, and its value."""
        found = [
            (name, value)
            for name, engine in self.engines.items()
            if which(engine) and (value := self.value(name, model, case.name)) is not None
        ]
        pick = min if case.better == "lower" else max
        return pick(found, key=lambda one: one[1]) if found else None

    def advantage(self, engine: str, model: str, case: Case) -> float | None:
        """How many times as good as the best peer (not ours) an engine is: above 1 is ahead."""
        own, best = self.value(engine, model, case.name), self.best(model, case, lambda one: not one["ours"])
        return None if own is None or best is None else times_as_good(own, best[1], case)

    def share_of_limit(self, engine: str, model: str, case: str) -> float | None:
        """The share of what the machine could do: of the peak of its arithmetic, or of read bandwidth when decoding."""
        value, shape = self.value(engine, model, case), SHAPES[model]
        form, limits = self.engines[engine]["form"], self.data["limits"]
        if value is None or not limits:
            return None
        if case.startswith("ttft_"):
            done = shape.prefill_operations(int(case.removeprefix("ttft_"))) / (value / 1e3)
            return float(done / limits[form["arithmetic"]]["median"])
        if case.startswith("encode_"):
            rows = int(case.removeprefix("encode_"))
            per_second = 1e3 / value if rows == 1 else value
            return float(shape.prefill_operations(128) * per_second / limits[form["arithmetic"]]["median"])
        if case == "decode_1":
            bits = shape.linear_parameters * form["linear_bits"] + shape.head_parameters * form["head_bits"]
            return float(bits / 8 * value / limits["bandwidth"]["median"])
        return None


def times_as_good(own: float, other: float, case: Case) -> float:
    """Above 1 where ``own`` is better."""
    first, second = (other, own) if case.better == "lower" else (own, other)
    return first / second if second else math.inf
