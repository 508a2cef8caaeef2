"""What each way to prune keeps of the shipped teacher before any distillation: `python benchmarks/pruning_methods.py`.

Every variant removes half of the teacher's MLP neurons and GQA groups on the same calibration rows; its perplexity is
then measured on the same rows of the validation split. "osscar, backward only" is OSSCAR without its local search.
Writes benchmarks/results/pruning_methods.json; a variant that is there already, made with the same settings, is not
made again.
"""

import argparse
import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from slmdeploy import corpus
from slmdeploy.checkpoint import LABELS
from slmdeploy.compress import loading, osscar
from slmdeploy.compress.data import make_texts, open_sources
from slmdeploy.compress.packing import mixed_rows
from slmdeploy.compress.prune import prune

TEACHER = Path(__file__).parent.parent / "examples" / "teacher"
RESULTS = Path(__file__).parent / "results" / "pruning_methods.json"
SWAP_ROUNDS = osscar.SWAP_ROUNDS
VARIANTS: dict[str, dict[str, Any]] = {
    "osscar": {},
    "osscar, backward only": {},
    "minitron": {"method": "minitron"},
    "magnitude": {"method": "magnitude"},
    "random": {"method": "random"},
    "minitron, global": {"method": "minitron", "allocation": "global"},
    "osscar, global": {"allocation": "global"},
}


@torch.no_grad()
def perplexity(checkpoint: Path, data: Path, count: int) -> float:
    """e to the mean nats of the counted tokens of ``count`` validation rows of text."""
    config = loading.load_config(checkpoint)
    with loading.quiet():
        model: Any = loading.load_model(checkpoint, torch.float32).eval()
    sources = open_sources(data, "valid")
    texts = make_texts(checkpoint, loading.end_ids(config), LABELS, scored=False)
    nats, tokens = 0.0, 0
    for row in islice(mixed_rows(sources, texts, length=512, score_share=0.0, seed=0), count):
        logits = model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False).logits
        counted = row["weights"][1:] > 0
        losses = torch.nn.functional.cross_entropy(logits[0, :-1].double(), row["input_ids"][1:], reduction="none")
        nats, tokens = nats + losses[counted].sum().item(), tokens + int(counted.sum())
    return math.exp(nats / tokens)


def measure(name: str, settings: dict[str, Any], work: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prune one variant and say what is left of it."""
    osscar.SWAP_ROUNDS = 0 if name == "osscar, backward only" else SWAP_ROUNDS
    made = prune(
        TEACHER,
        out=work / name.replace(", ", "-").replace(" ", "-"),
        data=data,
        ratio=options.ratio,
        calibration_tokens=options.tokens,
        seed=options.seed,
        force=True,
        **settings,
    )
    layers = made.result["layers"]
    return {
        "perplexity": perplexity(made.path, data, options.rows),
        "parameters": made.result["parameters"]["after"],
        "attention_error": sum(layer["attention_error"] for layer in layers) / len(layers),
        "mlp_error": sum(layer["mlp_error"] for layer in layers) / len(layers),
        "swapped": sum(layer["attention_swapped"] + layer["mlp_swapped"] for layer in layers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work/pruning_methods"))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--rows", type=int, default=24, help="validation rows of 512 tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("ratio", "tokens", "rows", "seed")}
    data = options.work / "data"
    if not data.exists():
        corpus.prepare(data)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if found.get("settings") != settings:
        found = {
            "settings": settings,
            "teacher": {"perplexity": perplexity(TEACHER, data, options.rows)},
            "variants": {},
        }
    for name, changes in VARIANTS.items():
        if name not in found["variants"]:
            found["variants"][name] = measure(name, changes, options.work, data, options)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(name, json.dumps(found["variants"][name]), flush=True)
    print("teacher", json.dumps(found["teacher"]))


if __name__ == "__main__":
    main()
