"""Measure the embedded default's teacher on its held-out test split, beside simple baselines, and write its card.

    python examples/teacher_card.py --checkpoint examples/teacher --data work/teacher/data

Writes metrics.json and README.md into the checkpoint folder. The teacher runs in torch, fp32, eager, through the same
worker and the same metric code as every other measurement; the baselines are those of teacher_baselines.py.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from teacher_baselines import compare

from slmdeploy.profiling.process import WorkerProcess, worker_command
from slmdeploy.profiling.quality import Candidate, evaluate

TASKS = ("generate", "score")
ALL = 10**9


def measure(checkpoint: Path, data: Path) -> dict[str, Any]:
    """Bits per byte, AUC and MRR@10 on all of the test split, with 95 % intervals, and the baselines' beside them."""
    command = worker_command(checkpoint, threads=2, baseline=True)
    context = json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"]
    with WorkerProcess("teacher", command, threads=2) as worker:
        candidate = Candidate(worker, checkpoint / "tokenizer.json", context, TASKS)
        quality = evaluate({"teacher": candidate}, data, baseline=None, tokens=ALL, seed=0)["teacher"]
    return {
        "teacher": {**quality.metrics, **quality.counts},
        "intervals": {name: list(interval) for name, interval in quality.intervals.items()},
        "baselines": compare(data),
    }


def card(checkpoint: Path, metrics: dict[str, Any]) -> str:
    """README.md: what the model is, what it was trained on and how, and the figures of metrics.json."""
    config = json.loads((checkpoint / "config.json").read_text())
    log = [json.loads(line) for line in (checkpoint / "training_log.jsonl").read_text().splitlines()]
    losses = [entry for entry in log if "loss" in entry]
    ends = {name: [e["loss"] for e in losses if e["phase"] == name] for name in ("read", "rank")}
    phases = ", ".join(f"{name} {values[0]:.2f} → {values[-1]:.2f}" for name, values in ends.items())
    teacher, simple = metrics["teacher"], metrics["baselines"]
    interval = {name: f"{low:.3f} to {high:.3f}" for name, (low, high) in metrics["intervals"].items()}
    size = (checkpoint / "model.safetensors").stat().st_size
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The quickstart's teacher
A Llama of 11.0M parameters ({config["num_hidden_layers"]} layers, hidden {config["hidden_size"]}, \
{config["num_attention_heads"]} query and {config["num_key_value_heads"]} KV heads of {config["head_dim"]}, MLP \
{config["intermediate_size"]}, tied embeddings, byte-level BPE of {config["vocab_size"]}, context \
{config["max_position_embeddings"]}), bf16 safetensors, {size / 1e6:.1f} MB. It exists so that `make demo` has \
something real to compress, offline. It is no use as a programming assistant.

## Data
The source and docstrings of Python {platform.python_version()}'s standard library, read at run time from the \
interpreter (`slmdeploy/corpus.py`), split by module with a hash of the module's name: 84 % train, 4 % validation, \
12 % test. Two tasks: *generate* continues documentation and code; *score* tells whether a symbol's qualified name \
and signature belong to the first sentence of a docstring, against up to nine symbols of the same package, same \
module first. None of the text is in this repository. The library is under the PSF licence.

## Training
    python examples/train_teacher.py --out work/teacher
    python examples/train_teacher.py --out work/teacher --phase rank

Seed 7, 8 × 512 tokens a step, bf16 autocast on a CPU of 2 cores; Muon for block matrices, AdamW for the rest. \
First 1500 steps, half the rows text and half pairs, then {losses[-1]["step"]} with three quarters pairs of which only \
the label words count. Training loss of each, first and last: {phases}; every 20 steps in `training_log.jsonl`.

The learning rates were constant: 0.005 (Muon) and 7.5e-4 (AdamW) in the first phase, 0.0025 and 3.75e-4 in the second.
The log's `learning_rate` shows a schedule that never reached the optimisers, a fault of the script that is mended;
the script now sets the rates that were in force. The first phase was resumed from its checkpoints twice.

## Held-out figures
    python examples/teacher_card.py --checkpoint examples/teacher --data work/teacher/data

| test split | teacher | 95 % interval | simple baseline |
|---|---|---|---|
| bits per byte (completion given prompt) | {teacher["bits_per_byte"]:.3f} | {interval["bits_per_byte"]} | \
{simple["ngram_bits_per_byte"]:.3f} (byte n-gram) |
| AUC, all pairs | {teacher["auc"]:.3f} | {interval["auc"]} | {simple["bm25_auc"]:.3f} (BM25) |
| MRR@10 | {teacher["mrr_at_10"]:.3f} | {interval["mrr_at_10"]} | {simple["bm25_mrr_at_10"]:.3f} (BM25) |

All figures are in `metrics.json`, with the number of records.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    metrics = measure(options.checkpoint, options.data)
    (options.checkpoint / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (options.checkpoint / "README.md").write_text(card(options.checkpoint, metrics))
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
