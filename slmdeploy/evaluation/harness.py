"""A build as a model of EleutherAI's evaluation harness: its three kinds of request, answered by the runtime.

Tokens, cuts and windows are those of the harness' own `hf` model, so that figures can be put beside published ones:
texts get the tokenizer's special tokens, unless they begin with the prefix token already; a text without a context
stands behind the prefix token; contexts that are too long lose their beginning. Requests behind one context share its
computation, and greedy generations run in batches where the graph can. Knows nothing of tasks and metrics, and imports
no torch; of the harness only its seeding and its `hf` model do.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from slmdeploy.errors import InputError
from slmdeploy.evaluation.continuations import Likelihood, fitting, likelihoods
from slmdeploy.progress import SILENT, Progress
from slmdeploy.runtime.generation import TextOptions
from slmdeploy.runtime.model import BATCH_SLOTS, Model

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")
"""Options of generation that mean the same in the harness, in transformers and here."""
_TOGETHER = 4 * BATCH_SLOTS
"""Prompts given to the runtime at once: enough to keep its batch full, few enough for progress to be seen."""


class BuildModel(TemplateLM):  # type: ignore[misc]  # the harness ships no type information
    """A decoder for `lm_eval.evaluate`. `cut` counts the requests whose context lost its beginning."""

    def __init__(self, model: Model, progress: Progress = SILENT) -> None:
        super().__init__()
        self.model = model
        self.cut = 0
        self._progress = progress
        ends = model.runtime.eos_token_ids
        self._prefix = model.runtime.bos_token_id if model.runtime.bos_token_id is not None else next(iter(ends), None)
        self._prefix_text = None if self._prefix is None else model.tokenizer.id_to_token(self._prefix)

    @property
    def max_length(self) -> int:
        """The context in tokens."""
        return self.model.runtime.max_length

    @property
    def eot_token_id(self) -> int:
        """The harness' name for what stands before a text without a context where there is no other token for it."""
        return self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a sequence, else the one that ends it; InputError where runtime.json names neither."""
        if self._prefix is None:
            raise InputError(
                f"{self.model.path} names no token that begins or ends a text in runtime.json, and this task asks how "
                "likely a text without a context is: leave the task out"
            )
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; the tokenizer's special tokens around it unless it begins with the prefix token itself."""
        if add_special_tokens is None:
            add_special_tokens = not (self._prefix_text and string.startswith(self._prefix_text))
        ids: list[int] = self.model.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids
        return ids

    def loglikelihood(self, requests: Sequence["Instance"], disable_tqdm: bool = True) -> list[Likelihood]:
        """Of each (context, continuation) how likely the continuation is; the harness' own bar is off."""
        answers: list[Likelihood] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[Likelihood]:
        behind: dict[tuple[int, ...], list[int]] = {}
        for number, (_texts, context, continuation) in enumerate(requests):
            behind.setdefault(self._fitting(context, continuation), []).append(number)
        answers: dict[int, Likelihood] = {}
        self._progress.start("likelihoods", len(requests), "requests")
        for shared, numbers in behind.items():
            found = likelihoods(self.model, shared, [requests[number][2] for number in numbers])
            answers.update(zip(numbers, found, strict=True))
            self._progress.advance(len(numbers))
        self._progress.finish()
        return [answers[number] for number in range(len(requests))]

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        kept = fitting(context, continuation, self.max_length)
        self.cut += len(kept) < len(context)
        return tuple(kept)

    def loglikelihood_rolling(self, requests: Sequence["Instance"], disable_tqdm: bool = True) -> list[float]:
        """Of each text the logarithm of its probability, in windows of the whole context with one token between."""
        answers = []
        self._progress.start("texts", len(requests), "texts")
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs = (make_disjoint_window(window) for window in windows)
            answers.append(sum(likelihoods(self.model, before, [new])[0].log_probability for before, new in pairs))
            self._progress.advance()
        self._progress.finish()
        return answers

    def generate_until(self, requests: Sequence["Instance"], disable_tqdm: bool = True) -> list[str]:
        """What stands behind each context until a stop string, an end token or the most tokens that the task wants."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers: dict[int, str] = {}
        self._progress.start("generations", len(requests), "requests")
        for numbers in alike.values():
            options = text_options(requests[numbers[0]].args[1])
            prompts = {number: self._prompt(requests[number].args[0], options["max_new_tokens"]) for number in numbers}
            for number, text in self._generated(prompts, options):
                answers[number] = text
                self._progress.advance()
        self._progress.finish()
        return [answers[number] for number in range(len(requests))]

    def _prompt(self, context: str, new_tokens: int) -> list[int]:
        room = self.max_length - new_tokens
        if room < 1:
            raise InputError(
                f"the task wants {new_tokens} new tokens (max_gen_toks), but the context of this model holds "
                f"{self.max_length}: leave the task out, or export the checkpoint with a larger --max-length"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(ids) > room
        return ids[-room:]

    def _generated(self, prompts: Mapping[int, list[int]], options: TextOptions) -> Iterable[tuple[int, str]]:
        """Each prompt's number and text. Samples are drawn one by one, seeded by number: a repeat is another draw."""
        if options["temperature"] > 0 or self.model.runtime.interface != "shared":
            for number, prompt in prompts.items():
                own: TextOptions = {**options, "seed": number}
                yield number, self.model.generate(prompt, **own).text
            return
        numbers = list(prompts)
        for start in range(0, len(numbers), _TOGETHER):
            some = numbers[start : start + _TOGETHER]
            found = self.model.generate_batch([prompts[number] for number in some], **options)
            yield from zip(some, (completion.text for completion in found), strict=True)


def text_options(gen_kwargs: Mapping[str, Any]) -> TextOptions:
    """A task's generation settings as those of the runtime; InputError for one that has no meaning here."""
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    wanted = dict(normalize_gen_kwargs(given))
    if wanted.pop("num_beams", 1) != 1:
        raise InputError("the task asks for beam search (num_beams), which builds do not do: leave the task out")
    sampled, temperature = wanted.pop("do_sample"), wanted.pop("temperature", 1.0)
    options: dict[str, Any] = {
        "max_new_tokens": wanted.pop("max_gen_toks"),
        "stop": [text for text in wanted.pop("until") if text],
        "temperature": float(temperature) if sampled else 0.0,
    }
    odd = sorted(wanted.keys() - set(_FILTERS))
    if odd:
        raise InputError(
            f"the task sets {', '.join(odd)} for generation, which builds do not know: they take until, max_gen_toks, "
            f"do_sample, temperature, {', '.join(_FILTERS)}"
        )
    return cast(TextOptions, options | wanted)
