"""onnxruntime-genai: its model builder for the CPU with MatMulNBits weights, and its Generator.

The KV cache is float32, activations are quantised to 8 bits inside the kernels (accuracy level 4).
"""

import json
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import NotOffered, Rows


def versions(**options: Any) -> dict[str, str]:
    """Of the engine and the runtime under it."""
    return {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}


def prepare(checkpoint: Path, folder: Path, precision: str, block_size: int, extra: Sequence[str] = ()) -> None:
    """Run the builder as its command line does."""
    with tempfile.TemporaryDirectory() as cache:
        given = ["accuracy_level=4", f"block_size={block_size}", *extra]
        arguments = ["-i", checkpoint, "-o", folder, "-p", precision, "-e", "cpu", "-c", cache]
        sys.argv = ["builder", *map(str, arguments), "--extra_options", *given]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def open_engine(folder: Path, threads: int, **options: Any) -> "Genai":
    """Open a built folder with its config but for the number of threads."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    return Genai(og, og.Model(config))


class Genai:
    """A loaded model."""

    def __init__(self, og: Any, model: Any) -> None:
        self._og, self._model = og, model
        self._generator: Any = None
        self._prefix = 0

    def _new(self, rows: int, length: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=rows, past_present_share_buffer=True
        )
        return self._og.Generator(self._model, params)

    def generate(self, prompts: Rows, new_tokens: int) -> Iterator[object]:
        """One batch of equally long prompts; min_length keeps the end token away."""
        ids = np.array(prompts, np.int32)
        generator = self._new(len(prompts), ids.shape[1] + new_tokens)
        generator.append_tokens(ids if len(prompts) > 1 else ids[0])
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield None

    def begin(self, prefix: Sequence[int], hot: bool) -> None:
        """Keep the prefix in a generator that can be wound back."""
        self._generator = self._new(1, len(prefix) + 64)
        self._generator.append_tokens(np.array(prefix, np.int32))
        self._prefix = len(prefix)

    def score(self, items: Rows) -> object:
        """One item after the other, wound back to the prefix between them."""
        found = []
        for item in items:
            self._generator.rewind_to(self._prefix)
            self._generator.append_tokens(np.array(item, np.int32))
            found.append(self._generator.get_logits()[0, -1, :2].copy())
        return found

    def encode(self, rows: Rows) -> object:
        """It runs decoders."""
        raise NotOffered("onnxruntime-genai runs decoders")
