"""optimum-onnx: its exporter, dynamic quantisation for AVX512-VNNI per channel, and its ORTModel classes.

Activations are quantised to 8 bits with one scale per tensor, the KV cache is float32. Encoders stay as exported:
ONNX Runtime's transformer optimiser leaves a graph whose types this quantiser cannot infer.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Rows

_QUANTISED = "model_quantized.onnx"


def versions(**options: Any) -> dict[str, str]:
    """Of the library and the runtime under it."""
    return {name: version(name) for name in ("optimum-onnx", "onnxruntime", "transformers")}


def prepare(checkpoint: Path, folder: Path) -> None:
    """Export and quantise."""
    from optimum.exporters.onnx import main_export
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    task = "feature-extraction" if _is_encoder(checkpoint) else "text-generation-with-past"
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        main_export(str(checkpoint), scratch, task=task, do_validation=False, local_files_only=True)
        quantizer = ORTQuantizer.from_pretrained(scratch, file_name="model.onnx")
        wanted = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        quantizer.quantize(quantization_config=wanted, save_dir=folder)


def _is_encoder(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text())["model_type"] == "bert")


def open_engine(folder: Path, threads: int) -> "Optimum":
    """Open the quantised graph."""
    import onnxruntime as ort
    from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForFeatureExtraction

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    kind = ORTModelForFeatureExtraction if _is_encoder(folder) else ORTModelForCausalLM
    return Optimum(kind.from_pretrained(folder, file_name=_QUANTISED, session_options=options, local_files_only=True))


class Optimum:
    """A loaded model, decoder or encoder."""

    def __init__(self, model: Any) -> None:
        import torch

        torch.set_num_threads(1)  # it only carries arrays here, and its pool would wait beside ONNX Runtime's
        self._torch, self._model = torch, model
        self._past: Any = None

    def _run(self, ids: Any, past: Any, length: int) -> Any:
        mask = self._torch.ones((ids.shape[0], length), dtype=self._torch.int64)
        return self._model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)

    def generate(self, prompts: Rows, new_tokens: int) -> Iterator[object]:
        """Greedy steps over the past that the model hands back."""
        ids, past, length = self._torch.tensor(prompts), None, 0
        for _ in range(new_tokens):
            length += ids.shape[1]
            out = self._run(ids, past, length)
            past, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            yield int(ids[0, 0])

    def begin(self, prefix: Sequence[int], hot: bool) -> None:
        """Keep the prefix's past."""
        self._past = self._run(self._torch.tensor([prefix]), None, len(prefix)).past_key_values
        self._length = len(prefix)

    def score(self, items: Rows) -> object:
        """One item after the other behind the same past, which a run leaves as it is."""
        return [
            self._run(self._torch.tensor([item]), self._past, self._length + len(item)).logits[0, -1, :2].numpy()
            for item in items
        ]

    def encode(self, rows: Rows) -> object:
        """Mean of the last hidden states."""
        ids = np.array(rows, np.int64)
        out = self._model(input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
        return out.last_hidden_state.mean(1)
