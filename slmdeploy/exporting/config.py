"""Reads config.json field by field: each method says what a field may hold, and an error names file, field and value.

Knows no model family: families.py says which fields there are and what they mean.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slmdeploy.errors import UnsupportedModelError


class Fields:
    """The values of a config.json. A field that is absent has the default that its reader is given."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file, self.values = file, values

    def value(self, name: str, default: Any = ...) -> Any:
        """The field, or the default where it is absent or null; UnsupportedModelError where that is `...`."""
        value = self.values.get(name)
        if value is None:
            value = default
        if value is ...:
            raise UnsupportedModelError(f"{self.file} does not say {name}")
        return value

    def size(self, name: str, default: Any = ...) -> int:
        """A whole number above 0."""
        value = self.value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refusal(name, "it must be a whole number above 0")
        return value

    def number(self, name: str, default: Any = ...) -> float:
        """A number above 0."""
        return self.positive(name, self.value(name, default))

    def positive(self, name: str, value: Any) -> float:
        """`value`, which stands at `name`, if it is a number above 0."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.refusal(name, "it must be a number above 0", value)
        return float(value)

    def flag(self, name: str, default: Any = ...) -> bool:
        """True or false."""
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, "it must be true or false")
        return value

    def items(self, name: str, count: int, sound: Callable[[Any], bool], what: str) -> list[Any] | None:
        """A list of `count` values that are each `sound`; None where the field is absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(map(sound, value)):
            raise self.refusal(name, f"it must be a list of {count} values, each {what}")
        return value

    def token_ids(self, name: str, default: Any = None) -> tuple[int, ...]:
        """A token id or a list of them; none where the field is null."""
        value = self.values.get(name, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.refusal(name, "it must be a token id or a list of them")
        return tuple(ids)

    def refusal(self, name: str, reason: str, *value: Any) -> UnsupportedModelError:
        """The error for a field; `value` where what is refused is not the field itself."""
        shown = value[0] if value else self.values.get(name)
        return UnsupportedModelError(f"{self.file}: {name} = {shown!r} is not supported: {reason}")
