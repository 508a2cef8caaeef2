"""Builds that are measured with a draft too, each as a row of its own beside the plain one, and the text for it.

How much a draft brings depends on what is written: random tokens repeat nothing and surprise a small model and a large
one alike. So where something drafts, prompts of generation are cut from the test split's text, for every row alike; the
time of a row that does not draft depends on lengths only. Knows nothing of how rows are measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from slmdeploy.errors import InputError
from slmdeploy.profiling.candidates import Candidate, size_bytes
from slmdeploy.profiling.quality import read_records
from slmdeploy.specs import Workload

PROMPT_LOOKUP = "prompt-lookup"
_MOST_TOKENS = 200_000


@dataclass(frozen=True)
class Drafts:
    """What is to draft: a smaller build, the text itself, or both, each in a row of its own."""

    draft: Path | None = None
    prompt_lookup: bool = False

    def __bool__(self) -> bool:
        """Whether anything drafts."""
        return self.draft is not None or self.prompt_lookup


def check_drafts(drafts: Drafts, data: Path | None, workloads: Sequence[Workload]) -> None:
    """InputError for what cannot be measured with a draft."""
    if drafts and data is None:
        raise InputError("what a draft brings depends on the text: give --data, whose test split prompts are cut from")
    if drafts and not any(one.task == "generate" and one.batch == 1 for one in workloads):
        raise InputError("a draft is for one sequence at a time: give a workload of task generate without a batch")


def with_drafts(candidates: Sequence[Candidate], drafts: Drafts) -> list[Candidate]:
    """The candidates, behind each one that can take tokens back the same build with each draft."""
    found: list[Candidate] = []
    for candidate in candidates:
        found.append(candidate)
        if candidate.cuts_prompts and "generate" in candidate.tasks:  # its interface is the shared one
            found += [_drafted(candidate, *way) for way in _ways(drafts)]
    return found


def _ways(drafts: Drafts) -> list[tuple[str, tuple[str, ...], int]]:
    """Name, arguments of worker.py and further bytes of each way to draft."""
    ways: list[tuple[str, tuple[str, ...], int]] = []
    if drafts.draft is not None:
        ways.append((drafts.draft.resolve().name, ("--draft", str(drafts.draft)), size_bytes(drafts.draft)))
    return [*ways, (PROMPT_LOOKUP, ("--prompt-lookup",), 0)] if drafts.prompt_lookup else ways


def _drafted(candidate: Candidate, name: str, arguments: tuple[str, ...], more_bytes: int) -> Candidate:
    # The precision names the draft, so that the row is not taken for the fp32 build that others are compared with.
    facts = candidate.facts | {"precision": f"{candidate.facts['precision']}, {name}"}
    size = candidate.metrics["size_bytes"] + more_bytes
    return replace(
        candidate,
        name=f"{candidate.name}+{name}",
        facts=facts,
        drafting=arguments,
        takes_batches=False,
        metrics={"size_bytes": size},
        drawn={},
        outcomes={},
        workloads={},
        counts={},
        hello={},
    )


def text_of(data: Path, tokenizer: Path) -> list[int]:
    """The test split's records one behind the other, as ids of tokens."""
    model = Tokenizer.from_file(str(tokenizer))
    ids: list[int] = []
    for record in read_records(data / "generate.test.jsonl", {"prompt": str, "completion": str}):
        ids += model.encode(record["prompt"] + record["completion"], add_special_tokens=False).ids
        if len(ids) >= _MOST_TOKENS:
            break
    if not ids:
        raise InputError(f"{data}/generate.test.jsonl has no text to cut prompts from")
    return ids
