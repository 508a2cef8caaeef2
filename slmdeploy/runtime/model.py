"""Opens a graph, build or package and runs its tasks: the one object that callers of the runtime hold.

Puts together text, decoding, sampling and scoring, and knows how each is done nowhere. The two sessions open on first
use, so a scorer never loads the language model's head and a generator never loads the label rows. One Model serves one
sequence at a time and is not safe to share between threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from . import (
    decoding,
    openvino_decoding,
    openvino_pages,
    openvino_scoring,
    openvino_session,
    provider_options,
    scoring,
    standard,
    static,
)
from .batch_generation import Batch, BatchOfOne, ForcedSequence, TextSequence, TokenSequence, batch_steps, run_batch
from .batching import BatchDecoder
from .bundle import RUNTIME, RuntimeConfig, read_runnable, read_runtime, require_listed, thread_count
from .chat import ChatTemplates, Message
from .drafting import ModelDraft, PromptLookup
from .errors import InputError
from .generation import Completion, Settings, TextOptions, TextRun, TokenLoop, TokenOptions, token_stream
from .providers import PROVIDERS
from .speculative import DraftCounts, Drafter, Speculation
from .tensorrt_decoding import TensorRTDecoder
from .tensorrt_plan import PLAN, RECIPE
from .tensorrt_scoring import TensorRTScorer
from .tensorrt_session import PlanSession, runs_here
from .text import TOKENIZER, TextCodec, load_tokenizer

BATCH_SLOTS = 8
"""Sequences decoded together where the caller says nothing: beyond, most CPUs compute more than they read."""


def load(
    path: Path | str,
    *,
    threads: int | None = None,
    spinning: bool | None = None,
    prefill_chunk: int | None = None,
    draft: Path | str | None = None,
    prompt_lookup: bool = False,
    verify: bool = True,
) -> "Model":
    """Open a decoder's folder; `verify` checks every hash.

    `threads` (0: all cores), `spinning` and `prefill_chunk` (tokens, 0: prompts whole) override runtime.json. With a
    `draft`, the folder of a smaller model with the same tokenizer, or with `prompt_lookup`, tokens of one sequence are
    guessed ahead (speculative.py). Raises InputError if there is no such folder, it is an encoder's, or the draft does
    not fit, CorruptArtifactError if it is not sound.
    """
    folder = Path(path)
    manifest = read_runnable(folder, verify=verify)
    config = read_runtime(folder)
    config = config if spinning is None else replace(config, spinning=spinning)
    config = config if prefill_chunk is None else replace(config, prefill_chunk=prefill_chunk)
    require_listed(folder, manifest, [RUNTIME, TOKENIZER, *_graphs(config), *_plan(folder), *_provider(config)])
    model = Model(folder, config, load_tokenizer(folder), thread_count(threads, config.threads))
    if draft is not None and prompt_lookup:
        raise InputError("A draft and prompt lookup do not go together: give one of the two.")
    if draft is not None:
        model.draft_with(load(draft, threads=threads, spinning=spinning, verify=verify))
    elif prompt_lookup:
        model.look_up_prompts()
    return model


def _graphs(config: RuntimeConfig) -> list[str]:
    """The files with graphs that the tasks of a folder need."""
    if config.engine == "openvino":
        return [openvino_session.GRAPH, openvino_session.WEIGHTS]
    graphs = {"generate": decoding.GRAPH, "score": scoring.GRAPH}
    prefill = [decoding.PREFILL] if config.own_prefill else []
    return [*(graphs[task] for task in config.tasks), *prefill]


def _plan(folder: Path) -> list[str]:
    """The files of a compiled plan where there is one: no hash may be missing for code that would be run."""
    return [PLAN, RECIPE] if (folder / PLAN).exists() else []


def _provider(config: RuntimeConfig) -> list[str]:
    """The file that says what a compiler behind ONNX Runtime is told, where there is one."""
    return [provider_options.FILE] if PROVIDERS[config.provider].compiles else []


class Model:
    """A loaded folder. `runtime` is its runtime.json, `tokenizer` its tokenizer."""

    def __init__(self, folder: Path, runtime: RuntimeConfig, tokenizer: Tokenizer, threads: int) -> None:
        self.path = folder
        self.runtime = runtime
        self.tokenizer = tokenizer
        self._threads = threads
        self._codec = TextCodec(tokenizer)
        self._make_drafter: Callable[[], Drafter] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it can do: "generate", "score" or both."""
        return self.runtime.tasks

    @cached_property
    def _decoder(
        self,
    ) -> (
        decoding.Decoder
        | standard.StandardDecoder
        | static.StaticDecoder
        | openvino_decoding.PagedDecoder
        | TensorRTDecoder
    ):
        self._require("generate")
        if self.runtime.numerics_only and runs_here(self.path):
            plan = PlanSession(self.path)
            return TensorRTDecoder(self.runtime, plan.phase, plan.stream, plan.inputs)
        match self.runtime.interface:
            case "standard":
                return standard.StandardDecoder(self.path, self.runtime, self._threads)
            case "static":
                return static.StaticDecoder(self.path, self.runtime, self._threads)
            case "stateful":
                return openvino_decoding.PagedDecoder(self._paged)
        return decoding.Decoder(self.path, self.runtime, self._threads)

    @cached_property
    def _paged(self) -> openvino_pages.PagedRuns:
        """The one model of a build of the engine openvino, whatever its tasks, and all that its pages hold."""
        model = openvino_pages.PagedModel(self.path, self.runtime, self._threads)
        return openvino_pages.PagedRuns(model, self.runtime)

    @cached_property
    def _scorer(self) -> scoring.Scorer | openvino_scoring.PagedScorer:
        self._require("score")
        assert self.runtime.score is not None, "read_runtime lets no score task through without its labels"
        if self.runtime.engine == "openvino":
            return openvino_scoring.PagedScorer(self._paged, self.runtime.score)
        if self.runtime.numerics_only and runs_here(self.path):
            plan = PlanSession(self.path)
            return TensorRTScorer(self.path, self.runtime, self.runtime.score, plan.phase, plan.stream)
        return scoring.Scorer(self.path, self.runtime, self.runtime.score, self._threads)

    @property
    def decoder(self) -> decoding.Decoder:
        """What runs the sequence, for those who measure how it should; InputError for another interface than shared."""
        decoder = self._decoder
        if not isinstance(decoder, decoding.Decoder):
            raise InputError(f"{self.path} has the {self.runtime.interface} interface, which leaves nothing to choose.")
        return decoder

    @property
    def codec(self) -> TextCodec:
        """Text to ids and back, for those who run sequences themselves."""
        return self._codec

    @property
    def scorer(self) -> scoring.Scorer | openvino_scoring.PagedScorer:
        """What scores, for those who run it piece by piece; InputError where the folder was not made for it."""
        return self._scorer

    def open_batch(self, slots: int) -> Batch:
        """A new batch of `slots` sequences, or of one where the interface decodes one at a time."""
        decoder = self._decoder
        alone = isinstance(decoder, standard.StandardDecoder | static.StaticDecoder | TensorRTDecoder)
        if alone or self.runtime.provider != "cpu":
            return BatchOfOne(decoder)
        return self._batch_decoder(slots)

    @property
    def pages(self) -> openvino_pages.PagedRuns | None:
        """What runs all sequences of a build of the engine openvino; None for any other engine."""
        return self._paged if self.runtime.engine == "openvino" else None

    def draft_with(self, small: "Model") -> None:
        """Let a smaller model of the same vocabulary guess tokens; InputError where one of the two cannot do that."""
        for model in (self, small):
            model._require_rollback()
        sizes, words = self.runtime.vocab_size, small.runtime.vocab_size
        if sizes != words or self.tokenizer.get_vocab() != small.tokenizer.get_vocab():
            raise InputError(
                f"{small.path} has another vocabulary than {self.path} ({words} and {sizes} tokens): a draft needs the "
                "tokenizer of the model that it drafts for."
            )
        cost = small._step_bytes() / self._step_bytes()
        self._make_drafter = lambda: ModelDraft(small.decoder, cost)

    def look_up_prompts(self) -> None:
        """Guess tokens from the text so far; InputError where the folder's interface cannot do that."""
        self._require_rollback()
        self._make_drafter = PromptLookup

    def _require_rollback(self) -> None:
        self._require("generate")
        if self.runtime.interface != "shared":
            raise InputError(
                f"{self.path} has the {self.runtime.interface} interface, which cannot take tokens back: drafting "
                "needs a graph of --dialect ort, or a build of it for the engine onnxruntime."
            )

    def _step_bytes(self) -> int:
        """About the bytes that a step reads, which is what its time is proportional to; of a split, half of all."""
        size = sum(file.stat().st_size for file in self.path.glob(f"{decoding.GRAPH}*"))
        return size // 2 if self.runtime.own_prefill else size

    def open_drafter(self) -> Drafter | None:
        """A new source of guesses for one sequence; None where nothing drafts. Drafts of one model share its cache."""
        return None if self._make_drafter is None else self._make_drafter()

    @cached_property
    def _speculation(self) -> Speculation | None:
        drafter = self.open_drafter()
        return None if drafter is None else Speculation(self.decoder, drafter)

    @property
    def _loop(self) -> TokenLoop | None:
        return None if self._speculation is None else self._speculation.tokens

    @property
    def draft_counts(self) -> DraftCounts | None:
        """What drafting came to in the latest generation of one sequence; None where nothing drafts."""
        return None if self._speculation is None else self._speculation.counts

    def _require(self, task: str) -> None:
        if task not in self.tasks:
            raise InputError(
                f"{self.path} was made for {' and '.join(self.tasks)}, not for {task}: export it with --task {task}."
            )

    def generate(self, prompt: str | Sequence[int], **options: Unpack[TextOptions]) -> Completion:
        """Continue a prompt, greedily by default; the options are those of `TextOptions`.

        A prompt is text or the ids of its tokens, special ones among them. Raises InputError for a prompt that is empty
        or does not fit the context, and for settings out of range.
        """
        return self._text_run(self._prompt(prompt, "prompt"), options).completion()

    def stream(self, prompt: str, **options: Unpack[TextOptions]) -> Iterator[str]:
        """The text of `generate` in pieces, each given out as soon as no later token can change it."""
        return self._text_run(self._codec.prompt(prompt, "prompt"), options).pieces()

    def chat(self, messages: Sequence[Message], **options: Unpack[TextOptions]) -> Completion:
        """The assistant's answer to messages such as {"role": "user", "content": "Hello"}; options as in `generate`.

        Raises InputError where the folder has no chat template or the template refuses the messages.
        """
        return self._text_run(self._chat_ids(messages), options).completion()

    def chat_stream(self, messages: Sequence[Message], **options: Unpack[TextOptions]) -> Iterator[str]:
        """The text of `chat` in pieces, each given out as soon as no later token can change it."""
        return self._text_run(self._chat_ids(messages), options).pieces()

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that `chat` continues, with the special tokens in it; `ChatTemplates.render` says of what."""
        return self._chat.render(messages, tools=tools, variables=variables)

    @cached_property
    def _chat(self) -> ChatTemplates:
        return ChatTemplates(self.path)

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        return self._codec.item(self.chat_prompt(messages), "chat")  # the template has written its own special tokens

    def _text_run(self, prompt_ids: Sequence[int], options: TextOptions) -> TextRun:
        self._require("generate")
        return TextRun(self._decoder, self._codec, prompt_ids, Settings(**options), self._loop)

    def generate_ids(self, prompt_ids: Sequence[int], **options: Unpack[TokenOptions]) -> Iterator[int]:
        """The tokens behind a prompt, each as soon as it is chosen; the end token is not given out.

        The first costs the prefill, each later one a step. Ends early where the context is full.
        """
        return token_stream(self._decoder, self._ids(prompt_ids), Settings(**options), self._loop)

    def generate_batch(
        self, prompts: Sequence[str | Sequence[int]], *, slots: int = BATCH_SLOTS, **options: Unpack[TextOptions]
    ) -> list[Completion]:
        """Continue several prompts, up to `slots` of them together; each gets what `generate` alone would give it.

        That holds to the rounding of kernels, which may differ between one row and several; a build whose prompts have
        a graph of their own may run steps of many rows in it, to its precision. Raises InputError as `generate` does,
        before anything runs, and for a graph whose interface knows no batches.
        """
        if isinstance(prompts, str):
            raise InputError("prompts must be a list of strings, not one string.")
        decoder, settings = self._batch_decoder(slots), Settings(**options)
        ids = [self._prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        sequences = [TextSequence(self._codec, prompt, self.runtime, settings) for prompt in ids]
        run_batch(decoder, sequences)
        return [sequence.completion() for sequence in sequences]

    def generate_batch_ids(
        self, prompts: Sequence[Sequence[int]], *, slots: int = BATCH_SLOTS, **options: Unpack[TokenOptions]
    ) -> list[list[int]]:
        """The tokens behind each prompt, as `generate_ids` gives them for one; see `generate_batch`."""
        decoder, settings = self._batch_decoder(slots), Settings(**options)
        sequences = [TokenSequence(self._ids(prompt), self.runtime, settings) for prompt in prompts]
        run_batch(decoder, sequences)
        return [sequence.token_ids for sequence in sequences]

    def stream_batch_ids(
        self, prompts: Sequence[Sequence[int]], *, slots: int = BATCH_SLOTS, **options: Unpack[TokenOptions]
    ) -> Iterator[tuple[int, int]]:
        """The tokens of `generate_batch_ids`, each with the number of its prompt as soon as it is chosen."""
        decoder, settings = self._batch_decoder(slots), Settings(**options)
        sequences = [TokenSequence(self._ids(prompt), self.runtime, settings) for prompt in prompts]
        numbers = {id(sequence): number for number, sequence in enumerate(sequences)}
        given = [0] * len(sequences)
        for sequence in batch_steps(decoder, sequences):
            number = numbers[id(sequence)]
            token_ids = sequences[number].token_ids
            if len(token_ids) > given[number]:  # an end token is not given out
                given[number] += 1
                yield number, token_ids[-1]

    def _batch_decoder(self, slots: int) -> BatchDecoder | openvino_decoding.PagedBatch:
        decoder = self._decoder
        if isinstance(decoder, openvino_decoding.PagedDecoder):
            return openvino_decoding.PagedBatch(self._paged, slots)
        if self.runtime.provider != "cpu":
            raise InputError(f"{self.path} runs on a GPU, where only one sequence at a time is decoded.")
        if not isinstance(decoder, decoding.Decoder):
            raise InputError(
                f"{self.path} has the {self.runtime.interface} interface, which decodes one sequence at a time: "
                "batches need a graph of --dialect ort, or a build of it for the engine onnxruntime."
            )
        return BatchDecoder(decoder, slots)

    def _prompt(self, prompt: str | Sequence[int], name: str) -> list[int]:
        return self._codec.prompt(prompt, name) if isinstance(prompt, str) else self._ids(prompt).tolist()

    def _ids(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        return decoding.token_array(ids, self.runtime.vocab_size)

    def score(self, prefix: str, items: Sequence[str]) -> list[float]:
        """logit(labels[1]) - logit(labels[0]) at the end of each item behind the prefix, in the order of the items.

        Raises InputError for an empty prefix, no items, an empty item, or one that does not fit behind the prefix.
        """
        self._require("score")
        if isinstance(items, str) or not items:
            raise InputError("There are no items to score: give a list of at least one string.")
        prefix_ids = self._codec.prompt(prefix, "prefix")
        item_ids = [self._codec.item(item, f"item {i}") for i, item in enumerate(items)]
        logits = self.score_ids(prefix_ids, item_ids)
        difference: list[float] = (logits[:, 1] - logits[:, 0]).tolist()
        return difference

    def score_ids(self, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Label logits at the last token of each item behind the prefix, float32 [items, labels]."""
        items = scoring.token_arrays(item_ids, self.runtime.vocab_size)
        return self._scorer.score(self._ids(prefix_ids), items)

    def logits(self, input_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The logits at every position, float32 [length, vocab]."""
        return self._decoder.logits(self._ids(input_ids))

    def prefill(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Start a sequence anew with these ids; the logits at the last, float32 [vocab]. For checks: see `decode`."""
        return self._decoder.prefill(self._ids(ids)).copy()

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Append a token to the sequence that `prefill` started; the logits behind it, float32 [vocab]."""
        return self._decoder.step(int(self._ids([token])[0])).copy()

    def batch_logits(self, rows: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
        """The last logits of each row, float32 [vocab], out of one right-padded prefill of all rows."""
        if not rows:
            raise InputError("There are no rows: give at least one.")
        return self._decoder.batch([self._ids(row) for row in rows])

    def batch_decode(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[npt.NDArray[np.float32]]:
        """Of each prompt the logits behind it and behind each given token, float32 [1 + tokens, vocab]. For checks.

        Decoded together in one place fewer than there are prompts, so that one has to join while others run.
        """
        pairs = zip(prompts, continuations, strict=True)
        sequences = [ForcedSequence(self._ids(prompt), self._ids(tokens)) for prompt, tokens in pairs]
        run_batch(self._batch_decoder(max(1, len(sequences) - 1)), sequences)
        return [np.stack(sequence.rows) for sequence in sequences]
