"""What an engine's module opens, seen from worker.py: token ids in, and an answer that is only awaited.

Imports the standard library alone, because it is read in every engine's own environment.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

Rows = Sequence[Sequence[int]]


class NotOffered(Exception):  # noqa: N818  # not a failure: the engine's interface lacks it, and the reason is a result
    """An engine has no way to do what is asked; the message says why, and the report repeats it."""


class Engine(Protocol):
    """One model, opened."""

    def generate(self, prompts: Rows, new_tokens: int) -> Iterator[object]:
        """Greedy generation of ``new_tokens`` for each prompt, a yield per step of all rows; no prompt comes twice."""

    def begin(self, prefix: Sequence[int], hot: bool) -> None:
        """Take a prefix that items will stand behind; with ``hot`` all that can be kept of it is computed on return."""

    def score(self, items: Rows) -> object:
        """What tells the items apart: logits (or the log-probability) at the last token of each, behind the prefix."""

    def encode(self, rows: Rows) -> object:
        """Vectors of equally long rows of an encoder."""
