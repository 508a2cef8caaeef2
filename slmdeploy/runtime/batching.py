"""Decodes several sequences of unequal lengths together, one token each per step; they join and leave between steps.

Decoding one sequence reads all weights for one token; a batch reads them once for all. Rows of unequal lengths need no
padding: GroupQueryAttention takes each row's length from the row sums of the attention mask and looks no further.
ONNX Runtime refuses several tokens behind a past in a batch, so a prompt is run alone, straight into its row of the
buffers, at once (`admit`) or in pieces between steps (`begin`, `extend`, `join`). The rows in use are the first ones
(slots.py), so sequences are numbered as in a list from which the last takes the place of one that leaves. Knows nothing
of sampling, stopping or which request comes next: that is generation.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .decoding import Decoder
from .segments import Segment
from .session import Binding, as_value
from .slots import SlotCache

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class BatchDecoder:
    """Up to `slots` sequences over the sessions of a Decoder, whose own sequence they leave alone."""

    def __init__(self, decoder: Decoder, slots: int) -> None:
        self.cache = SlotCache(decoder.config, slots)
        self._decoder = decoder
        self._tokens = np.zeros((slots, 1), np.int64)
        self._logits = np.zeros((slots, decoder.config.vocab_size), np.float32)
        self._prompt_logits = np.zeros((1, decoder.config.vocab_size), np.float32)
        self._steps: dict[int, Binding] = {}
        """The binding of a step by the number of its rows: all is bound once but the mask, whose shape grows."""
        self._mask_memory = np.zeros(0, np.int64)
        self._columns = np.zeros(0, np.int64)

    @property
    def used(self) -> int:
        """Sequences in the batch; they have the rows 0 to used - 1."""
        return self.cache.used

    @property
    def full(self) -> bool:
        """Whether a sequence has to leave before another can join."""
        return self.cache.used == self.cache.slots

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in each row, so that no later step has to grow the cache."""
        if self.cache.reserve(tokens):
            self._steps.clear()
            self._mask_memory = np.zeros(self.cache.slots * self.cache.capacity, np.int64)
            self._columns = np.arange(self.cache.capacity)

    def admit(self, ids: Ids) -> Floats:
        """Run a prompt, int64 [length], in the next row, which is `used` before; the logits behind it, float32 [vocab].

        They are overwritten by the next admission. Raises InputError for a prompt that exceeds the context.
        """
        self.begin(ids.size)
        behind = self.extend(ids, last=True)
        assert behind is not None, "the last piece of a prompt has logits"
        self.join()
        return behind

    @property
    def slots(self) -> int:
        """Sequences that the batch has room for."""
        return self.cache.slots

    def begin(self, tokens: int, pieces: Sequence[tuple[Segment, int]] = ()) -> None:
        """Stage the next row for a sequence that may come to `tokens`, with what is known of its beginning.

        pieces: segments, and how many tokens of each. Raises InputError when `tokens` exceed the context and
        ResourceError when there is no memory for them.
        """
        self.reserve(tokens)
        self.cache.stage(pieces)

    def extend(self, ids: Ids, *, last: bool) -> Floats | None:
        """Run the next ids of the prompt in the staged row; behind the last ones, their logits as `admit` gives them.

        Prompts are computed as Decoder.run_prompt does, so pieces give what the whole gives to the rounding of kernels.
        """
        cache, row = self.cache, self.cache.used
        assert cache.staged is not None, "a row has to be staged before a prompt runs in it"
        logits = self._prompt_logits if last else None
        self._decoder.run_prompt(ids, logits, lambda binding: cache.bind_row(binding, row), past=cache.staged)
        cache.staged += ids.size
        return None if logits is None else logits[0]

    def join(self) -> None:
        """The staged row takes part in the steps to come, as the last."""
        self.cache.join()

    def fork(self) -> None:
        """Put a copy of the last sequence behind it."""
        self.cache.fork()

    def abandon(self) -> None:
        """Forget the staged row."""
        self.cache.staged = None

    def length(self, row: int) -> int:
        """Tokens that a row in use holds."""
        return int(self.cache.lengths[row])

    def read(self, row: int, start: int, stop: int) -> Segment:
        """A copy of the keys and values that a row in use holds for the tokens start to stop."""
        return self.cache.read(row, start, stop)

    def shrink(self, size_bytes: int) -> None:
        """Give the buffers back if they are larger than this; only while no row holds anything."""
        if self.cache.size_bytes > size_bytes:
            self.cache.clear()
            self._steps.clear()

    def step(self, tokens: Ids) -> Floats:
        """Append tokens[i] to the sequence of row i, for all rows in use; their logits, float32 [used, vocab].

        They are overwritten by the next step. Raises InputError when a row is full to the end of the context.
        """
        used, cache = self.cache.used, self.cache
        assert tokens.shape == (used,) != (0,), "a step takes one token for each sequence"
        lengths = cache.lengths[:used]
        width = int(lengths.max()) + 1
        self.reserve(width)
        binding = self._steps.get(used) or self._bind_step(used)
        self._tokens[:used, 0] = tokens
        mask = self._mask_memory[: used * width].reshape(used, width)
        np.less_equal(self._columns[:width], lengths[:, None], out=mask)
        binding.set_input("attention_mask", as_value(mask))
        binding.run()
        lengths += 1
        return self._logits[:used]

    def judge(self, ids: Ids) -> Floats:
        """Append given tokens to the only sequence in one run; the logits behind each, float32 [length, vocab].

        As many steps would give, to the rounding of kernels; they are the caller's own. Raises what `step` raises.
        """
        assert self.cache.used == 1, "several tokens behind a past are run in one row alone"
        past = int(self.cache.lengths[0])
        self.reserve(past + ids.size)
        rows = self._decoder.run_given(ids, lambda binding: self.cache.bind_row(binding, 0), past=past)
        self.cache.lengths[0] += ids.size
        return rows

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens of the only sequence; what runs next overwrites them."""
        assert self.cache.used == 1, "tokens are taken back from one row alone"
        assert 0 <= tokens < self.cache.lengths[0], "a sequence keeps its beginning"
        self.cache.lengths[0] -= tokens

    def release(self, row: int) -> None:
        """End the sequence of `row`; the sequence of the last row takes its place."""
        self.cache.remove(row)

    def _bind_step(self, used: int) -> Binding:
        binding = self._steps[used] = self._decoder.binding(used)
        binding.set_input("input_ids", as_value(self._tokens[:used]))
        binding.set_input("logits_positions", as_value(np.arange(used)))
        binding.set_output("logits", as_value(self._logits[:used]))
        self.cache.bind_used(binding)
        return binding
