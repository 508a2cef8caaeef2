"""The load on a live server: requests are under way together, and what got no answer is kept with its reason."""

import threading
from typing import Any

import pytest

from slmdeploy.errors import InputError
from slmdeploy.profiling.arrivals import Clients, Scheduled
from slmdeploy.profiling.live_client import LiveClient, drive_live
from slmdeploy.profiling.live_http import UnansweredError

REQUESTS = [{"op": "generate", "prompt_ids": [number], "new_tokens": 2} for number in range(6)]


def stamped(request: dict[str, Any], left_s: float) -> dict[str, Any]:
    """A reply at once."""
    return {"stamps_ms": [1.0, 2.0]}


def test_an_open_loop_sends_while_others_are_under_way() -> None:
    together = threading.Barrier(len(REQUESTS))  # broken, and so an error, unless all are under way at once

    def wait(request: dict[str, Any], left_s: float) -> dict[str, Any]:
        together.wait(30)
        return {}

    records = drive_live(Scheduled([0.0] * len(REQUESTS), REQUESTS), wait, limit_s=60.0)
    assert len(records) == len(REQUESTS)
    for record in records:
        assert record["arrival_s"] <= record["begin_s"] <= record["end_s"]


def test_a_closed_loop_has_no_more_under_way_than_clients() -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def count(request: dict[str, Any], left_s: float) -> dict[str, Any]:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        with lock:
            under_way -= 1
        return {"stamps_ms": [0.0]}

    assert len(drive_live(Clients(REQUESTS, 2), count, limit_s=60.0)) == len(REQUESTS)
    assert 1 <= most <= 2


def test_nothing_is_sent_behind_the_limit() -> None:
    sent = []

    def note(request: dict[str, Any], left_s: float) -> dict[str, Any]:
        sent.append(left_s)
        return {}

    records = drive_live(Scheduled([0.0, 1e6], REQUESTS[:2]), note, limit_s=0.0)
    assert all(record.get("unanswered") for record in records)
    assert sent == []


def test_a_bug_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        drive_live(Scheduled([0.0], REQUESTS[:1]), lambda request, left_s: {"ms": 1 / 0}, limit_s=60.0)


def drive(client: LiveClient, limit_s: float = 60.0) -> list[dict[str, Any]]:
    """Records of all requests, one behind the other."""
    fields = {"requests": REQUESTS, "arrivals": None, "concurrency": 1, "batch": 1, "limit_s": limit_s}
    return client.ask("drive", **fields)["records"]


def test_refused_requests_are_counted_with_their_reasons() -> None:
    def refuse_odd(request: dict[str, Any], left_s: float) -> dict[str, Any]:
        if request["prompt_ids"][0] % 2:
            raise UnansweredError("answered 429: busy")
        return {"stamps_ms": [1.0, 2.0], "spread": True}

    client = LiveClient(refuse_odd, lambda request: request)
    records = drive(client)
    assert [bool(record.get("unanswered")) for record in records] == [False, True] * 3
    assert (client.sent, client.failures, client.spread) == (6, ["answered 429: busy"] * 3, True)


def test_a_server_that_answers_nothing_is_bad_input() -> None:
    def refuse(request: dict[str, Any], left_s: float) -> dict[str, Any]:
        raise UnansweredError("answered 404: no such model")

    with pytest.raises(InputError, match="answers no request: answered 404"):
        drive(LiveClient(refuse, lambda request: request))


def test_what_the_end_of_a_turn_cuts_off_is_no_failure() -> None:
    def late(request: dict[str, Any], left_s: float) -> dict[str, Any]:
        raise UnansweredError("did not answer in time", too_late=True)

    client = LiveClient(late, lambda request: request)
    assert all(record["unanswered"] for record in drive(client, limit_s=5.0))
    assert client.failures == []
    slow = LiveClient(late, lambda request: request)
    with pytest.raises(InputError, match="did not answer in time"):
        drive(slow, limit_s=3600.0)


def test_requests_are_made_before_the_clock_starts() -> None:
    made = []
    client = LiveClient(stamped, lambda request: made.append(request) or {**request, "made": True})
    assert len(drive(client)) == len(made) == 6
