"""Which layers should take more bits than 4: raised by measured sensitivity, in the graph's order, or drawn.

    PYTHONPATH=. python benchmarks/layer_bits.py                 makes what is missing in results/layer_bits.json
    PYTHONPATH=. python benchmarks/layer_bits.py --report-only   the tables of docs/quantisation.md again from there

`slmdeploy build` raises the layers that cost most by themselves until its gate passes. Here as many layers are raised
as wanted, whatever a gate says, in three orders, so that it is seen what the order is worth; and each of embedding,
head and linear layers is quantised alone, in 4 and in 8 bits. The shipped teacher, blocks of 128, GPTQ for 4 bits;
KL in nats per token and top-1 agreement against its own fp32 on the validation split.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.rounding import EIGHT, FORMS, GRAPHS, INT4, Lab, commit, put_between
from slmdeploy.artifacts import machine
from slmdeploy.building.onnxruntime import read_model
from slmdeploy.building.quantize import EMBEDDING, HEAD, Plan, parts, quantize
from slmdeploy.building.rounding import Rounding

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "layer_bits.json"
_MARKS = ("<!-- benchmarks/layer_bits.py -->\n", "<!-- end of layer_bits -->\n")
_SCREENING_TOKENS, _TOKENS = 1024, 2048
"""Tokens that one layer's sensitivity is measured on, as `build` does, and those that everything else is."""
BITS = {4: FORMS[INT4], 8: EIGHT}
COUNTS = (3, 6, 12, 24)
SENSITIVE, ORDER, DRAWN = "most sensitive first", "in the graph's order", "drawn"
DRAWS = 3
ALONE = {"embedding": EMBEDDING, "head": HEAD}
LINEAR = "all linear layers"
Cells = dict[str, dict[str, float]]
Measure = Callable[[Plan, int], dict[str, float]]


class Bits:
    """The teacher's graph, quantised in parts and judged."""

    def __init__(self, work: Path) -> None:
        self._lab = Lab(work)
        self._graph = self._lab.graph(GRAPHS[0], False, None)

    @cached_property
    def layers(self) -> list[str]:
        """The linear layers but the head, in the graph's order."""
        return [name for name in parts(read_model(self._graph)) if name not in (EMBEDDING, HEAD)]

    @cached_property
    def _rounding(self) -> Rounding:
        return Rounding(self._lab.moments(self._graph))

    def measure(self, plan: Plan, tokens: int) -> dict[str, float]:
        """What the graph keeps with these forms and all else in fp32."""
        model = read_model(self._graph)
        quantize(model, plan, rounding=self._rounding)
        return self._lab.judge(model, tokens=tokens)


def cells(layers: list[str], cells: Cells, measure: Measure) -> Iterator[str]:
    """Put what is missing into ``cells``, one by one, and give its key."""
    for key, plan in _alone(layers):
        if key not in cells:
            cells[key] = measure(plan, _SCREENING_TOKENS if key.startswith("layer") else _TOKENS)
            yield key
    by_cost = sorted(layers, key=lambda name: -cells[f"layer | {name}"]["kl"])
    for key, order, count in _raised(layers, by_cost):
        if key not in cells:
            plan = dict.fromkeys(layers, BITS[4]) | dict.fromkeys(order[:count], BITS[8])
            cells[key] = measure(plan, _TOKENS)
            yield key


def _alone(layers: list[str]) -> Iterator[tuple[str, Plan]]:
    for bits, form in BITS.items():
        yield from ((f"{name} | {bits}", {part: form}) for name, part in ALONE.items())
        yield f"{LINEAR} | {bits}", dict.fromkeys(layers, form)
    yield from ((f"layer | {name}", {name: BITS[4]}) for name in layers)


def _raised(layers: list[str], by_cost: list[str]) -> Iterator[tuple[str, list[str], int]]:
    for count in COUNTS:
        yield f"{SENSITIVE} | {count}", by_cost, count
        yield f"{ORDER} | {count}", layers, count
        for draw in range(DRAWS):
            drawn = np.random.default_rng(draw).permutation(layers).tolist()
            yield f"{DRAWN} {draw} | {count}", drawn, count


def tables(found: dict[str, Any]) -> str:
    """Markdown: raised layers by order, then each kind of part by itself."""
    cells: Cells = found["cells"]
    layers = [name.removeprefix("layer | ") for name in cells if name.startswith("layer | ")]
    lines = [f"| of {len(layers)} linear layers in 8 bits | {SENSITIVE} | {ORDER} | {DRAWN}, {DRAWS} times |"]
    lines.append("|" + "---|" * 4)
    lines.append(f"| none | {_figures(cells[f'{LINEAR} | 4'])} | the same | the same |")
    for count in COUNTS:
        drawn = [cells[f"{DRAWN} {draw} | {count}"]["kl"] for draw in range(DRAWS)]
        spread = f"{mean(drawn):.4f} ± {(max(drawn) - min(drawn)) / 2:.4f}"
        fixed = " | ".join(_figures(cells[f"{order} | {count}"]) for order in (SENSITIVE, ORDER))
        lines.append(f"| {count} | {fixed} | {spread} |")
    lines += [f"| all | {_figures(cells[f'{LINEAR} | 8'])} | the same | the same |", ""]
    lines += ["| quantised alone | 4 bit | 8 bit |", "|" + "---|" * 3]
    for name in (*ALONE, LINEAR):
        lines.append(f"| {name} | " + " | ".join(_figures(cells[f"{name} | {bits}"], 5) for bits in BITS) + " |")
    costs = sorted(((cells[f"layer | {name}"]["kl"], name) for name in layers), reverse=True)
    return "\n".join(lines) + "\n\nThe most sensitive, alone in 4 bits: " + _named(costs[:5]) + ".\n"


def _figures(cell: dict[str, float], digits: int = 4) -> str:
    return f"{cell['kl']:.{digits}f} / {cell['top1']:.4f}"


def _named(costs: list[tuple[float, str]]) -> str:
    return ", ".join(f"`{name.removeprefix('model.layers.')}` {kl:.5f}" for kl, name in costs)


def run(work: Path) -> None:
    """Make what is missing, each cell written as it is done."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not found:
        found = {"made": machine() | {"commit": commit()}, "tokens": _TOKENS, "cells": {}}
    bits = Bits(work)
    for key in cells(bits.layers, found["cells"], bits.measure):
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(key, found["cells"][key], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "rounding")
    parser.add_argument("--report-only", action="store_true")
    options = parser.parse_args()
    if not options.report_only:
        run(options.work)
    put_between(_MARKS, tables(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
