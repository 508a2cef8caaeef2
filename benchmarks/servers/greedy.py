"""Whether a text is what a model says by greedy decoding, where near ties may fall either way.

Kernels round differently for one row and for several, and 8-bit activations make a step of a last digit, so a server
that batches may rightly part from the model alone where the best two tokens are close (docs/engine.md). A text is right
if some sequence of tokens has it, each within `near` logits of the best behind those before it. The judge is the model
alone, in this process. Knows no server.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock

import numpy as np

from slmdeploy.runtime.model import load

NEAR_FP32 = 1e-3
NEAR_QUANTISED = 0.5
"""Logits; rows of a batch were up to 0.13 apart from rows alone in a 12-layer model with 4-bit weights."""


class Greedy:
    """The judge of a build's texts."""

    def __init__(self, build: Path) -> None:
        self._model = load(build, threads=1)
        self._near = NEAR_FP32 if self._model.runtime.precision == "fp32" else NEAR_QUANTISED
        self._known: dict[tuple[str, str, int, bool], bool] = {}
        self._alone = Lock()

    def accepts(self, prompt: str, text: str, new_tokens: int, whole: bool) -> bool:
        """Whether `text` is an answer of so many new tokens to a prompt, or one that an end token ended; not whole:
        whether it begins like one. May be called from any thread.
        """
        key = prompt, text, new_tokens, whole
        with self._alone:
            if key not in self._known:
                self._known[key] = self._accepts(*key)
            return self._known[key]

    def _accepts(self, prompt: str, text: str, new_tokens: int, whole: bool) -> bool:
        ids = self._model.codec.prompt(prompt, "prompt")
        paths: list[list[int]] = [[]]
        while paths:
            path = paths.pop()
            said, certain = self._text(ids, path)
            ended = len(path) == new_tokens or (path and path[-1] in self._model.runtime.eos_token_ids)
            if (said == text and ended) if whole else certain.startswith(text):
                return True
            if not ended and text.startswith(certain):
                paths += [[*path, token] for token in self._next([*ids, *path])]
        return False

    def _text(self, ids: Sequence[int], path: Sequence[int]) -> tuple[str, str]:
        """What tokens say when they end here, and what of that is certain when others follow."""
        detokenizer = self._model.codec.detokenizer(ids)
        certain = "".join(detokenizer.feed(token) for token in path)
        return certain + detokenizer.flush(), certain

    def _next(self, ids: Sequence[int]) -> Iterator[int]:
        logits = self._model.logits(ids)[-1]
        near = np.flatnonzero(logits >= logits.max() - self._near)
        # The best last, since the last is tried first.
        return iter(near[np.argsort(logits[near])].tolist())
