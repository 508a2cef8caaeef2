"""Opens what training learns from: one source, or a mixture of several with weights, and takes prompts from it.

A mixture gives, for each kind of record, the sources of that kind with their weights; data.py shares rows out among
them. Knows nothing of how records become rows.
"""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from slmdeploy.compress.data import Kind, Part, Source, Texts, open_sources, prompts
from slmdeploy.errors import InputError
from slmdeploy.specs import is_mixture, load_mixture

LOOKED_AT = 1000
"""Scoring records of a source that are looked at for labels of both kinds."""
Sources = Mapping[Kind, Source | tuple[Part, ...]]


def open_data(data: Path | str, split: str) -> Sources:
    """The records of a split by kind. Raises InputError as `open_sources` does, and for a file that is no mixture."""
    if not is_mixture(data):
        return open_sources(data, split)
    found: dict[Kind, tuple[Part, ...]] = {}
    for part in load_mixture(Path(data)).part:
        for kind, source in open_sources(part.place, split).items():
            found[kind] = (*found.get(kind, ()), Part(part.weight, source))
    if not found and split == "train":
        raise InputError(f"{data} mixes nothing: its parts hold no records to train on")
    return found


def require_both_labels(source: Source | tuple[Part, ...], name: str) -> None:
    """Raise InputError where the first scoring records all have items of one label: nothing tells them apart."""
    seen: set[int] = set()
    for one in (source,) if isinstance(source, Source) else (part.source for part in source):
        for record in islice(one.shuffled(0), LOOKED_AT):
            if isinstance(record["labels"], list):  # what is not is told of with its line, by whoever reads it
                seen.update(label for label in record["labels"] if label in (0, 1))
    if len(seen) == 1:
        raise InputError(f"{name} has scoring records of the label {seen.pop()} alone: it needs items of both")


def prompts_of(
    source: Source | tuple[Part, ...], texts: Texts, *, length: int, count: int, seed: int
) -> list[list[int]]:
    """`data.prompts` of each part by its weight, or of the one source."""
    if isinstance(source, Source):
        return prompts(source, texts, length=length, count=count, seed=seed)
    whole = sum(part.weight for part in source)
    taken = [
        prompts(part.source, texts, length=length, count=max(1, round(count * part.weight / whole)), seed=seed)
        for part in source
    ]
    return [prompt for one in taken for prompt in one]
