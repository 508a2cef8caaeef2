"""Serves an engine of the comparison to slmdeploy's own profiler, in that engine's environment.

    ENV/bin/python -m benchmarks.peers.session MODULE FOLDER --threads 2 --options JSON

So the profiler's load generator, clock and statistics can be held against the engine's own benchmark tool on the same
files (benchmarks/validation.py). What the profiler asks is slmdeploy/profiling/worker.py's protocol.
"""

import argparse
import importlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slmdeploy.profiling.worker import serve


class EngineSession:
    """An engine as a session of the profiler; token ids are not looked at, only the moments at which they are there."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def generate_ids(self, prompt_ids: Sequence[int], *, max_new_tokens: int, ignore_eos: bool) -> Iterator[int]:
        """A token each time the engine has made one."""
        for number, _ in enumerate(self._engine.generate([list(prompt_ids)], max_new_tokens)):
            yield number

    def score_ids(self, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> Any:
        """Not validated."""
        raise NotImplementedError

    def logits(self, input_ids: Sequence[int]) -> Any:
        """Not validated."""
        raise NotImplementedError


def main() -> None:
    """Open the engine and serve it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    started = time.perf_counter()
    module = importlib.import_module(f"benchmarks.peers.engines.{given.module}")
    session = EngineSession(module.open_engine(given.folder, given.threads, **given.options))
    serve(session, {"load_s": time.perf_counter() - started, "engine": given.module})


if __name__ == "__main__":
    main()
