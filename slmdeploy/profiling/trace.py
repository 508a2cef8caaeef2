"""Traces: requests as they came to a service, one JSON object a line, to be sent again at the same moments.

A line has `arrival_s`, seconds since the trace began and never less than the line before, and the lengths of its
request: `prompt_tokens` and `new_tokens`, or `prefix_tokens`, `items` and `item_tokens`, or `texts` and `text_tokens`.
No text: the lengths decide how long a request takes, and nobody's words have to leave a service. Knows no model.
"""

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from pydantic import ValidationError

from slmdeploy.errors import InputError, SpecError
from slmdeploy.specs import Spec
from slmdeploy.specs.base import Positive, Real

_KEYS = {"generate": ("prompt_tokens", "new_tokens"), "score": ("prefix_tokens", "items", "item_tokens")}
_MOST_LINES = 1_000_000


class Entry(Spec):
    """One line: when a request arrives, in seconds, and how long it is; lengths that its task has not are unused."""

    arrival_s: Real
    prompt_tokens: Positive = 1
    new_tokens: Positive = 1
    prefix_tokens: Positive = 1
    items: Positive = 1
    item_tokens: Positive = 1
    texts: Positive = 1
    text_tokens: Positive = 1


@lru_cache(maxsize=8)
def read_trace(file: str, task: str) -> list[Entry]:
    """The entries of a trace. Raises InputError or SpecError naming file and line where one is not of the form."""
    needed = _KEYS.get(task, ("text_tokens",))
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as a trace: {error}") from error
    if not 0 < len(lines) <= _MOST_LINES:
        raise InputError(f"{file} has {len(lines)} lines, and a trace has 1 to {_MOST_LINES}")
    entries = [_entry(file, number, line, needed) for number, line in enumerate(lines, 1)]
    for number, (earlier, later) in enumerate(pairwise(entries), 2):
        if later.arrival_s < earlier.arrival_s:
            raise SpecError(f"{file}:{number}: arrival_s = {later.arrival_s:g} is before the line above: sort them")
    if entries[0].arrival_s < 0:
        raise SpecError(f"{file}:1: arrival_s = {entries[0].arrival_s:g} is negative: count from the beginning")
    return entries


def _entry(file: str, number: int, line: str, needed: tuple[str, ...]) -> Entry:
    try:
        content = json.loads(line)
        entry = Entry.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(f"{file}:{number}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error
    except ValueError as error:
        raise SpecError(f"{file}:{number}: not a line of JSON: {error}") from error
    lacking = [key for key in needed if key not in content]
    if lacking:
        raise SpecError(f"{file}:{number}: {lacking[0]!r} is missing, and every line of this trace needs it")
    return entry
