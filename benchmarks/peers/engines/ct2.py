"""CTranslate2: its converter for transformers, int8 weights per row, 8-bit activations per token, float32 KV cache."""

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Rows


def versions(**options: Any) -> dict[str, str]:
    """Of the engine."""
    return {"ctranslate2": version("ctranslate2")}


def prepare(checkpoint: Path, folder: Path, quantization: str) -> None:
    """Convert as `ct2-transformers-converter` does."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(checkpoint)).convert(str(folder), quantization=quantization, force=True)


def open_engine(folder: Path, threads: int, quantization: str) -> "Ctranslate2":
    """Open a converted folder."""
    import ctranslate2

    # Of these models only the encoders have an unknown token; the converted folder says nothing else of its kind.
    is_encoder = bool(json.loads((folder / "config.json").read_text())["unk_token"])
    kind = ctranslate2.Encoder if is_encoder else ctranslate2.Generator
    model = kind(str(folder), device="cpu", compute_type=quantization, inter_threads=1, intra_threads=threads)
    words = json.loads((folder / "vocabulary.json").read_text())
    return Ctranslate2(model, words)


class Ctranslate2:
    """A loaded model, decoder or encoder. Its generator takes the words of the vocabulary, not ids."""

    def __init__(self, model: Any, words: list[str]) -> None:
        self._model, self._words = model, words
        self._prefix: list[str] = []

    def _row(self, ids: Sequence[int]) -> list[str]:
        return [self._words[i] for i in ids]

    def generate(self, prompts: Rows, new_tokens: int) -> Iterator[object]:
        """Greedy; its callback says when a row of the batch has a new token, from another thread."""
        steps: SimpleQueue[int] = SimpleQueue()
        rows = [self._row(prompt) for prompt in prompts]

        def told(step: Any) -> bool:
            if step.batch_id == len(rows) - 1:
                steps.put(step.step)
            return False

        limits = {"max_length": new_tokens, "min_length": new_tokens, "include_prompt_in_result": False}
        run = Thread(
            target=self._model.generate_batch,
            args=(rows,),
            kwargs={**limits, "beam_size": 1, "sampling_topk": 1, "callback": told, "cache_static_prompt": False},
        )
        run.start()
        for _ in range(new_tokens):
            yield steps.get()
        run.join()

    def begin(self, prefix: Sequence[int], hot: bool) -> None:
        """Its generator caches a static prompt when it first sees it; one throw-away token puts it there."""
        self._prefix = self._row(prefix)
        if hot:
            self._generate_one([self._words[3]])

    def score(self, items: Rows) -> object:
        """All items as one batch behind the cached static prompt, with the log-probability of the token behind each."""
        return self._generate_one(*(self._row(item) for item in items))

    def _generate_one(self, *rows: list[str]) -> list[float]:
        found = self._model.generate_batch(
            list(rows),
            static_prompt=self._prefix,
            cache_static_prompt=True,
            max_length=1,
            include_prompt_in_result=False,
            return_scores=True,
        )
        return [one.scores[0] for one in found]

    def encode(self, rows: Rows) -> object:
        """Mean of the last hidden states."""
        out = self._model.forward_batch([list(row) for row in rows])
        return np.array(out.last_hidden_state).mean(1)
