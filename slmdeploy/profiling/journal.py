"""What was measured so far, on disk while a measurement runs: an interrupted one goes on instead of beginning again.

A file of JSON lines beside the output, written turn by turn. Its first line is the key of what is being measured; a
journal of anything else is thrown away. A last line that a killed run cut short is left out. Knows nothing of what a
turn holds beyond its JSON form.
"""

import json
from pathlib import Path
from typing import Any, Self, TextIO

from slmdeploy.profiling.summary import Turn

Place = tuple[str, str, int]
"""Workload, candidate, round."""


class Journal:
    """The turns of one measurement. Use as a context; the file stays, for whoever wrote the output to remove."""

    def __init__(self, file: Path | None, key: str) -> None:
        """``file`` None keeps nothing on disk."""
        self._file, self._key = file, key
        self._turns: dict[Place, Turn] = {}
        self._notes: dict[str, dict[str, Any]] = {}
        self._stream: TextIO | None = None

    def __enter__(self) -> Self:
        if self._file is None:
            return self
        kept = self._read(self._file)
        self._notes = {line["about"]: line["note"] for line in kept if "about" in line}
        turns = [line for line in kept if "turn" in line]
        self._turns = {(line["workload"], line["candidate"], line["round"]): Turn(**line["turn"]) for line in turns}
        # Written anew, so that no half line of a killed run stands in the middle.
        self._stream = self._file.open("w", encoding="utf-8")
        for line in ({"key": self._key}, *kept):
            self._write(line)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def get(self, place: Place) -> Turn | None:
        """The turn that was kept of an earlier run, if any."""
        return self._turns.get(place)

    def put(self, place: Place, turn: Turn) -> None:
        """Keep a turn, at once on disk."""
        self._turns[place] = turn
        workload, candidate, round_ = place
        self._write({"workload": workload, "candidate": candidate, "round": round_, "turn": turn.to_dict()})

    def forget(self, place: Place) -> None:
        """Drop a turn that will be run again; the line that replaces it on disk comes later and counts."""
        self._turns.pop(place, None)

    def note(self, about: str) -> dict[str, Any] | None:
        """What was noted about something beside turns."""
        return self._notes.get(about)

    def put_note(self, about: str, note: dict[str, Any]) -> None:
        """Keep a note, at once on disk."""
        self._notes[about] = note
        self._write({"about": about, "note": note})

    def _write(self, line: dict[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()

    def _read(self, file: Path) -> list[dict[str, Any]]:
        if not file.is_file():
            return []
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = []
        for line in text[: text.rfind("\n") + 1].splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # damaged on disk: what was measured before it still counts
                break
        if not lines or lines[0] != {"key": self._key}:
            return []
        return lines[1:]
