"""What a graph traced by the fallback costs against one built from the weights: `python benchmarks/fallback_cost.py`.

Models of random weights that both paths can export, 256 tokens of context: both graphs of each, run in turn (A B A B
…) so that a busy machine slows both alike. Printed are the medians of 128 tokens to the first new one and of a step,
their ratios, the ratios that the manifest of the fallback's export gives (against a stand-in instead of the model's own
fast path, so this says what the stand-in is worth), and the seconds of each export with its parity.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from slmdeploy.exporting.export import export
from slmdeploy.runtime.model import Model, load

PROMPT, STEPS, ROUNDS = 128, 32, 7
END = {"bos_token_id": 0, "eos_token_id": 1}
SHAPES: dict[str, PreTrainedConfig] = {
    "SmolLM2-135M": LlamaConfig(
        **END,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=256,
    ),
    "GPT-2": GPT2Config(**END, n_positions=256),
    "Qwen2.5-0.5B": Qwen2Config(
        **END,
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=256,
    ),
}


def write_checkpoint(config: PreTrainedConfig, folder: Path) -> None:
    """Random weights, and a tokenizer of a few words, which is all that an export asks for."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))


def seconds_of(model: Model) -> tuple[float, float]:
    """Seconds of the prompt to the first new token, and of a step."""
    ids = np.random.default_rng(0).integers(0, model.runtime.vocab_size, PROMPT).tolist()
    started = time.perf_counter()
    stream = model.generate_ids(ids, max_new_tokens=STEPS + 1, ignore_eos=True)
    next(stream)
    first = time.perf_counter()
    for _ in stream:
        pass
    return first - started, (time.perf_counter() - first) / STEPS


def compare(name: str, config: PreTrainedConfig, threads: int) -> None:
    """Export both ways, run in turn, print."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_checkpoint(config, folder / "checkpoint")
        exported, seconds = {}, {}
        for path in ("weights", "fallback"):
            started = time.perf_counter()
            exported[path] = export(folder / "checkpoint", out=folder / path, fallback=path == "fallback")
            seconds[path] = time.perf_counter() - started
        opened = {path: load(folder / path, threads=threads) for path in exported}
        times: dict[str, list[tuple[float, float]]] = {path: [] for path in opened}
        for turn in range(ROUNDS + 1):
            for path, model in opened.items():
                found = seconds_of(model)
                if turn:
                    times[path].append(found)
    middle = {path: [median(one) * 1e3 for one in zip(*found, strict=True)] for path, found in times.items()}
    cost = exported["fallback"].result["cost"]
    for i, phase in enumerate(("prefill", "decode")):
        fast, traced = middle["weights"][i], middle["fallback"][i]
        print(
            f"{name:14} {phase:8} weights {fast:8.2f} ms  fallback {traced:8.2f} ms  ratio {traced / fast:.2f}  "
            f"by the stand-in {cost[f'{phase}_ratio']:.2f}"
        )
    print(f"{name:14} export   weights {seconds['weights']:8.1f} s   fallback {seconds['fallback']:8.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), help=f"out of {', '.join(SHAPES)}")
    parser.add_argument("--threads", type=int, default=0, help="0: all physical cores")
    options = parser.parse_args()
    print(f"onnxruntime {onnxruntime.__version__}, {PROMPT} tokens of prompt, {STEPS} steps, median of {ROUNDS}")
    for name in options.shapes:
        compare(name, SHAPES[name], options.threads)


if __name__ == "__main__":
    main()
