"""Logs: one JSON object a line on stderr, without prompts and answers unless that was asked for.

Everything that the process logs goes through here, uvicorn's lines and warnings of libraries too. Knows no endpoint.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

DETAILS = "details"
"""The attribute of a record whose dictionary becomes keys of its line."""


class JsonFormatter(logging.Formatter):
    """A record as one line; an exception's traceback is in it as text."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, DETAILS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def configure(stream: TextIO = sys.stderr) -> None:
    """Send every log of the process to `stream` as JSON; libraries below warnings are silent."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("slmdeploy").setLevel(logging.INFO)
    logging.captureWarnings(True)
