"""Peak memory of pruning a random Llama, beside its weights: `python benchmarks/pruning_memory.py`.

    --shape 100m     32k words, hidden 768, 12 layers
    --shape 1b       128k words, hidden 2048, 16 layers, as the Llama 3.2 of that size

A process of its own prunes half of the neurons and GQA groups with OSSCAR; the peak is VmHWM of Linux. `beyond_bytes`
is what it needs beyond twice the weights in float32 (the model, and the smaller one while it is cut) and beside what
was resident before: one layer's moments and the residual stream of the calibration tokens, whatever the depth. The
random checkpoint is written first and stays in --work. Writes benchmarks/results/pruning_memory.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.distill_memory import peak_bytes
from slmdeploy import corpus
from slmdeploy.artifacts import machine

RESULTS = Path(__file__).parent / "results" / "pruning_memory.json"
TEACHER = Path(__file__).parent.parent / "examples" / "teacher"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4},
    "100m": {"hidden_size": 768, "intermediate_size": 2304, "num_attention_heads": 12, "num_key_value_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
}
LAYERS = {"tiny": 4, "100m": 12, "1b": 16}
WORDS = {"tiny": 4096, "100m": 32768, "1b": 128256}


def write_checkpoint(folder: Path, shape: str, layers: int) -> int:
    """A random checkpoint in bf16 with the shipped teacher's tokenizer; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from slmdeploy.compress.loading import copy_companions

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS[shape], num_hidden_layers=layers, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, **SHAPES[shape],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    copy_companions(TEACHER, folder)
    return int(model.num_parameters())


def prune_once(checkpoint: Path, data: Path, out: Path, tokens: int) -> dict[str, float]:
    """Prune in this process; its peak, what was resident before, and seconds."""
    from slmdeploy.compress import pruning  # noqa: F401 - torch and all else is resident before
    from slmdeploy.compress.prune import prune

    before, start = peak_bytes(), time.perf_counter()
    prune(checkpoint, out=out, data=data, ratio=0.5, calibration_tokens=tokens, force=True)
    return {"before_bytes": before, "peak_bytes": peak_bytes(), "seconds": time.perf_counter() - start}


def measure(shape: str, layers: int, tokens: int, work: Path) -> dict[str, Any]:
    """The figures of one shape, in a child process."""
    data, checkpoint = work / "data", work / f"{shape}-{layers}"
    if not data.exists():
        corpus.prepare(data)
    parameters = write_checkpoint(checkpoint, shape, layers)
    arguments = ["--child", str(checkpoint), "--work", str(work), "--tokens", str(tokens)]
    command = [sys.executable, "-m", "benchmarks.pruning_memory", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    found = json.loads(done.stdout.splitlines()[-1])
    beyond = found["peak_bytes"] - found["before_bytes"] - 2 * 4 * parameters
    return {
        "shape": shape,
        "layers": layers,
        "parameters": parameters,
        "tokens": tokens,
        **found,
        "beyond_bytes": beyond,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="100m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--work", type=Path, default=Path("work/pruning_memory"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", type=Path)
    options = parser.parse_args()
    if options.child:
        out = options.work / "pruned"
        print(json.dumps(prune_once(options.child, options.work / "data", out, options.tokens)))
        return
    work = options.work.resolve()
    found = measure(options.shape, options.layers or LAYERS[options.shape], options.tokens, work)
    kept = json.loads(options.results.read_text()) if options.results.exists() else {"runs": []}
    kept["runs"].append({**found, "machine": machine()})
    options.results.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
