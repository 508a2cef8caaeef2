"""How likely a decoder finds given continuations of one context: sums of log-probabilities, and what greedy would do.

The context is computed once, as a prompt is, and each continuation behind it in the graph of steps, as it would be if
the model generated it: a phase-split or quantised build is judged in the form in which it is used. Long continuations
run in pieces, because the logits of a whole context of tokens times a large vocabulary are gigabytes. Results depend on
nothing that ran before. Knows nothing of text, tasks or the harness.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.decoding import Decoder, token_array
from slmdeploy.runtime.model import Model

PIECE = 128
"""Tokens of a continuation that run together: with a vocabulary of 150 000 their logits are 77 MB."""

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Likelihood(NamedTuple):
    """The natural logarithm of a continuation's probability, and whether greedy decoding would make it."""

    log_probability: float
    greedy: bool


def fitting(context: Sequence[int], continuation: Sequence[int], limit: int) -> Sequence[int]:
    """As much of the context's end as leaves the continuation room in `limit` tokens; its last token takes none.

    Raises InputError where not even one token of context has room.
    """
    room = limit - len(continuation) + 1
    if room < 1:
        raise InputError(
            f"a continuation of {len(continuation)} tokens was asked for, but the context of this model holds {limit}: "
            "leave the task out, or export the checkpoint with a larger --max-length"
        )
    return context[-room:]


def likelihoods(model: Model, context: Sequence[int], continuations: Iterable[Sequence[int]]) -> list[Likelihood]:
    """Of each continuation (one token or more) behind the context (the same), in their order.

    Raises InputError for empty ones and for what does not fit the model's context, CorruptArtifactError for logits that
    are no numbers. Only graphs of the interface `shared` can go back to the end of the context; others run each
    continuation together with the context.
    """
    wanted = [token_array(continuation, model.runtime.vocab_size) for continuation in continuations]
    if model.runtime.interface != "shared":
        return [_likelihood(model, [_at_once(model, context, ids)], ids) for ids in wanted]
    last = model.prefill(context)
    return [_likelihood(model, _behind(model.decoder, len(context), last, ids), ids) for ids in wanted]


def _at_once(model: Model, context: Sequence[int], continuation: Ids) -> Floats:
    return model.logits([*context, *continuation[:-1].tolist()])[len(context) - 1 :]


def _behind(decoder: Decoder, length: int, last: Floats, continuation: Ids) -> Iterator[Floats]:
    """The logits that predict each token, float32 [some, vocab], the first from behind the context of `length`."""
    yield last[None]
    decoder.cache.truncate(length)
    for start in range(0, continuation.size - 1, PIECE):
        yield decoder.extend(continuation[start : min(start + PIECE, continuation.size - 1)])


def _likelihood(model: Model, pieces: Iterable[Floats], continuation: Ids) -> Likelihood:
    total, greedy, done = 0.0, True, 0
    for logits in pieces:
        targets = continuation[done : done + len(logits)]
        chosen = logits[np.arange(len(logits)), targets]
        best = logits.max(axis=1)
        total += float((chosen - best - np.log(np.exp(logits - best[:, None]).sum(axis=1, dtype=np.float64))).sum())
        greedy = greedy and bool((logits.argmax(axis=1) == targets).all())
        done += len(logits)
    if not np.isfinite(total):
        raise CorruptArtifactError(f"{model.path} computes NaN or infinity; its weights are damaged.")
    return Likelihood(total, greedy)
