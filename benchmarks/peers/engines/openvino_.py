"""OpenVINO itself for encoders: optimum-intel's export, in 8 bits by nncf's post-training quantisation.

Calibrated on 64 rows of random tokens: the weights are random too, and ranges decide no speed.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import NotOffered, Rows

_FILE = "openvino_model.xml"


def versions() -> dict[str, str]:
    """Of the runtime and the quantiser."""
    return {name: version(name) for name in ("openvino", "nncf")}


def prepare(checkpoint: Path, folder: Path) -> None:
    """Export, quantise, save."""
    import nncf
    import openvino
    from optimum.intel import OVModelForFeatureExtraction

    model = OVModelForFeatureExtraction.from_pretrained(checkpoint, export=True, compile=False).model
    names = [port.get_any_name() for port in model.inputs]
    rng = np.random.default_rng(0)
    rows = [_feed(names, rng.integers(2, 30000, (1, 128))) for _ in range(64)]
    quantised = nncf.quantize(model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(quantised, folder / _FILE)


def _feed(names: Sequence[str], ids: Any) -> dict[str, Any]:
    kinds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: kinds[name] for name in names}


def open_engine(folder: Path, threads: int) -> "Openvino":
    """Compile for latency on the CPU."""
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    return Openvino(openvino.Core().compile_model(folder / _FILE, "CPU", hints))


class Openvino:
    """A compiled encoder."""

    def __init__(self, model: Any) -> None:
        self._request = model.create_infer_request()
        self._names = [port.get_any_name() for port in model.inputs]

    def encode(self, rows: Rows) -> object:
        """Mean of the last hidden states."""
        found = self._request.infer(_feed(self._names, np.array(rows, np.int64)))
        return found[0].mean(1)

    def generate(self, prompts: Rows, new_tokens: int) -> Iterator[object]:
        """Decoders are OpenVINO GenAI's."""
        raise NotOffered("decoders are the engines openvino-genai's")

    def begin(self, prefix: Sequence[int], hot: bool) -> None:
        """Decoders are OpenVINO GenAI's."""
        raise NotOffered("decoders are the engines openvino-genai's")

    def score(self, items: Rows) -> object:
        """Decoders are OpenVINO GenAI's."""
        raise NotOffered("decoders are the engines openvino-genai's")
