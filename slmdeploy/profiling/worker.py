"""The process in which one candidate runs while it is measured: JSON lines in, JSON lines out.

`serve` is the loop; it runs anything that is a `Session`, which is the seam between measuring and engines: a build
through slmdeploy.runtime here, a torch model in slmdeploy/exporting/eager.py, `FakeSession` in tests. Times are taken
in this process, around the session's own call, so pipes and JSON are outside of them. One process per candidate, so
that peak memory is its own. What libraries print on stdout is turned to stderr. Knows nothing of workloads or
percentiles.
Run as `python -m slmdeploy.profiling.worker BUILD [--threads N]`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from slmdeploy.errors import InputError, SlmdeployError
from slmdeploy.profiling.arrivals import Clients, Scheduled, Source
from slmdeploy.profiling.driving import drive

Clock = Callable[[], float]
Reply = dict[str, Any]


class Session(Protocol):
    """What can be measured: token ids in, token ids or logits out. A task that it has not raises InputError."""

    def generate_ids(self, prompt_ids: Sequence[int], *, max_new_tokens: int, ignore_eos: bool) -> Iterator[int]:
        """Yield each new token as soon as it is known, greedily."""

    def score_ids(self, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Label logits [items, labels] of every item behind the prefix."""

    def logits(self, input_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [length, vocabulary] at every position."""


@runtime_checkable
class EncoderSession(Protocol):
    """What can be measured of an encoder."""

    def encode_ids(self, rows: Sequence[Sequence[int]]) -> Sequence[NDArray[np.float32]]:
        """The vector or the logits of each row of token ids."""


@runtime_checkable
class BatchSession(Protocol):
    """What can generate for several prompts together."""

    def stream_batch_ids(
        self, prompts: Sequence[Sequence[int]], *, slots: int, max_new_tokens: int, ignore_eos: bool
    ) -> Iterator[tuple[int, int]]:
        """Yield the number of a prompt and a new token of it as soon as it is known, greedily."""


class FakeSession:
    """A session with known answers and known service times, on a clock of its own so that nobody waits.

    Generation takes ``prefill_s`` until the first token and ``step_s`` for each other one, scoring ``item_s`` an item.
    Token i of a reply is i; an item's logits are (0, its last token id); ``logits`` gives uniform log-probabilities.
    """

    def __init__(
        self, *, prefill_s: float = 0.01, step_s: float = 0.001, item_s: float = 0.002, vocab_size: int = 16
    ) -> None:
        self.prefill_s, self.step_s, self.item_s, self.vocab_size = prefill_s, step_s, item_s, vocab_size
        self.now = 0.0
        self.seen: list[tuple[int, ...]] = []

    def clock(self) -> float:
        """Seconds that its answers and its sleep have taken so far."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def generate_ids(self, prompt_ids: Sequence[int], *, max_new_tokens: int, ignore_eos: bool) -> Iterator[int]:
        """Yield 0, 1, 2, … at the given pace."""
        self.seen.append(tuple(prompt_ids))
        for index in range(max_new_tokens):
            self.now += self.step_s if index else self.prefill_s
            yield index

    def score_ids(self, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Label logits (0, last token id) per item."""
        self.seen.append(tuple(prefix_ids))
        self.now += self.item_s * len(item_ids)
        return np.array([[0.0, item[-1]] for item in item_ids], np.float32)

    def encode_ids(self, rows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """The last token id of each row; a row takes as long as an item."""
        self.seen += [tuple(row) for row in rows]
        self.now += self.item_s * len(rows)
        return [np.array([row[-1]], np.float32) for row in rows]

    def logits(self, input_ids: Sequence[int]) -> NDArray[np.float32]:
        """Zeros: every token equally likely."""
        return np.zeros((len(input_ids), self.vocab_size), np.float32)


def answer(session: Session, request: Mapping[str, Any], clock: Clock = time.perf_counter) -> Reply:
    """The reply to one request; ``op`` says which.

    generate {prompt_ids, new_tokens}    → stamps_ms of each token since the call, tokens
    score    {prefix_ids, item_ids}      → ms, label_logits [items][labels]
    encode   {rows}                      → ms, sizes: how many numbers came back for each row
    drive    {requests, arrivals, concurrency, batch, limit_s} → records of driving.drive: open loop at the seconds of
             ``arrivals``, or that many clients, ``arrivals`` null
    logits   {input_ids, first, path}    → rows written to the .npy file ``path``: positions from ``first`` on
    rss      {}                          → peak_bytes, or null where the system does not tell
    Anything else is a ValueError: the parent and this file are one protocol.
    """
    match request["op"]:
        case "generate":
            return _generate(session, request, clock)
        case "score":
            return _score(session, request, clock)
        case "encode":
            return _encode(session, request, clock)
        case "drive":
            return _drive(session, request, clock)
        case "logits":
            rows = session.logits(request["input_ids"])[request["first"] :]
            np.save(request["path"], rows, allow_pickle=False)
            return {"rows": len(rows)}
        case "rss":
            return {"peak_bytes": peak_rss_bytes()}
    raise ValueError(f"unknown op {request['op']!r}")


def _generate(session: Session, request: Mapping[str, Any], clock: Clock) -> Reply:
    tokens, stamps = [], []
    started = clock()
    for token in session.generate_ids(request["prompt_ids"], max_new_tokens=request["new_tokens"], ignore_eos=True):
        stamps.append((clock() - started) * 1e3)
        tokens.append(int(token))
    if len(tokens) != request["new_tokens"]:
        raise RuntimeError(f"asked for {request['new_tokens']} tokens, the session gave {len(tokens)}")
    return {"tokens": tokens, "stamps_ms": stamps}


def _drive(session: Session, request: Mapping[str, Any], clock: Clock) -> Reply:
    asked = request["requests"]
    source: Source = (
        Clients(asked, request["concurrency"]) if request["arrivals"] is None else Scheduled(request["arrivals"], asked)
    )
    sleep = session.sleep if isinstance(session, FakeSession) else time.sleep
    records = drive(
        source,
        lambda together: answer_together(session, together, clock),
        batch=request["batch"],
        limit_s=request["limit_s"],
        clock=clock,
        sleep=sleep,
    )
    return {"records": records}


def answer_together(session: Session, requests: Sequence[Mapping[str, Any]], clock: Clock) -> list[Reply]:
    """Times of requests that were taken together: one batch where the session can, else one behind the other.

    A reply has ``stamps_ms`` of a generation's tokens, or ``ms``, since the first request was begun.
    """
    began = clock()
    if len(requests) > 1 and requests[0]["op"] == "encode":
        answer(session, {"op": "encode", "rows": [row for request in requests for row in request["rows"]]}, clock)
        return [{"ms": (clock() - began) * 1e3}] * len(requests)
    if len(requests) > 1 and requests[0]["op"] == "generate" and isinstance(session, BatchSession):
        return _generate_together(session, requests, clock)
    replies = []
    for request in requests:
        waited = (clock() - began) * 1e3
        reply = answer(session, request, clock)
        if "stamps_ms" in reply:
            replies.append({"stamps_ms": [waited + stamp for stamp in reply["stamps_ms"]]})
        else:
            replies.append({"ms": waited + reply["ms"]})
    return replies


def _generate_together(session: BatchSession, requests: Sequence[Mapping[str, Any]], clock: Clock) -> list[Reply]:
    stamps: list[list[float]] = [[] for _ in requests]
    prompts, new = [request["prompt_ids"] for request in requests], max(request["new_tokens"] for request in requests)
    started = clock()
    for row, _ in session.stream_batch_ids(prompts, slots=len(prompts), max_new_tokens=new, ignore_eos=True):
        stamps[row].append((clock() - started) * 1e3)
    return [{"stamps_ms": times[: request["new_tokens"]]} for times, request in zip(stamps, requests, strict=True)]


def _score(session: Session, request: Mapping[str, Any], clock: Clock) -> Reply:
    started = clock()
    logits = session.score_ids(request["prefix_ids"], request["item_ids"])
    ended = clock()
    return {"ms": (ended - started) * 1e3, "label_logits": np.asarray(logits).tolist()}


def _encode(session: object, request: Mapping[str, Any], clock: Clock) -> Reply:
    if not isinstance(session, EncoderSession):
        raise InputError("only an encoder can run the tasks embed and classify")
    started = clock()
    found = session.encode_ids(request["rows"])
    ended = clock()
    return {"ms": (ended - started) * 1e3, "sizes": [int(np.size(one)) for one in found]}


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process, None where the system does not tell it (Windows).

    Linux's ru_maxrss survives exec and so starts at the parent's size; VmHWM belongs to this program alone.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) * 1024
    if sys.platform == "darwin":
        import resource  # not there on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def serve(session: Session, info: Mapping[str, Any]) -> None:
    """Say hello with ``info`` (load_s, engine, …), then answer each line of stdin until it ends or says exit.

    From here on stdout belongs to the protocol: what libraries print, from Python or from C, goes to stderr.
    """
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        serve_lines(session, info, sys.stdin, replies)
    finally:
        replies.close()


def serve_lines(session: Session, info: Mapping[str, Any], requests: TextIO, replies: TextIO) -> None:
    """`serve` on given streams. A user's error becomes an error reply; any other exception ends the process."""
    _say(replies, {"ready": True, **info})
    for line in requests:
        request = json.loads(line)
        if request["op"] == "exit":
            return
        try:
            _say(replies, answer(session, request))
        except SlmdeployError as error:
            _say(replies, error_reply(error))


def error_reply(error: SlmdeployError) -> Reply:
    """An error of the user's or the machine's doing, in the form that the parent raises again."""
    return {"error": str(error), "exit_code": error.exit_code}


def _say(stream: TextIO, reply: Mapping[str, Any]) -> None:
    stream.write(json.dumps(reply) + "\n")
    stream.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Load a build and serve it; a build that cannot be loaded is an error reply instead of the hello."""
    parser = argparse.ArgumentParser(prog="slmdeploy.profiling.worker", description="serve one build to the profiler")
    parser.add_argument("build", type=Path)
    parser.add_argument("--threads", type=int, help="default: what the build itself says")
    parser.add_argument("--spinning", type=int, choices=(0, 1), help="default: what the build itself says")
    parser.add_argument("--prefill-chunk", type=int, help="tokens; default: what the build itself says")
    parser.add_argument("--draft", type=Path, help="a smaller build of the same tokenizer that guesses ahead")
    parser.add_argument("--prompt-lookup", action="store_true", help="guess ahead from the text itself")
    options = parser.parse_args(arguments)
    spinning = None if options.spinning is None else bool(options.spinning)
    from slmdeploy.runtime.bundle import RuntimeConfig
    from slmdeploy.runtime.opening import load  # its imports are not part of the load time
    from slmdeploy.runtime.session import physical_cores

    started = time.perf_counter()
    try:
        model = load(
            options.build,
            threads=options.threads,
            spinning=spinning,
            prefill_chunk=options.prefill_chunk,
            draft=options.draft,
            prompt_lookup=options.prompt_lookup,
        )
    except SlmdeployError as error:
        _say(sys.stdout, error_reply(error))
        return
    session: Any = model  # an encoder has no generate_ids, a decoder no encode_ids: `answer` refuses what is not there
    threads = model.runtime.threads if options.threads is None else options.threads
    hello = {"load_s": time.perf_counter() - started, "engine": model.runtime.engine}
    hello |= {"threads": threads or physical_cores(), "spinning": model.runtime.spinning}
    if isinstance(model.runtime, RuntimeConfig):
        hello["prefill_chunk"] = model.runtime.prefill_chunk
    serve(session, hello)


if __name__ == "__main__":
    main()
