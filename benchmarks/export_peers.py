"""What it takes to export one checkpoint: slmdeploy beside the other ways to get an ONNX decoder, one table.

    .venv/bin/python benchmarks/export_peers.py --json

A checkpoint of the shape of Qwen2.5-0.5B with random bfloat16 weights is written once; then each exporter runs in a
process of its own, all in turn for each round, so that a slow moment of the machine falls on all. Measured are the
process's wall time with interpreter and imports (median of the rounds), its peak resident memory (largest), and the
bytes that it leaves. slmdeploy compares every graph with torch before it hands it out; that is timed apart, because the
others do not (optimum is asked not to). onnxruntime-genai's builder and optimum run in environments of their own, which
are made under --environments where they are missing; the last line on stdout with --json is one JSON object.
"""

import argparse
import json
import os
import platform
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
}
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
REQUIREMENTS = {
    "genai builder": ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "torch==2.13.0", "transformers==5.23.0",
                      "onnx==1.23.2", "onnx-ir==1.1.0"),
    "optimum": ("torch==2.13.0", "optimum-onnx==0.1.0", "onnxruntime==1.31.1", "transformers==4.57.6"),
}  # fmt: skip
OURS = "slmdeploy"
PEERS = (OURS, "genai builder", "optimum", "transformers.exporters")


def write_checkpoint(folder: Path, architecture: str, shape: str) -> None:
    """A random checkpoint as hubs hold them: bfloat16, config.json in the older form, which all exporters read."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = SHAPES[shape] | {"bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **sizes, dtype="bfloat16")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    older = {"architectures": [ARCHITECTURES[architecture]], "model_type": architecture, "torch_dtype": "bfloat16"}
    older |= {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(older | sizes))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def export_slmdeploy(checkpoint: Path, out: Path) -> dict[str, float]:
    """Exports, and says how long the comparison with torch took and the peak of memory before it."""
    from slmdeploy.exporting import decoder_export
    from slmdeploy.exporting.export import export

    prove, found = decoder_export._prove, {}

    def timed(*arguments: Any) -> dict[str, Any]:
        start, found["peak_before_bytes"] = time.perf_counter(), peak_bytes(resource.RUSAGE_SELF)
        result = prove(*arguments)
        found["comparison_seconds"] = time.perf_counter() - start
        return result

    decoder_export._prove = timed
    export(checkpoint, out=out)
    return found


def export_genai(checkpoint: Path, out: Path) -> dict[str, float]:
    """onnxruntime-genai's model builder, for the CPU in float32."""
    with tempfile.TemporaryDirectory() as cache:
        sys.argv = ["builder", "-i", str(checkpoint), "-o", str(out), "-p", "fp32", "-e", "cpu", "-c", cache]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    return {}


def export_optimum(checkpoint: Path, out: Path) -> dict[str, float]:
    """optimum-onnx, with past, as its command line does but for the validation."""
    from optimum.exporters.onnx import main_export

    main_export(str(checkpoint), out, task="text-generation-with-past", do_validation=False, local_files_only=True)
    return {}


def export_transformers(checkpoint: Path, out: Path) -> dict[str, float]:
    """transformers.exporters: a step of several tokens behind a past, with ONNX Runtime's operators for the CPU."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    inputs = {
        "input_ids": torch.ones((2, 4), dtype=torch.int64),
        "attention_mask": torch.ones((2, 4), dtype=torch.int64),
    }
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    OnnxExporter().export_for_generation(model, inputs, config, multi_token_decode=True).save_pretrained(out)
    return {}


EXPORTERS = dict(zip(PEERS, (export_slmdeploy, export_genai, export_optimum, export_transformers), strict=True))


def peak_bytes(whose: int) -> int:
    """Peak resident memory; Linux counts it in KiB."""
    return resource.getrusage(whose).ru_maxrss * 1024


def python_of(peer: str, environments: Path) -> Path:
    """The interpreter of an exporter; its environment is made where there is none."""
    if peer not in REQUIREMENTS:
        return Path(sys.executable)
    folder = environments / peer.replace(" ", "-")
    python = folder / "bin" / "python"
    if not (folder / "finished").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[peer]], check=True)
        (folder / "finished").touch()
    return python


def measure(python: Path, peer: str, checkpoint: Path) -> dict[str, float]:
    """One export in a process of its own: seconds, peak_bytes, output_bytes, and what the exporter adds."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        out = Path(folder) / "out"
        command = [python, __file__, "--child", peer, "--checkpoint", checkpoint, "--out", out]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        with (Path(folder) / "log").open("w+") as log:
            start = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, encoding="utf-8")
            assert process.stdout is not None
            said = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            if status:
                log.seek(0)
                raise SystemExit(f"{peer} failed:\n{log.read()[-4000:]}")
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        shape = {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, "output_bytes": written}
        return shape | json.loads(said.splitlines()[-1])


def summary(turns: list[dict[str, float]]) -> dict[str, float]:
    """Medians of times and largest of sizes over the rounds."""
    kinds = {key: [turn[key] for turn in turns] for key in turns[0]}
    found = {key: max(values) if key.endswith("bytes") else statistics.median(values) for key, values in kinds.items()}
    if "comparison_seconds" in found:
        found["seconds_without_comparison"] = found["seconds"] - found["comparison_seconds"]
    return found


def print_table(results: dict[str, dict[str, float]]) -> None:
    """The figures for people, slmdeploy once without its comparison with torch and once with it."""
    rows = []
    for peer, found in results.items():
        if "comparison_seconds" in found:
            without = found["seconds_without_comparison"]
            rows.append((f"{peer}, without comparison", without, found["peak_before_bytes"], found["output_bytes"]))
            peer += ", with comparison"
        rows.append((peer, found["seconds"], found["peak_bytes"], found["output_bytes"]))
    print("| exporter | seconds | peak memory, MB | output, MB |\n|---|---|---|---|")
    for peer, seconds, peak, written in rows:
        print(f"| {peer} | {seconds:.1f} | {peak / 1e6:.0f} | {written / 1e6:.0f} |")


def run_child(peer: str, checkpoint: Path, out: Path) -> None:
    """Export in this process; the last line says what the exporter adds to the figures."""
    found = EXPORTERS[peer](checkpoint, out)
    print(f"\n{json.dumps(found)}")


def main() -> None:
    """Make checkpoint and environments, then let the exporters take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen2")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=PEERS, action="append", help="this exporter; may be given several times")
    parser.add_argument("--environments", type=Path, default=Path("work/environments"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options.child, options.checkpoint, options.out)
        return
    environments = options.environments.absolute()
    environments.mkdir(parents=True, exist_ok=True)
    pythons = {peer: python_of(peer, environments) for peer in options.only or PEERS}
    place = Path(tempfile.mkdtemp(prefix="export-peers-"))
    try:
        checkpoint = place / "checkpoint"
        write_checkpoint(checkpoint, options.architecture, options.shape)
        turns: dict[str, list[dict[str, float]]] = {peer: [] for peer in pythons}
        for _ in range(options.rounds):
            for peer, python in pythons.items():
                turns[peer].append(measure(python, peer, checkpoint))
                print(f"{peer}: {turns[peer][-1]['seconds']:.1f} s", file=sys.stderr)
        results = {peer: summary(taken) for peer, taken in turns.items()}
        print_table(results)
        if options.json:
            about = {"shape": options.shape, "architecture": options.architecture, "rounds": options.rounds}
            about |= {"machine": {"arch": platform.machine(), "cores": os.cpu_count()}}
            print(json.dumps(about | {"exporters": results}))
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
