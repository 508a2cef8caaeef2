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


def mean(entries: list[dict[str, Any]]) -> float:
    """Mean loss of log entries."""
    return sum(entry["loss"] for entry in entries) / len(entries)


def card(checkpoint: Path, metrics: dict[str, Any]) -> str:
    """README.md: what the model is, what it was trained on and how, and the figures of metrics.json."""
    config = json.loads((checkpoint / "config.json").read_text())
    log = [json.loads(line) for line in (checkpoint / "training_log.jsonl").read_text().splitlines()]
    losses = [entry for entry in log if "loss" in entry]
    teacher, simple = metrics["teacher"], metrics["baselines"]
    interval = {name: f"{low:.3f} to {high:.3f}" for name, (low, high) in metrics["intervals"].items()}
    size = (checkpoint / "model.safetensors").stat().st_size
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The quickstart's teacher
A Llama of 10.5M parameters ({config["num_hidden_layers"]} layers, hidden {config["hidden_size"]}, \
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
    python examples/train_teacher.py --out work/teacher --compile

Seed 7, {losses[-1]["step"]} batches of 4,096 tokens, bf16 autocast on a CPU of 2 cores; Muon for block matrices, \
AdamW for the rest. A batch is text or pairs, half and half at first, three quarters pairs in the second half of the \
steps, in which the learning rates fall to zero; rows of text have 256 tokens before that and 512 from then on. Of a \
pair the label word counts, the words of matching ones a fiftieth of it. Mean loss of the first and the last ten \
logged entries (text and pairs mixed): {mean(losses[:10]):.2f} → {mean(losses[-10:]):.2f}; every 20 steps in \
`training_log.jsonl`.

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
