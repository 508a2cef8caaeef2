"""How much memory `export` takes beside how large the checkpoint is: the peak of every step, in a process of its own.

    python benchmarks/export_memory.py                     a random Llama of 3 GB in float32
    python benchmarks/export_memory.py --dtype bfloat16    the same weights in 1.5 GB, which export widens to 3 GB

The checkpoint is written tensor by tensor, so this script itself stays small. A peak is VmHWM of Linux: the largest
resident memory so far, with the pages of mapped files that the kernel may drop at any time. The interpreter with torch
and ONNX Runtime imported is in it (250 to 450 MB).
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parent.parent
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 14,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CHILD = """
import json, sys
from pathlib import Path
from slmdeploy.exporting.export import export

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

class Steps:
    label, peaks = "start", {}
    def start(self, label, total, unit):
        self.finish()
        self.label = label
    def advance(self, n=1, note=""):
        pass
    def finish(self):
        self.peaks[self.label] = peak()

steps = Steps()
export(Path(sys.argv[1]), out=Path(sys.argv[2]), progress=steps)
print(json.dumps(steps.peaks | {"all": peak()}))
"""


def write_random_checkpoint(folder: Path, dtype: str = "float32", **changes: Any) -> int:
    """A random Llama with a tokenizer of bytes; returns the bytes of its weights."""
    from slmdeploy.exporting.reading import read_spec
    from tests.graphs import tiny_tokenizer

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"dtype": dtype} | changes))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    shapes = read_spec(folder).tensor_shapes()
    code, width = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}[dtype]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    encoded, random = json.dumps(header).encode(), np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            tensor = np.float32(0.02) * random.standard_normal(shape, dtype=np.float32) + np.float32("norm" in name)
            bits = tensor.view(np.uint32)
            file.write((tensor if width == 4 else (bits >> 16).astype(np.uint16)).tobytes())
    return end


def peaks_of_export(checkpoint: Path, out: Path) -> dict[str, int]:
    """The peak in bytes by the end of each step, and `all`."""
    command = [sys.executable, "-c", CHILD, str(checkpoint), str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory of export")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        size = write_random_checkpoint(Path(place) / "checkpoint", options.dtype)
        peaks = peaks_of_export(Path(place) / "checkpoint", Path(place) / "graph")
    widened = size * (2 if options.dtype == "bfloat16" else 1)
    print(f"checkpoint {size / 1e9:.2f} GB in {options.dtype}, {widened / 1e9:.2f} GB in float32")
    for label, peak in peaks.items():
        print(f"{label:20} {peak / 1e9:6.2f} GB  {peak / widened:5.2f} x the float32 weights")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
