"""Runs a compiled decoder on a GPU: prefill, one-token steps, all logits, and batches for checks. Ids in, logits out.

Has the methods of decoding.py's Decoder. Keys and values stay on the GPU, in two sets of buffers for the whole context.
A plan that concatenates reads the past from one set and writes the present to the other, which then is the past. One
with a static cache writes in place, and the shapes of its steps never change: a step is recorded as a CUDA graph, and
only the token, its position and the number of tokens held are copied in and the logits out. Knows nothing of text,
sampling or who compiled the plan, and reaches the GPU through `Device` and `Call` alone, so tests put ONNX Runtime and
the host's memory behind those. **Not run on a GPU yet.**
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .kv import too_long
from .session import kv_names
from .tensorrt_memory import Buffer, Device, Recorded
from .tensorrt_session import Call

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_FLOAT_BYTES = 4


class TensorRTDecoder:
    """A plan with the keys and values of one sequence on ``device``; ``phase`` gives the calls of its phases.

    ``inputs`` are the names of what the plan reads: a graph without positions has no position_ids.
    """

    def __init__(
        self, config: RuntimeConfig, phase: Callable[[str], Call], device: Device, inputs: Collection[str]
    ) -> None:
        self.config = config
        self.sequence = 0
        """Counts the sequences begun, so that whoever continues one can tell that the cache still holds it."""
        self.length = 0
        self._device, self._takes = device, inputs
        # Each has memory of its own: a recorded step must find its own where it was.
        self._prefill, self._decode = _Place(phase("prefill"), device), _Place(phase("decode"), device)
        self._static = config.interface == "static"
        self._heads = [heads for heads in config.kv_heads for _ in range(2)]
        self._pasts, self._presents = kv_names(config.layers)
        self._held, self._other = self._buffers(), self._buffers()
        self._row: Floats = np.zeros(config.vocab_size, np.float32)
        self._step: Recorded | None = None

    def _buffers(self) -> list[int]:
        size = self.config.max_length * self.config.head_dim * np.dtype(self.config.cache).itemsize
        return [self._device.allocate(heads * size) for heads in self._heads]

    def reserve(self, tokens: int) -> None:
        """Nothing but a check: the buffers hold the context. InputError when it is more than that."""
        if tokens > self.config.max_length:
            raise too_long(tokens, self.config.max_length)

    def prefill(self, ids: Ids) -> Floats:
        """Start anew with these ids; the last position's logits, float32 [vocab], overwritten by the next call."""
        self._row[:] = self.logits(ids)[-1]
        return self._row

    def logits(self, ids: Ids) -> Floats:
        """Start anew with these ids; the logits of all positions, float32 [length, vocab], the caller's own."""
        self.reserve(ids.size)
        self.sequence += 1
        self.length = 0
        found = self._prompt(ids, self._held)
        self._keep(ids.size)
        return found

    def step(self, token: int) -> Floats:
        """Append one token; the logits behind it, float32 [vocab], overwritten by the next call."""
        self.reserve(self.length + 1)
        ids = np.array([token], np.int64)
        if self._step is None:
            self._bind(self._decode, ids, self.length, self._held)
            self._decode.call.run()
            if self._static:
                self._step = self._recorded()
        else:
            sent = self._tokens(ids, self.length)
            self._decode.send(sent)
            self._step.launch()
        self._device.download(self._decode.logits.address, self._row)
        self._device.wait()
        self._keep(1)
        return self._row

    def _recorded(self) -> Recorded:
        """The step that has just run, recorded: the first run allocates what it needs, which cannot be recorded."""
        self._device.wait()
        self._device.begin_capture()
        self._decode.call.run()
        return self._device.end_capture()

    def batch(self, rows: Sequence[Ids]) -> list[Floats]:
        """The last logits of each row, float32 [vocab]; a plan takes one sequence, so one row behind the other.

        Touches nothing of the sequence that steps continue: keys and values go to the other set of buffers.
        """
        for row in rows:
            self.reserve(row.size)
        return [self._prompt(row, self._other)[-1] for row in rows]

    def _prompt(self, ids: Ids, past: list[int]) -> Floats:
        """Run ids behind nothing; all their logits. ``past`` are the buffers that a static cache is written to."""
        self._bind(self._prefill, ids, 0, past)
        self._prefill.call.run()
        found: Floats = np.empty((ids.size, self.config.vocab_size), np.float32)
        self._device.download(self._prefill.logits.address, found)
        self._device.wait()
        return found

    def _keep(self, tokens: int) -> None:
        self.length += tokens
        if not self._static:
            self._held, self._other = self._other, self._held

    def _bind(self, place: "_Place", ids: Ids, past: int, held: list[int]) -> None:
        """Give a call its inputs, ``past`` tokens being in the buffers ``held``, and places for what it writes."""
        tokens = self._tokens(ids, past)
        for name, array in tokens.items():
            place.call.set_input(name, array.shape, place.room_for(name, array))
        place.send(tokens)
        self._device.wait()
        width = self.config.max_length if self._static else past
        written = held if self._static else self._other
        names = zip(self._pasts, self._presents, self._heads, held, written, strict=True)
        for past_name, present, heads, source, to in names:
            place.call.set_input(past_name, (1, heads, width, self.config.head_dim), source)
            place.call.set_output(present, to)
        place.logits.hold(ids.size * self.config.vocab_size * _FLOAT_BYTES)
        place.call.set_output("logits", place.logits.address)

    def _tokens(self, ids: Ids, past: int) -> dict[str, Ids]:
        """What a run reads beside the cache."""
        found = {
            "input_ids": ids.reshape(1, -1),
            "position_ids": np.arange(past, past + ids.size)[None],
            "attention_mask": np.ones((1, past + ids.size), np.int64),
            "cache_lengths": np.array([past]),
        }
        return {name: array for name, array in found.items() if name in self._takes}


class _Place:
    """A call with memory for what it reads beside the cache, and for its logits."""

    def __init__(self, call: Call, device: Device) -> None:
        self.call, self.logits = call, Buffer(device)
        self._device = device
        self._inputs: dict[str, Buffer] = {}
        self._sent: Mapping[str, Ids] = {}

    def room_for(self, name: str, array: Ids) -> int:
        """The address of an input that is as large as ``array``."""
        buffer = self._inputs.setdefault(name, Buffer(self._device))
        buffer.hold(array.nbytes)
        return buffer.address

    def send(self, tokens: Mapping[str, Ids]) -> None:
        """Copy these inputs to their places, which are large enough."""
        self._sent = tokens  # copies may still read them when this returns
        for name, array in tokens.items():
            self._device.upload(array, self._inputs[name].address)
