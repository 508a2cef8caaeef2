"""llama.cpp through llama-cpp-python's low-level bindings: compiled for this machine, flash attention, KV in float16.

Items are scored as sequences of one batch that share the cells of the prefix, which is llama.cpp's own way.
"""

import ctypes
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import NotOffered, Rows

FILE = "model.gguf"
_CONTEXT = 2304
"""Tokens in the KV cache: the longest prompt of the comparison and what is generated behind it."""
_SEQUENCES = 33


def versions(**options: Any) -> dict[str, str]:
    """Of the bindings, which pin the llama.cpp inside them."""
    return {"llama-cpp-python": version("llama-cpp-python")}


def prepare(checkpoint: Path, folder: Path, form: str, pure: bool) -> None:
    """Write a GGUF file and quantise it with llama.cpp's own function."""
    import llama_cpp

    from benchmarks.peers.engines.gguf_file import write_gguf

    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "bf16.gguf"
    write_gguf(checkpoint, whole)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
    params.pure, params.nthread = pure, 2
    status = llama_cpp.llama_model_quantize(str(whole).encode(), str(folder / FILE).encode(), ctypes.byref(params))
    whole.unlink()
    if status:
        raise RuntimeError(f"llama_model_quantize ended with {status}")


def open_engine(folder: Path, threads: int, **options: Any) -> "LlamaCpp":
    """Open a GGUF file."""
    return LlamaCpp(folder / FILE, threads)


class LlamaCpp:
    """A model and one context with room for several sequences."""

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = _CONTEXT, 2048, 512
        params.n_seq_max = params.n_outputs_max = _SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type, params.kv_unified = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, True
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self._length = 0

    def _decode(self, rows: Rows, start: int, first_sequence: int) -> None:
        """Run tokens of several sequences at once, asking for the logits of the last of each."""
        batch, count = self._batch, 0
        for sequence, row in enumerate(rows, first_sequence):
            for place, token in enumerate(row):
                batch.token[count], batch.pos[count] = token, start + place
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = place == len(row) - 1
                count += 1
        batch.n_tokens = count
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")

    def _logits(self, place: int) -> np.ndarray[Any, Any]:
        pointer = self._api.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(pointer, (self._words,))

    def generate(self, prompts: Rows, new_tokens: int) -> Iterator[object]:
        """Each prompt a sequence; then one token of each at a time."""
        if len(prompts) * (len(prompts[0]) + new_tokens) > _CONTEXT:
            raise NotOffered(f"its context is opened for {_CONTEXT} tokens, and its memory is allocated at once")
        self._api.llama_memory_clear(self._memory, False)
        self._decode(prompts, 0, 0)
        length, ends = len(prompts[0]), [len(prompts[0]) * (i + 1) - 1 for i in range(len(prompts))]
        for _ in range(new_tokens - 1):
            tokens = [[int(self._logits(end).argmax())] for end in ends]
            yield None
            self._decode(tokens, length, 0)
            length, ends = length + 1, list(range(len(prompts)))
        yield int(self._logits(ends[0]).argmax())

    def begin(self, prefix: Sequence[int], hot: bool) -> None:
        """The prefix as sequence 0."""
        self._api.llama_memory_clear(self._memory, False)
        self._decode([prefix], 0, 0)
        self._length = len(prefix)

    def score(self, items: Rows) -> object:
        """All items in one batch, each a sequence that begins with the cells of the prefix."""
        for sequence in range(1, len(items) + 1):
            self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            self._api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        self._decode(items, self._length, 1)
        ends = np.cumsum([len(item) for item in items]) - 1
        return [self._logits(int(end))[:2].copy() for end in ends]

    def encode(self, rows: Rows) -> object:
        """Left out: sentence-transformers' models reach llama.cpp through their own tokenizers."""
        raise NotOffered("this comparison drives llama.cpp for decoders only")
