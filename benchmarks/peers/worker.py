"""The process in which one engine runs one model while it is measured: JSON lines in, JSON lines out.

Runs in the engine's own environment, so it imports the standard library alone; the engine is the module that it is told
to load. Times are taken here, around the engine's own calls. The parent's end is slmdeploy.profiling.process.
Run as `python -m benchmarks.peers.worker MODULE FOLDER --threads N --options JSON`, or with `--prepare CHECKPOINT` to
make FOLDER of a checkpoint with the engine's own converter.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Engine, NotOffered

Clock = Callable[[], float]


def answer(engine: Engine, request: dict[str, Any], clock: Clock = time.perf_counter) -> dict[str, Any]:
    """The reply to one request; ``op`` says which. An engine without it answers {"missing": why}.

    generate {prompts, new_tokens} → stamps_ms of every step since the call
    score    {prefix_ids, items, hot} → ms of the items, and with ``hot`` false of the prefix too
    encode   {rows} → ms
    rss      {} → peak_bytes of this process (VmHWM), or what the engine says of its own processes
    """
    try:
        return _answer(engine, request, clock)
    except NotOffered as reason:
        return {"missing": str(reason)}


def _answer(engine: Engine, request: dict[str, Any], clock: Clock) -> dict[str, Any]:
    match request["op"]:
        case "generate":
            stamps = []
            started = clock()
            for step in engine.generate(request["prompts"], request["new_tokens"]):
                # An engine that times itself in a process of its own yields seconds since the start.
                stamps.append((step if isinstance(step, float) else clock() - started) * 1e3)
            if len(stamps) != request["new_tokens"]:
                raise RuntimeError(f"asked for {request['new_tokens']} steps, the engine made {len(stamps)}")
            return {"stamps_ms": stamps}
        case "score":
            started = clock()
            engine.begin(request["prefix_ids"], request["hot"])
            started = clock() if request["hot"] else started
            engine.score(request["items"])
            return {"ms": (clock() - started) * 1e3}
        case "encode":
            started = clock()
            engine.encode(request["rows"])
            return {"ms": (clock() - started) * 1e3}
        case "rss":
            own = getattr(engine, "peak_rss_bytes", peak_rss_bytes)
            return {"peak_bytes": own()}
    raise ValueError(f"unknown op {request['op']!r}")


def peak_rss_bytes() -> int:
    """Peak resident memory of this program alone, which Linux calls VmHWM."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def serve(module: Any, folder: Path, threads: int, options: dict[str, Any]) -> None:
    """Open the engine, say hello with its load time, then answer each line of stdin until it ends or says exit."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # from here on stdout belongs to the protocol: what libraries print goes to stderr
    started = time.perf_counter()
    engine = module.open_engine(folder, threads, **options)
    seconds = time.perf_counter() - started if getattr(engine, "stays_open", True) else None
    _say(replies, {"ready": True, "load_s": seconds, "versions": module.versions(**options)})
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "exit":
            break
        _say(replies, answer(engine, request))
    # Some engines crash while they are taken apart at exit; everything has been said.
    replies.close()
    os._exit(0)


def _say(stream: Any, reply: dict[str, Any]) -> None:
    stream.write(json.dumps(reply) + "\n")
    stream.flush()


def main() -> None:
    """Prepare a folder for an engine, or serve it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--prepare", type=Path, metavar="CHECKPOINT")
    given = parser.parse_args()
    module = importlib.import_module(f"benchmarks.peers.engines.{given.module}")
    if given.prepare:
        module.prepare(given.prepare, given.folder, **given.options)
    else:
        serve(module, given.folder, given.threads, given.options)


if __name__ == "__main__":
    main()
