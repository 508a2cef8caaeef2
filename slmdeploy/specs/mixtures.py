"""Mixture: several data sources with weights, so that one student learns several tasks.

A TOML file with a ``[[part]]`` for each source; a part is whatever `--data` takes but another mixture. Weights count
among parts of one kind, text or scoring: rows are shared out by them. Knows nothing of records.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from slmdeploy.errors import SpecError
from slmdeploy.specs.base import AboveZero, Spec, load_toml


class Part(Spec):
    """One source, and how many rows it gives for each of the others' of its kind."""

    data: str
    weight: AboveZero = 1.0

    @property
    def place(self) -> Path | str:
        """The path, or the id of a dataset where nothing lies there."""
        return Path(self.data) if Path(self.data).exists() else self.data


class Mixture(Spec):
    """Parts by their order in the file."""

    part: Annotated[tuple[Part, ...], Field(min_length=1, strict=False)]


def is_mixture(data: Path | str) -> bool:
    """Whether ``data`` names a mixture's file."""
    return str(data).endswith(".toml")


def load_mixture(file: Path) -> Mixture:
    """The mixture at ``file``, with the parts that lie beside it found there. Raises SpecError for what is wrong."""
    found = load_toml(file, Mixture)
    for part in found.part:
        if is_mixture(part.data):
            raise SpecError(f"{file}: part {part.data!r} is a mixture itself: name its parts here")
    beside = [(file.parent / part.data, part) for part in found.part]
    parts = [part.model_copy(update={"data": str(path)}) if path.exists() else part for path, part in beside]
    return Mixture(part=tuple(parts))


def data_inputs(data: Path | str) -> tuple[dict[str, Path], dict[str, Any]]:
    """What an artifact that learns from ``data`` is made of: its inputs by name, and what its plan says of the rest."""
    if is_mixture(data):
        parts = load_mixture(Path(data)).part
        places = {f"data {number}": part.place for number, part in enumerate(parts, start=1)}
        inputs = {name: place for name, place in places.items() if isinstance(place, Path)}
        named = {name: place for name, place in places.items() if not isinstance(place, Path)}
        return inputs, {**named, "weights": [part.weight for part in parts]}
    if Path(data).exists():
        return {"data": Path(data)}, {}
    return {}, {"data": str(data)}
