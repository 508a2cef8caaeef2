"""Forms of weights for steps: milliseconds of a step by block size and bits of the head, or quality on given data.

    python benchmarks/weight_forms.py GRAPH                 speed: 4-bit blocks of 32 to 256, the head in 8 or 4 bits
    python benchmarks/weight_forms.py GRAPH --data DATA     KL and top-1 of each, rounded alone and by GPTQ

GRAPH is a folder that `slmdeploy export` wrote. Forms are interleaved, so read ratios; quality is that of the gate:
validation split, against the graph's own fp32.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from slmdeploy.building.onnxruntime import open_folder, read_model, write_folder
from slmdeploy.building.quantize import EMBEDDING, HEAD, parts, quantize, round_alone
from slmdeploy.building.reference import Reference
from slmdeploy.runtime.model import Model
from slmdeploy.specs import SessionOptions, Weights

_PROMPT, _STEPS, _ROUNDS = 128, 48, 9


def form(bits: int, block: int, *, symmetric: bool) -> Weights:
    """Weights in blocks."""
    return Weights.model_validate({"scheme": "weight-only", "bits": bits, "block_size": block, "symmetric": symmetric})


EIGHT = form(8, 128, symmetric=True)
FORMS = {
    "4 bit, blocks of 32, head 8 bit": (form(4, 32, symmetric=False), EIGHT),
    "4 bit, blocks of 64, head 8 bit": (form(4, 64, symmetric=False), EIGHT),
    "4 bit, blocks of 128, head 8 bit": (form(4, 128, symmetric=False), EIGHT),
    "4 bit, blocks of 128, head 4 bit": (form(4, 128, symmetric=False),) * 2,
    "4 bit, blocks of 128, no zero points, head 4 bit": (form(4, 128, symmetric=True),) * 2,
    "4 bit, blocks of 256, head 4 bit": (form(4, 256, symmetric=False),) * 2,
    "8 bit, blocks of 128, head 8 bit": (EIGHT, EIGHT),
}
"""Linear layers and head; the embedding has 8 bits."""


def built(graph: Path, folder: Path, linear: Weights, head: Weights, reference: Reference | None) -> Model:
    """The graph in these forms, opened; rounded by GPTQ where there is a reference to calibrate on."""
    model = read_model(graph)
    plan = dict.fromkeys(parts(model), linear) | {EMBEDDING: EIGHT, HEAD: head}
    quantize(model, plan, rounding=reference.rounding if reference else round_alone)
    write_folder(model, graph, folder, precision="mixed", session=SessionOptions())
    return open_folder(folder)


def step_ms(models: dict[str, Model]) -> dict[str, float]:
    """Median milliseconds of a step behind 128 tokens, forms in turn."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(_ROUNDS):
        for name, model in models.items():
            ids = np.random.default_rng(turn).integers(0, model.runtime.vocab_size, _PROMPT).tolist()
            stream = model.generate_ids(ids, max_new_tokens=_STEPS + 1, ignore_eos=True)
            next(stream)
            started = time.perf_counter()
            for _ in stream:
                pass
            times[name].append((time.perf_counter() - started) / _STEPS * 1e3)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.data is None:
            models = {
                name: built(given.graph, Path(tempfile.mkdtemp(dir=scratch)), *FORMS[name], None) for name in FORMS
            }
            found = step_ms(models)
            first = next(iter(found.values()))
            for name, ms in found.items():
                print(f"{name:50} {ms:7.3f} ms  {first / ms:.2f}x the first")
            return
        reference = Reference(given.graph, given.data)
        for name, forms in FORMS.items():
            for how, calibrated in (("alone", None), ("GPTQ", reference)):
                model = built(given.graph, Path(tempfile.mkdtemp(dir=scratch)), *forms, calibrated)
                quality = reference.comparison.quality(model)
                print(f"{name:50} {how:6} KL {quality.kl:.4f}  top-1 {quality.top1_agreement:.4f}")


if __name__ == "__main__":
    main()
