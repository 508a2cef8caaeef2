"""Which ways to round survive outliers: the shipped teacher as trained, and with outliers planted in its activations.

    .venv/bin/python benchmarks/rounding.py                 makes what is missing in benchmarks/results/rounding.json
    .venv/bin/python benchmarks/rounding.py --report-only   the table of docs/quantisation.md again, from that file

The teacher's activations have no outliers worth the name, so some are planted: in front of every linear layer a few
channels are made 64 times as large and the rows that read them 64 times as small. That is exact in float32, so the
model is the same, bit by bit; that it is so is checked, and written down, before anything else. Each cell is KL in nats
per token, top-1 agreement and perplexity ratio against fp32 on the validation split. Linear layers take the form, the
head 8 bits in blocks, the embedding stays fp32. FP8 is that of the profile tensorrt-fp8: scales from the largest
magnitudes, one per tensor of what a layer reads (of text that is not judged) and one per output channel of a weight.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import slmdeploy
from slmdeploy import corpus
from slmdeploy.artifacts import machine
from slmdeploy.building.calibration import Moments, count, inputs_of
from slmdeploy.building.folding import places
from slmdeploy.building.fp8 import activation_scale, fp8_product, quantize_linears
from slmdeploy.building.onnxruntime import open_folder, read_model, write_folder, write_runtime
from slmdeploy.building.quantize import EMBEDDING, HEAD, RoundAlone, parts, quantize
from slmdeploy.building.reference import Reference
from slmdeploy.building.rewriting import MICROSOFT, Replacement, remove_unused_initializers, weight_array
from slmdeploy.building.rotation import rotate
from slmdeploy.building.rounding import Rounding
from slmdeploy.building.smooth import Product, blocks_product, smooth, w8a8_product
from slmdeploy.building.w8a8 import quantize_columns
from slmdeploy.specs import Fp8, SessionOptions, Weights

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "examples" / "teacher"
RESULTS = ROOT / "benchmarks" / "results" / "rounding.json"
PAGE = ROOT / "docs" / "quantisation.md"
_MARKS = ("<!-- benchmarks/rounding.py -->\n", "<!-- end -->\n")
_PLANTED, _SHARE, _SEED, _TOKENS = 64.0, 0.01, 3, 2048
PER_TENSOR, PER_TOKEN, INT4 = "int8, one scale per tensor", "int8, one scale per token", "int4, blocks of 128"
FP8 = "fp8, one scale per tensor"
EIGHT = Weights(scheme="weight-only", bits=8, block_size=128)
FORMS = {
    PER_TOKEN: Weights(scheme="w8a8", bits=8),
    INT4: Weights(scheme="weight-only", bits=4, block_size=128, symmetric=False),
}
METHODS = {
    PER_TENSOR: ("nearest", "smooth", "rotate", "rotate, smooth"),
    PER_TOKEN: ("nearest", "smooth", "rotate", "rotate, smooth", "gptq", "quantease"),
    INT4: ("nearest", "gptq", "quantease", "smooth, gptq", "rotate, gptq", "rotate, smooth, quantease"),
    FP8: ("nearest", "smooth", "rotate", "rotate, smooth"),
}
SMOOTHED_FOR: dict[str, Product] = {INT4: blocks_product(4, 128, symmetric=False), FP8: fp8_product}
"""What smoothing has to suit, where it is not products in 8-bit integers."""
GRAPHS = ("as trained", "planted")


def plant(model: ir.Model) -> int:
    """Make some channels in front of every linear layer 64 times as large; how many there are now."""
    random, planted = np.random.default_rng(_SEED), 0
    for place in places(model.graph):
        count = max(1, round(place.size * _SHARE))
        factors = np.ones(place.size, np.float32)
        factors[random.choice(place.size, count, replace=False)] = 1 / _PLANTED
        place.divide(factors)
        planted += count
    return planted


def quantize_per_tensor(model: ir.Model) -> None:
    """Every linear layer but the head in 8 bits with one dynamic scale for all that it reads."""
    for name, node in parts(model).items():
        if name in (EMBEDDING, HEAD):
            continue
        new, weight = Replacement(node), node.inputs[1]
        assert weight is not None
        assert isinstance(node.graph, ir.Graph)
        dynamic = ir.node("DynamicQuantizeLinear", [node.inputs[0]], num_outputs=3, name=f"{name}.rows")
        for value, part in zip(dynamic.outputs, ("codes", "step", "zero_point"), strict=True):
            value.name = f"{name}.rows.{part}"
        node.graph.insert_before(node, dynamic)
        codes, step, zero_point = dynamic.outputs
        values, scales = quantize_columns(weight_array(weight))
        weights = new.constant("weight_int8", values), new.constant("weight_scale", scales)
        inputs = (codes, weights[0], step, weights[1], zero_point)
        new.finish(new.add("MatMulIntegerToFloat", *inputs, domain=MICROSOFT))
    remove_unused_initializers(model.graph)


def quantize_fp8(model: ir.Model, scales: dict[str, np.float32]) -> None:
    """Every linear layer but the head in FP8 with these scales of what layers read, by the value's name."""
    layers = {name: node for name, node in parts(model).items() if name not in (EMBEDDING, HEAD)}
    quantize_linears(model.graph, layers, scales, Fp8())


