"""A checkpoint run by torch in eager mode, float32: the baseline of every comparison and the reference of parity.

It is meant to be as fast as plain torch honestly is: the KV cache is used, only the logits that are needed are
computed, and candidates are scored as one batch behind a prefix that is computed once. Serves the profiler as `python
-m slmdeploy.exporting.eager CKPT --threads N` through the same loop as a build (profiling/worker.py), so the two sides
differ in nothing but the engine. No torch.compile, no quantisation: those would be other baselines.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from slmdeploy.checkpoint import LABELS, Weights, label_token_ids, read_config, resolve_checkpoint
from slmdeploy.errors import InputError, SlmdeployError, UnsupportedModelError
from slmdeploy.exporting.reading import read_spec
from slmdeploy.exporting.spec import DecoderSpec, check_tensors, located
from slmdeploy.exporting.uneven import load_uneven
from slmdeploy.exporting.widening import load_causal_lm
from slmdeploy.profiling.worker import error_reply, serve

if TYPE_CHECKING:
    from slmdeploy.exporting.causal import CausalModel

Floats = NDArray[np.float32]


class TorchDecoder:
    """A decoder run by torch: one sequence with its cache, and what needs none."""

    def __init__(self, model: PreTrainedModel, max_length: int, eos_token_ids: Sequence[int]) -> None:
        self.model, self.max_length, self.eos_token_ids = model, max_length, eos_token_ids
        self._cache = DynamicCache(config=model.config)
        self._prefix: tuple[list[int], DynamicCache] = ([], self._cache)
        """The prefix that was last scored behind, and its cache: the next request with it does not pay for it again."""

    @torch.inference_mode()
    def logits(self, input_ids: Sequence[int]) -> Floats:
        """Logits [length, vocabulary] of every position."""
        self._check_length(len(input_ids))
        output = self.model(torch.tensor([list(input_ids)]), use_cache=False)
        return _numpy(output.logits[0])

    def prefill(self, input_ids: Sequence[int]) -> Floats:
        """Start anew with these tokens; the last position's logits [vocabulary]."""
        self._check_length(len(input_ids))
        self._cache = DynamicCache(config=self.model.config)
        return self._extend(input_ids)

    def decode(self, token: int) -> Floats:
        """Append one token; the logits [vocabulary] behind it."""
        self._check_length(self._cache.get_seq_length() + 1)
        return self._extend([token])

    def batch_logits(self, rows: Sequence[Sequence[int]]) -> list[Floats]:
        """Last position's logits of each sequence, in one right-padded batch."""
        lengths = [len(row) for row in rows]
        ids = _padded(rows)
        mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
        with torch.inference_mode():
            logits = self.model(ids, attention_mask=mask, use_cache=False).logits
        return [_numpy(logits[index, length - 1]) for index, length in enumerate(lengths)]

    def generate_ids(self, prompt_ids: Sequence[int], *, max_new_tokens: int, ignore_eos: bool) -> Iterator[int]:
        """Greedy decoding with the KV cache; yields each token as soon as it is known, the end token not.

        Ends early where the context is full.
        """
        self._check_length(len(prompt_ids) + 1)
        row = self.prefill(prompt_ids)
        for left in range(min(max_new_tokens, self.max_length - len(prompt_ids)) - 1, -1, -1):
            token = int(row.argmax())
            if token in self.eos_token_ids and not ignore_eos:
                return
            yield token
            if left:
                row = self.decode(token)

    def _behind(self, module: Any, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> Any:
        """What the model, or its part without the head, gives for items as one right-padded batch behind a prefix."""
        self._check_length(len(prefix_ids) + max(map(len, item_ids)))
        if self._prefix[0] != list(prefix_ids):
            self.prefill(prefix_ids)
            self._prefix = (list(prefix_ids), self._cache)
            self._cache = DynamicCache(config=self.model.config)  # a later `decode` must not write into the prefix
        cache = copy.deepcopy(self._prefix[1])
        cache.batch_repeat_interleave(len(item_ids))
        # padding stands behind every token that is read, so the causal mask alone keeps it out
        return module(_padded(item_ids), past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def _extend(self, ids: Sequence[int]) -> Floats:
        tokens = torch.tensor([list(ids)])
        output = self.model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return _numpy(output.logits[0, -1])

    def _check_length(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise InputError(f"{tokens} tokens are needed, but the context of this model holds {self.max_length}")


class EagerModel(TorchDecoder):
    """A torch model as a session of the profiler and as the reference of the parity ladder."""

    def __init__(self, checkpoint: Path, labels: tuple[str, str] = LABELS, *, max_length: int | None = None) -> None:
        self.checkpoint, self.labels = checkpoint, labels
        weights = Weights(checkpoint)
        self.spec = located(read_spec(checkpoint, max_length), weights)
        check_tensors(self.spec, weights)  # transformers would fill a missing tensor with random numbers
        super().__init__(_load(checkpoint, self.spec), self.spec.max_length, self.spec.eos_token_ids)

    @cached_property
    def label_ids(self) -> list[int]:
        """The tokens whose logits `score_ids` gives; found on first use, as generating needs no labels."""
        return list(label_token_ids(self.checkpoint, self.labels))

    @torch.inference_mode()
    def score_ids(self, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> Floats:
        """Label logits [items, labels]: the prefix once, its cache repeated, all items as one right-padded batch.

        Only the hidden state at each item's last token meets the head, and only the labels' rows of it.
        """
        hidden = self._behind(self.model.base_model, prefix_ids, item_ids).last_hidden_state
        last = hidden[torch.arange(len(item_ids)), [len(item) - 1 for item in item_ids]]
        logits = last @ self.model.get_output_embeddings().weight[self.label_ids].T * self.spec.logits_multiplier
        cap = self.spec.logits_softcap
        return _numpy(logits if cap is None else cap * torch.tanh(logits / cap))


def _load(checkpoint: Path, spec: DecoderSpec) -> PreTrainedModel:
    # torch's fused attention knows no soft cap, and transformers would leave it out without a word
    attention = "sdpa" if spec.attention_softcap is None else "eager"
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        if read_config(checkpoint).get("layer_shapes") is not None:
            return load_uneven(checkpoint, spec, attention)
        model = load_causal_lm(checkpoint, attn_implementation=attention)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model.eval()
    return model


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _numpy(tensor: torch.Tensor) -> Floats:
    array: Floats = tensor.numpy()
    return array


def _baseline(checkpoint: Path, labels: tuple[str, str]) -> "EagerModel | CausalModel":
    """Torch runs a checkpoint whether or not it can be built from its weights; scores then take the whole head."""
    from slmdeploy.exporting.causal import CausalModel

    try:
        return EagerModel(checkpoint, labels)
    except UnsupportedModelError:
        return CausalModel(checkpoint, labels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Load a checkpoint and serve it to the profiler on stdin and stdout."""
    parser = argparse.ArgumentParser(prog="slmdeploy.exporting.eager", description="serve a checkpoint run by torch")
    parser.add_argument("checkpoint", help="a checkpoint folder or a Hugging Face id")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--label", action="append", default=[], help="the label words, given twice: for 0, for 1")
    options = parser.parse_args(arguments)
    if len(options.label) not in (0, 2):
        parser.error("--label is given twice or not at all")
    if options.threads:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()
    try:
        labels = (options.label[0], options.label[1]) if options.label else LABELS
        model = _baseline(resolve_checkpoint(options.checkpoint), labels)
    except SlmdeployError as error:
        print(json.dumps(error_reply(error)), flush=True)
        return
    # the general way is slower, so a measurement says that its baseline went it
    how = "" if isinstance(model, EagerModel) else ", eager attention, whole head"
    serve(model, {"load_s": time.perf_counter() - started, "engine": f"torch {torch.__version__} eager fp32{how}"})


if __name__ == "__main__":
    main()
