"""Runs a decoder build of the engine openvino: one model that keeps keys and values itself. Ids in, logits out.

Has the methods of decoding.py's Decoder. The model is *stateful*: with keys and values as inputs and outputs OpenVINO
would copy them at each step. `beam_idx` says which row of the states each row of a run continues, so that scoring can
put many items behind one prefix (openvino_scoring.py). Long prompts run in pieces, because the mask of a piece is as
large as its length times all tokens before it. Knows nothing of text, sampling or who made the model.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .decoding import padded
from .errors import CorruptArtifactError
from .kv import too_long
from .openvino_session import GRAPH, Floats, OpenVinoModel, Request

PIECE = 1024
_SMALLEST = 128
_INPUTS = {"input_ids": "i64", "attention_mask": "i64", "logits_positions": "i64", "beam_idx": "i32"}
Ids = npt.NDArray[np.int64]


class StatefulModel(OpenVinoModel):
    """openvino_model.xml of a decoder, checked against runtime.json."""

    def __init__(self, folder: Path, config: RuntimeConfig, threads: int) -> None:
        assert config.inference_precision is not None, "read_runtime lets no stateful interface through without it"
        super().__init__(folder / GRAPH, threads=threads, precision=config.inference_precision)
        self.check(_INPUTS, ["logits"])
        wanted = sorted([[heads, config.head_dim] for heads in config.kv_heads for _ in range(2)])
        found = [[shape[1], shape[3]] for shape in self.states() if len(shape) == 4]
        if sorted(found, key=str) != sorted(wanted, key=str) or self.outputs["logits"][-1] != config.vocab_size:
            raise CorruptArtifactError(
                f"{self.path} has other keys, values or logits than runtime.json calls for; build it again."
            )


def rows_behind(request: Request, ids: Ids, mask: Ids, positions: Ids, beams: npt.NDArray[np.int32]) -> Floats:
    """Run ids [batch, sequence] behind rows `beams` of the states; logits [positions, vocab] until the next run.

    mask [batch, past + sequence] is 0 at padding; positions count over batch and sequence together.
    """
    for name, array in zip(_INPUTS, (ids, mask, positions, beams), strict=True):
        request.set(name, np.ascontiguousarray(array))
    request.run()
    return request.output("logits")


def run_pieces(request: Request, ids: Ids, positions: Ids) -> list[Floats]:
    """Start anew with ids [length], in pieces; the caller's own logits at the ascending positions."""
    request.forget()
    found = []
    beams = np.zeros(1, np.int32)
    for start in range(0, ids.size, PIECE):
        end = min(start + PIECE, ids.size)
        here = positions[(positions >= start) & (positions < end)] - start
        rows = rows_behind(request, ids[None, start:end], np.ones((1, end), np.int64), here, beams)
        found.append(rows.copy())
    return found


class StatefulDecoder:
    """A stateful model with the keys and values of one sequence."""

    def __init__(self, model: StatefulModel, config: RuntimeConfig) -> None:
        self.config = config
        self.sequence = 0
        """Counts the sequences begun, so that whoever continues one can tell that the states still hold it."""
        self.length = 0
        self._model, self._request = model, model.request()
        self._token = np.zeros((1, 1), np.int64)
        self._mask = np.ones((1, 0), np.int64)

    @cached_property
    def _apart(self) -> Request:
        """States beside those of the sequence."""
        return self._model.request()

    def reserve(self, tokens: int) -> None:
        """Have the attention mask of up to `tokens` tokens ready; InputError when that is more than the context."""
        if tokens > self.config.max_length:
            raise too_long(tokens, self.config.max_length)
        if tokens > self._mask.size:
            width = min(self.config.max_length, max(tokens, 2 * self._mask.size, _SMALLEST))
            self._mask = np.ones((1, width), np.int64)

    def prefill(self, ids: Ids) -> Floats:
        """Start anew with these ids; the last position's logits, float32 [vocab]."""
        row: Floats = self._start(ids, np.array([ids.size - 1]))[-1][-1]
        return row

    def logits(self, ids: Ids) -> Floats:
        """Start anew with these ids; the logits of all positions, float32 [length, vocab], the caller's own."""
        return np.concatenate(self._start(ids, np.arange(ids.size)))

    def _start(self, ids: Ids, positions: Ids) -> list[Floats]:
        self.reserve(ids.size)
        self.sequence += 1
        found = run_pieces(self._request, ids, positions)
        self.length = ids.size
        self._request.set("input_ids", self._token)
        self._request.set("logits_positions", np.zeros(1, np.int64))
        return found

    def step(self, token: int) -> Floats:
        """Append one token; the logits behind it, float32 [vocab], overwritten by the next call."""
        width = self.length + 1
        self.reserve(width)
        self._token[0, 0] = token
        self._request.set("attention_mask", self._mask[:, :width])
        self._request.run()
        self.length = width
        row: Floats = self._request.output("logits")[0]
        return row

    def batch(self, rows: Sequence[Ids]) -> list[Floats]:
        """One right-padded prefill over rows of unequal lengths; the last logits of each, float32 [vocab].

        Touches nothing of the sequence that steps continue.
        """
        ids, mask = padded(rows, self.config.max_length)
        self._apart.forget()
        last = np.array([i * ids.shape[1] + row.size - 1 for i, row in enumerate(rows)])
        return list(rows_behind(self._apart, ids, mask, last, np.arange(len(rows), dtype=np.int32)).copy())
