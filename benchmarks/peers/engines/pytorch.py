"""torch in bfloat16 by transformers: eager, compiled by inductor, or compiled by zentorch.

Decoding compiled uses a static cache, as transformers' own generation does; prompts run eagerly there, because a graph
per length of prompt would cost minutes of compilation each.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import NotOffered, Rows

_STATIC_LENGTH = 2176


def versions(backend: str) -> dict[str, str]:
    """Of torch, transformers and what compiles."""
    names = ["torch", "transformers", *(["zentorch"] if backend == "zentorch" else [])]
    return {name: version(name) for name in names}


def prepare(checkpoint: Path, folder: Path, backend: str) -> None:
    """Nothing to convert: the folder says where the checkpoint is, and its size is that of the checkpoint's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink(missing_ok=True)
        (folder / file).hardlink_to(checkpoint / file)


def open_engine(folder: Path, threads: int, backend: str) -> "Torch":
    """Load the checkpoint in bfloat16."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    if backend == "zentorch":
        import zentorch  # noqa: F401  # registers the backend
    is_encoder = json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    kind = AutoModel if is_encoder else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return Torch(torch, model, backend)


class Torch:
    """A loaded model, decoder or encoder."""

    def __init__(self, torch: Any, model: Any, backend: str) -> None:
        self._torch, self._model, self._backend = torch, model, backend
        compiled = None if backend == "eager" else torch.compile(model, backend=backend, dynamic=False)
        self._step = model if compiled is None else compiled
        self._compiled = compiled is not None
        self._prefix: Any = None

    def _cache(self, rows: int, length: int) -> Any:
        from transformers import DynamicCache, StaticCache

        if not self._compiled:
            return DynamicCache(config=self._model.config)
        # One length for all prompts, or each would be a compilation of its own.
        return StaticCache(config=self._model.config, max_cache_len=_STATIC_LENGTH, max_batch_size=rows)

    def generate(self, prompts: Rows, new_tokens: int) -> Iterator[object]:
        """Prompt eagerly, then greedy steps."""
        if self._compiled and len(prompts[0]) + new_tokens > _STATIC_LENGTH:
            raise NotOffered(f"its static cache has {_STATIC_LENGTH} places")
        torch = self._torch
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            cache = self._cache(len(prompts), ids.shape[1] + new_tokens)
            run, place = self._model, torch.arange(ids.shape[1])
            for _ in range(new_tokens):
                more = {"cache_position": place, "position_ids": place[None]} if self._compiled else {}
                out = run(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
                ids = out.logits[:, -1].argmax(-1, keepdim=True)
                yield int(ids[0, 0])
                run, place = self._step, place[-1:] + 1

    def begin(self, prefix: Sequence[int], hot: bool) -> None:
        """Keep the prefix's cache."""
        from transformers import DynamicCache

        with self._torch.inference_mode():
            self._prefix = DynamicCache(config=self._model.config)
            ids = self._torch.tensor([prefix])
            self._model(input_ids=ids, past_key_values=self._prefix, use_cache=True, logits_to_keep=1)

    def score(self, items: Rows) -> object:
        """All items as one batch behind copies of the prefix's cache."""
        with self._torch.inference_mode():
            cache = copy.deepcopy(self._prefix)
            cache.batch_repeat_interleave(len(items))
            ids = self._torch.tensor(items)
            return self._model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1, :2].tolist()

    def encode(self, rows: Rows) -> object:
        """Mean of the last hidden states."""
        with self._torch.inference_mode():
            ids = self._torch.tensor(rows)
            return self._step(input_ids=ids, attention_mask=self._torch.ones_like(ids)).last_hidden_state.mean(1)