class Lab:
    """The graphs in their preparations, and the text and predictions that all are compared with."""

    def __init__(self, work: Path) -> None:
        self.work, self.data = work, work / "data"
        if not self.data.exists():
            corpus.prepare(self.data)
        if not (work / "graph").exists():
            slmdeploy.export(TEACHER, out=work / "graph", tasks=("generate",))
        self.reference = Reference(work / "graph", self.data)

    @cache  # noqa: B019 - one laboratory for the whole run
    def graph(self, name: str, rotated: bool, smoothed: Product | None) -> Path:
        """The fp32 graph of this name, rotated, then smoothed for that product."""
        if smoothed is not None:
            before = self.graph(name, rotated, None)
            return self._changed(before, lambda model: smooth(model, self._inputs(before), product=smoothed))
        if rotated:
            return self._changed(self.graph(name, False, None), rotate)
        return self.work / "graph" if name == GRAPHS[0] else self._changed(self.work / "graph", plant)

    @cache  # noqa: B019
    def moments(self, graph: Path) -> Moments:
        """Of what the layers of ``graph`` read."""
        return Moments(graph, self.reference.calibration_text)

    def scales(self, graph: Path) -> dict[str, np.float32]:
        """Of FP8, for each value that the layers of ``graph`` read."""
        found = count(graph, self.reference.calibration_text)
        return {name: activation_scale(counts, Fp8().activation_scale) for name, counts in found.items()}

    @cache  # noqa: B019
    def _inputs(self, graph: Path) -> Any:
        return inputs_of(graph, self.reference.calibration_text)

    def _changed(self, graph: Path, change: Any) -> Path:
        model = read_model(graph)
        change(model)
        return self._written(model)

    def _written(self, model: ir.Model) -> Path:
        folder = self.work / f"fp32-{len(list(self.work.glob('fp32-*')))}"
        folder.mkdir()
        write_folder(model, self.work / "graph", folder, precision="fp32", session=SessionOptions())
        return folder

    def judge(self, model: ir.Model, *, tokens: int = _TOKENS, as_written: bool = False) -> dict[str, float]:
        """KL, top-1 agreement and perplexity ratio of a quantised graph, on so many tokens.

        ``as_written``: without ONNX Runtime's fusions, which look for FP8 kernels that it has not.
        """
        folder = self.work / "quantised"
        folder.mkdir(exist_ok=True)
        write_folder(model, self.work / "graph", folder, precision="mixed", session=SessionOptions())
        write_runtime(folder, folder, numerics_only=as_written)
        found = self.reference.comparison.quality(open_folder(folder), tokens=tokens)
        return {"kl": found.kl, "top1": found.top1_agreement, "ppl_ratio": found.ppl_ratio}

    def measure(self, name: str, form: str, method: str) -> dict[str, float]:
        """One cell."""
        words = method.split(", ")
        product = SMOOTHED_FOR.get(form, w8a8_product)
        graph = self.graph(name, "rotate" in words, product if "smooth" in words else None)
        model = read_model(graph)
        if form == PER_TENSOR:
            quantize_per_tensor(model)
        elif form == FP8:
            quantize_fp8(model, self.scales(graph))
        else:
            compensated = words[-1] if words[-1] in ("gptq", "quantease") else None
            rounding = Rounding(self.moments(graph), compensated) if compensated else RoundAlone()
            layers = [part for part in parts(model) if part not in (EMBEDDING, HEAD)]
            quantize(model, dict.fromkeys(layers, FORMS[form]), rounding=rounding)
        quantize(model, {HEAD: EIGHT})
        return self.judge(model, as_written=form == FP8)


def cells() -> Iterator[tuple[str, str, str]]:
    """Graph, form and method of every cell."""
    for graph in reversed(GRAPHS):
        for form, methods in METHODS.items():
            yield from ((graph, form, method) for method in methods)


def run(work: Path) -> None:
    """Make what is missing, one cell after the other, each written as it is done."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    lab = Lab(work)
    if "planted" not in found:
        model = read_model(work / "graph")
        count = plant(model)
        same = _same(lab, lab.graph(GRAPHS[1], False, None))
        made = machine() | {"commit": commit()}
        planted = {"channels": count, "factor": _PLANTED, "largest_logit_difference": same}
        found = {"made": made, "tokens": _TOKENS, "planted": planted, "cells": {}}
    for cell in cells():
        key = " | ".join(cell)
        if key not in found["cells"]:
            found["cells"][key] = lab.measure(*cell)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(key, found["cells"][key], flush=True)


def commit() -> str:
    """The commit that this is run from."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def _same(lab: Lab, folder: Path) -> float:
    """The largest difference of a logit between the graph and the one with outliers, on the first text."""
    text = lab.reference.calibration_text[0]
    return float(np.abs(lab.reference.model.logits(text) - open_folder(folder).logits(text)).max())


def table(found: dict[str, Any]) -> str:
    """Markdown: a row for each form and method, KL / top-1 / perplexity ratio of both graphs."""
    lines = [
        "| form | rounding | as trained: KL / top-1 / perplexity | planted: KL / top-1 / perplexity |",
        "|" + "---|" * 4,
    ]
    for form, methods in METHODS.items():
        for method in methods:
            both = [found["cells"].get(f"{graph} | {form} | {method}") for graph in GRAPHS]
            lines.append(f"| {form} | {method} | " + " | ".join(map(_figures, both)) + " |")
    return "\n".join(lines) + "\n"


def _figures(cell: dict[str, float] | None) -> str:
    return "not run" if cell is None else f"{cell['kl']:.4f} / {cell['top1']:.4f} / {cell['ppl_ratio']:.4f}"


def put_between(marks: tuple[str, str], text: str) -> None:
    """Put the text between its marks in docs/quantisation.md."""
    start, end = marks
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(f"(?s){start}.*?{end}", lambda _: start + text + end, page), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "rounding")
    parser.add_argument("--report-only", action="store_true")
    options = parser.parse_args()
    if not options.report_only:
        run(options.work)
    put_between(_MARKS, table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
