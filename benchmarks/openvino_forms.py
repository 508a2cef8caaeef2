"""Forms of a decoder in OpenVINO: weights alone or activations too, and in which precision the rest is computed.

    python benchmarks/openvino_forms.py GRAPH [--data DATA] [--threads N] [--forms int8,int8-asym,int4,w8a8]

For each form and each set of options: KL, top-1 agreement and perplexity ratio against the fp32 graph in ONNX Runtime
(on DATA's validation split, or on text that the graph writes itself), and the least CPU time of prompts of 128 and 512
tokens and of a step behind them: CPU time, because other work on the machine lengthens the wall clock's. The models run
with states, the form that nncf takes; builds run with pages, which changes what attention takes and no form's quality.
What decided profiles/openvino-int8.toml; docs/openvino.md has the table.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from slmdeploy.building.gate import Comparison, sequences_for
from slmdeploy.building.openvino_graph import stateful_decoder
from slmdeploy.building.openvino_quantize import compress_weights, nncf
from slmdeploy.runtime.model import load
from slmdeploy.specs import Weights

CALIBRATION_TOKENS = 128
BF16 = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
OPTIONS: dict[str, dict[str, str]] = {
    "bf16": BF16,
    "bf16, 8-bit cache": BF16 | {"KV_CACHE_PRECISION": "u8"},
    "f32": F32,
    "f32, activations f32": F32 | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
}
Feed = dict[str, NDArray[Any]]


def feed(ids: NDArray[np.int64], total: int, positions: Sequence[int]) -> Feed:
    """The inputs for ids [1, tokens], the last of `total`."""
    return {
        "input_ids": ids,
        "attention_mask": np.ones((1, total), np.int64),
        "logits_positions": np.array(positions),
        "position_ids": np.arange(total - ids.shape[1], total)[None],
        "beam_idx": np.zeros(1, np.int32),
    }


def calibrated(model: Any, sequences: Sequence[Sequence[int]], ignored: list[str], *, smooth: bool = False) -> Any:
    """nncf's post-training quantisation of weights and activations, parts whose names match `ignored` left out.

    smooth: with its SmoothQuant, at the default strength.
    """
    package = nncf()
    rows = [np.array([sequence[:CALIBRATION_TOKENS]]) for sequence in sequences]
    strengths = package.AdvancedSmoothQuantParameters(**({} if smooth else {"matmul": -1}))
    advanced = package.AdvancedQuantizationParameters(smooth_quant_alphas=strengths)
    with contextlib.redirect_stdout(io.StringIO()):  # nncf draws tables
        return package.quantize(
            model,
            package.Dataset([feed(row, row.size, range(row.size)) for row in rows]),
            model_type=package.ModelType.TRANSFORMER,
            subset_size=len(rows),
            ignored_scope=package.IgnoredScope(patterns=[*ignored, r"rotary\..*"], validate=False),
            advanced_parameters=advanced,
        )


def forms(sequences: Sequence[Sequence[int]]) -> dict[str, Callable[[Any], Any]]:
    """What makes each form of a stateful fp32 model."""

    def weights(**form: Any) -> Callable[[Any], Any]:
        return lambda model: compress_weights(model, Weights(scheme="weight-only", **form))

    return {
        "fp32": lambda model: model,
        "int8": weights(bits=8),
        "int8-asym": weights(bits=8, symmetric=False),
        "int4": weights(bits=4, block_size=32, symmetric=False),
        "int4-128": weights(bits=4, block_size=128),
        "w8a8": lambda model: calibrated(model, sequences, []),
        "w8a8-smooth": lambda model: calibrated(model, sequences, [], smooth=True),
        "w8a8-but-down": lambda model: calibrated(model, sequences, [".*down_proj.*"]),
    }


class Compiled:
    """A model under some options."""

    def __init__(self, path: Path, threads: int, options: dict[str, str]) -> None:
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **options}
        self._request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits of every position."""
        self._request.reset_state()
        self._request.infer(feed(np.array([ids]), len(ids), range(len(ids))), share_outputs=True)
        found: NDArray[np.float32] = self._request.get_tensor("logits").data.copy()
        return found

    def times(self, lengths: Sequence[int], vocabulary: int) -> Iterator[float]:
        """Least CPU milliseconds of a prompt of each length, then of a step behind the last."""
        for length in lengths:
            ids = np.random.default_rng(0).integers(0, vocabulary, (1, length))
            yield min(self._run(ids, length, new=True) for _ in range(5))
        yield min(self._run(ids[:, :1], length + 1 + i) for i in range(24))

    def _run(self, ids: NDArray[np.int64], total: int, *, new: bool = False) -> float:
        if new:
            self._request.reset_state()
        inputs = feed(ids, total, [ids.size - 1])
        started = time.process_time()
        self._request.infer(inputs, share_outputs=True)
        return (time.process_time() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forms", default="int8,int8-asym,int4,int4-128,w8a8,w8a8-smooth,w8a8-but-down")
    asked = parser.parse_args()
    reference = load(asked.graph, threads=asked.threads)
    comparison = Comparison(reference, sequences_for(reference, asked.data)[0])
    makers = forms(sequences_for(reference, None)[0])
    lengths = [min(length, reference.runtime.max_length // 2) for length in (128, 512)]
    print(f"| form | options | KL | top-1 | ppl | {lengths[0]} tokens ms | {lengths[1]} tokens ms | step ms |")
    print("|---|---|---|---|---|---|---|---|")
    for form in asked.forms.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.xml"
            openvino.save_model(makers[form](stateful_decoder(asked.graph / "model.onnx")), path, False)
            for name, options in OPTIONS.items():
                compiled = Compiled(path, asked.threads, options)
                found = comparison.quality(compiled)
                cells = [f"{found.kl:.5f}", f"{found.top1_agreement:.4f}", f"{found.ppl_ratio:.4f}"]
                cells += [f"{ms:.1f}" for ms in compiled.times(lengths, reference.runtime.vocab_size)]
                print(f"| {form} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
