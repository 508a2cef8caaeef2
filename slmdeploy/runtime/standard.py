"""Runs model.onnx of the standard interface: past in, present = past and new tokens out, logits of every position.

That is what exporters other than ours make, so graphs that were traced or are portable run here, with the methods of
decoding.py's Decoder. Nothing can be written in place: ONNX Runtime allocates each present, which is handed on as the
past of the next run as it is, without a copy of ours, on the GPU where a provider runs the graph there; not run on one
yet. Knows nothing of text, sampling or who made the graph.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .bundle import RuntimeConfig, read_manifest
from .cuda_cache import DEVICE
from .decoding import GRAPH, padded, width_masks
from .kv import too_long
from .provider_options import PROMPTS, STEPS, engine_place, read_options
from .providers import PROVIDERS, require
from .session import Binding, as_value, check_interface, kv_names, open_session

_SMALLEST = 128
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class StandardDecoder:
    """model.onnx with the keys and values of one sequence as its last run returned them."""

    def __init__(self, folder: Path, config: RuntimeConfig, threads: int) -> None:
        self.config = config
        self.sequence = 0
        """Counts the sequences begun, so that whoever continues one can tell that the past is still its own."""
        self.length = 0
        self._path = folder / GRAPH
        self._prompts, steps = _open_phases(folder, config, threads)
        self._device = "cpu" if config.provider == "cpu" else DEVICE
        self._positions = "position_ids" in {node.name for node in steps.get_inputs()}
        inputs = ("input_ids", "attention_mask", *(["position_ids"] if self._positions else []))
        check_interface(steps, self._path, config, dict.fromkeys(inputs, "int64"), "logits")
        self._past_names, self._present_names = kv_names(config.layers)
        self._past: list[ort.OrtValue] = []
        self._masks: list[ort.OrtValue] = []
        self._token, self._position = np.zeros((2, 1, 1), np.int64)
        self._row = np.zeros((1, 1, config.vocab_size), np.float32)
        self._last: Floats = self._row.reshape(-1)
        self._step = Binding(steps, self._path)
        self._step.set_input("input_ids", as_value(self._token))
        if self._positions:
            self._step.set_input("position_ids", as_value(self._position))

    def reserve(self, tokens: int) -> None:
        """Have the attention masks of up to `tokens` tokens ready; InputError when that is more than the context."""
        if tokens > self.config.max_length:
            raise too_long(tokens, self.config.max_length)
        if tokens >= len(self._masks):
            self._masks = width_masks(min(self.config.max_length, max(tokens, 2 * len(self._masks), _SMALLEST)))

    def prefill(self, ids: Ids) -> Floats:
        """Start anew with these ids; the last position's logits, float32 [vocab], overwritten by the next call."""
        self._last[:] = self.logits(ids)[-1]
        return self._last

    def logits(self, ids: Ids) -> Floats:
        """Start anew with these ids; the logits of all positions, float32 [length, vocab], the caller's own."""
        self.reserve(ids.size)
        self.sequence += 1
        self._past, self.length = self._empty_past(1), 0
        logits = np.empty((1, ids.size, self.config.vocab_size), np.float32)
        binding = self._bound(ids.reshape(1, -1), self._masks[ids.size], logits)
        self._extend(binding, ids.size)
        rows: Floats = logits[0]
        return rows

    def step(self, token: int) -> Floats:
        """Append one token; the logits behind it, float32 [vocab], overwritten by the next call."""
        width = self.length + 1
        self.reserve(width)
        self._token[0, 0], self._position[0, 0] = token, self.length
        self._step.set_input("attention_mask", self._masks[width])
        self._step.clear_outputs()
        self._step.set_output("logits", as_value(self._row))
        self._extend(self._step, 1)
        return self._last

    def batch(self, rows: Sequence[Ids]) -> list[Floats]:
        """One right-padded prefill over rows of unequal lengths; the last logits of each, float32 [vocab].

        Touches nothing of the sequence that steps continue. What is compiled takes one row behind the other.
        """
        if PROVIDERS[self.config.provider].compiles:
            return [self._batch([row])[0] for row in rows]
        return self._batch(rows)

    def _batch(self, rows: Sequence[Ids]) -> list[Floats]:
        ids, mask = padded(rows, self.config.max_length)
        logits = np.empty((*ids.shape, self.config.vocab_size), np.float32)
        binding = self._bound(ids, as_value(mask), logits)
        for name, value in zip(self._past_names, self._empty_past(len(rows)), strict=True):
            binding.set_input(name, value)
        binding.run()
        return [logits[i, row.size - 1] for i, row in enumerate(rows)]

    def _bound(self, ids: Ids, mask: ort.OrtValue, logits: Floats) -> Binding:
        binding = Binding(self._prompts, self._path)
        binding.set_input("input_ids", as_value(ids))
        binding.set_input("attention_mask", mask)
        if self._positions:
            binding.set_input("position_ids", as_value(np.tile(np.arange(ids.shape[1]), (ids.shape[0], 1))))
        binding.set_output("logits", as_value(logits))
        return binding

    def _extend(self, binding: Binding, tokens: int) -> None:
        """Run behind the past, whose place the present then takes."""
        for past, present, value in zip(self._past_names, self._present_names, self._past, strict=True):
            binding.set_input(past, value)
            binding.allocate_output(present, self._device)
        binding.run()
        # The outputs stand in the order of their binding: the logits first.
        self._past = binding.outputs()[1:]
        self.length += tokens

    def _empty_past(self, rows: int) -> list[ort.OrtValue]:
        heads = (heads for heads in self.config.kv_heads for _ in range(2))
        return [as_value(np.empty((rows, count, 0, self.config.head_dim), self.config.cache)) for count in heads]


def _open_phases(
    folder: Path, config: RuntimeConfig, threads: int
) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """The sessions that prompts and steps run in: one and the same, or one compiled for each."""
    path, provider = folder / GRAPH, config.provider
    opened = partial(open_session, path, threads=threads, spinning=config.spinning, provider=provider)
    if not PROVIDERS[provider].compiles:
        session = opened(as_written=config.numerics_only)
        return session, session
    require(path, provider)
    options = read_options(folder)
    content = {name: entry.sha256 for name, entry in read_manifest(folder).files.items() if ".onnx" in name}
    about = {"provider": provider, "onnxruntime": ort.__version__, **options.to_json()}

    def of(phase: str) -> ort.InferenceSession:
        place = engine_place(content, {"phase": phase, **about})
        return opened(as_written=True, settings=options.of(phase, provider, place))

    return of(PROMPTS), of(STEPS)
