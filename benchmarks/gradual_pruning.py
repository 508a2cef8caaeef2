"""Pruning in rounds against pruning at once, at equal tokens: `PYTHONPATH=. python benchmarks/gradual_pruning.py`.

Every variant ends at the same shape of the shipped teacher and is trained on the same number of tokens, spread evenly
over its rounds; the calibration of the further rounds (one pass over --tokens each) is not counted. Perplexity is on
the same rows of the validation split, before and after the last training. Writes
benchmarks/results/gradual_pruning.json with the machine; what is there for the same settings is not made again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.pruning_methods import TEACHER, perplexity
from slmdeploy import corpus
from slmdeploy.artifacts import machine
from slmdeploy.compress.distill import distill
from slmdeploy.compress.prune import prune
from slmdeploy.compress.rounds import rounds
from slmdeploy.specs import DistillStage, PrunePlan

RESULTS = Path(__file__).parent / "results" / "gradual_pruning.json"


def variant(options: argparse.Namespace, count: int, seed: int, data: Path) -> dict[str, Any]:
    """Prune the teacher in ``count`` rounds with ``steps`` / ``count`` steps after each."""
    steps = options.steps // count
    stage = DistillStage(steps=steps, batch_rows=options.batch_rows, learning_rate=options.rate, seed=seed, eval_rows=0)
    plan = PrunePlan(
        ratio=options.ratio,
        attention_ratio=0.0,
        layer_ratio=options.layer_ratio,
        calibration_tokens=options.tokens,
        seed=seed,
        rounds=count,
        between=stage if count > 1 else None,
    )
    here, found = TEACHER, dict[str, Any]()
    for number, one in enumerate(rounds(TEACHER, plan), start=1):
        place = options.work / f"{count}-{seed}-{number}"
        here = prune(here, out=place / "pruned", data=data, force=True, **one.settings).path
        found["before"] = perplexity(here, data, options.rows)
        here = distill(TEACHER, here, out=place / "student", data=data, stage=stage, force=True).path
    return {**found, "after": perplexity(here, data, options.rows), "tokens": count * stage.tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work/gradual_pruning"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--ratio", type=float, default=0.65, help="share of the MLP neurons")
    parser.add_argument("--layer-ratio", type=float, default=0.33)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240, help="training steps of all rounds together")
    parser.add_argument("--batch-rows", type=int, default=4, help="rows of 512 tokens per step")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens of a round")
    parser.add_argument("--rows", type=int, default=24, help="validation rows of 512 tokens")
    options = parser.parse_args()
    fixed = ("ratio", "layer_ratio", "steps", "batch_rows", "rate", "tokens", "rows")
    settings = {name: getattr(options, name) for name in fixed}
    data = options.work / "data"
    if not data.exists():
        corpus.prepare(data)
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "machine": machine(), "variants": {}}
    for seed in options.seeds:
        for count in options.rounds:
            name = f"rounds {count}, seed {seed}"
            if name not in found["variants"]:
                found["variants"][name] = variant(options, count, seed, data)
                options.results.write_text(json.dumps(found, indent=1) + "\n")
            print(name, json.dumps(found["variants"][name]), flush=True)


if __name__ == "__main__":
    main()
