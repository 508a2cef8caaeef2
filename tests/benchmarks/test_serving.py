"""The comparison of servers: what each is sent, how a rate ends the ladder, and what the page says of the results."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import serving
from benchmarks.peers.rounds import Journal
from benchmarks.servers import load, plot, report
from benchmarks.servers.catalogue import BEST, SERVERS, ServerRow, peer_of
from slmdeploy.profiling.live_http import Server, UnansweredError
from slmdeploy.profiling.summary import Turn, summarise
from slmdeploy.specs import Workload, named_workload
from tests.profiling.live_server import Script
from tests.profiling.live_server import serving as scripted

IDS = ServerRow("ids", "none", lambda *_: [], "takes ids", ("numpy",), scoring="score")
TEXT = ServerRow("text", "none", lambda *_: [], "takes text", ("numpy",), "text")
ABOUT = {"made": "2026-01-01", "commit": "abc", "machine": {"cpu": "a cpu", "threads": 2}}


def test_every_row_has_an_engine_of_the_other_comparison_and_a_command() -> None:
    assert len({row.name for row in SERVERS}) == len(SERVERS)
    for row in SERVERS:
        assert peer_of(row).name == row.peer
        command = row.command(Path("python"), Path("models/folder"), 8123, 2)
        assert command[0] == "python"
        assert "8123" in command


def test_requests_have_the_form_that_a_server_takes() -> None:
    generate = {"op": "generate", "prompt_ids": [0, 1, 27], "new_tokens": 5}
    assert load.made(IDS, generate)["prompt"] == [0, 1, 27]
    assert load.made(TEXT, generate)["prompt"] == "abb"
    score = {"op": "score", "prefix_ids": [0, 1], "item_ids": [[2], [3, 4]]}
    assert load.made(IDS, score) == {"op": "score", "prefix": "ab", "items": ["c", "de"]}
    assert load.made(TEXT, score) == {"op": "items", "prompts": ["abc", "abde"]}


def test_items_without_a_score_endpoint_are_completions_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_OVERLOAD", 1e4)  # a busy machine shall not end the cell
    script = Script()
    workload = named_workload("score-4-3x2-server-500")
    with scripted(script) as url:
        cell = load.run_cell(TEXT, Server(url, "m"), workload, vocab_size=64, round_=0, count=25)
    assert cell.kept_up
    assert cell.turn.requests == 25
    assert len(script.seen) == 3 * 25
    assert {(path, body["max_tokens"], len(body["prompt"])) for path, body in script.seen} == {
        ("/v1/completions", 1, 6)
    }
    assert cell.turn.units == 3 * 25
    assert "queue_ms" not in cell.turn.samples


def test_so_many_rounds_of_the_least_requests_have_a_99th_percentile() -> None:
    for rounds in (1, 3, 5):
        few = [Turn({}, units=1, requests=1, answered=1, wall_s=1.0)] * rounds
        for count, known in ((load.least_requests(rounds), True), (load.least_requests(rounds) - 1, False)):
            times = [10.0] * (count - int(0.2 * count))
            outcome = summarise(
                named_workload("generate-8-4-server-1"), [replace(one, samples={"e2e_ms": times}) for one in few]
            )
            assert ("e2e_ms_p99" in outcome.metrics) is known


@pytest.mark.parametrize(
    ("answered", "wall_s", "kept_up"), [(40, 2.0, True), (36, 1.0, True), (35, 1.0, False), (40, 2.1, False)]
)
def test_a_server_keeps_up_that_answers_nearly_all_in_time(answered: int, wall_s: float, kept_up: bool) -> None:
    cell = load.Cell(Turn({}, units=1, requests=40, answered=answered, wall_s=wall_s), (), limit_s=2.0)
    assert cell.kept_up == kept_up


def test_a_ladder_ends_at_the_rate_that_was_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {2.0: 40, 4.0: 30}
    asked = []

    def measured(plan: Any, row: Any, server: Any, workload: Workload, vocab_size: int, round_: int) -> load.Cell:
        asked.append(workload.rate_per_s)
        if workload.rate_per_s == 1.0:
            raise UnansweredError("/score answered 404")
        answered = cells[workload.rate_per_s or 0.0]
        return load.Cell(Turn({}, units=1, requests=40, answered=answered, wall_s=1.0), (), limit_s=2.0)

    monkeypatch.setattr(serving, "_measured", measured)
    journal = Journal(tmp_path / "cells.jsonl")
    plan: Any = serving.Plan((), (), {}, 1, 0.01, 2, float("inf"))
    shape: Any = SimpleNamespace(config={"vocab_size": 64})
    key = {"engine": "ids", "version": "1", "model": "tiny", "round": 0}
    cases = [f"generate-4-2-server-{rate}" for rate in (1, 2, 4, 8)]
    serving._ladder(plan, journal, shape, IDS, Server("http://localhost"), os.getpid(), 0, key, cases)
    assert asked == [1.0, 2.0, 4.0]
    assert [journal.has(**key, case=case) for case in cases] == [False, True, True, True]  # a failure is tried again
    assert journal.lines[0]["failed"] == "/score answered 404"
    assert journal.lines[1]["turn"]["answered"] == 40
    assert journal.lines[3]["skipped"] == "it did not keep up at 4/s"


def line(engine: str, rate: float, tokens_ms: float, **more: Any) -> dict[str, Any]:
    """A line of the journal whose 150 requests took about so long."""
    times = [tokens_ms * (1 + number / 1000) for number in range(150)]
    samples = {"service_ms": times, "e2e_ms": times, "ttft_ms": times, "tpot_ms": times}
    turn = {"samples": samples, "units": int(150 * rate), "requests": 150, "answered": 150, "wall_s": 10.0}
    case = f"generate-8-4-server-{rate:g}"
    key = {"engine": engine, "version": "1", "model": "tiny", "case": case, "round": 0}
    about = {"versions": {"numpy": "2.0"}, "load": 0.5, "steal": 0.01}
    return {**key, "turn": turn, "failures": [], "peak_bytes": 10**8, **about, **more}


def test_servers_are_compared_at_one_limit_for_all() -> None:
    ours, peer, absent = SERVERS[0].name, BEST[1], BEST[2]
    gone = {"engine": absent, "version": "1", "model": "tiny", "case": "generate-8-4-server-1", "round": 0}
    lines = [
        line(ours, 1, 100.0),
        line(ours, 4, 250.0),
        line(peer, 1, 200.0),
        line(peer, 4, 900.0),
        {**gone, "failed": "it cannot be had"},
    ]
    results = report.results_of(lines, SERVERS, ABOUT)
    json.dumps(results, allow_nan=False)
    cells = [cell for cell in results["cells"] if cell["model"] == "tiny"]
    assert report.limits_ms(cells) == pytest.approx([323, 1075], rel=0.01)
    charts = plot.charts(results, "page")
    page = report.render(results, {key: name for key, (name, _) in charts.items()})
    assert f"| {ours} | 60.0 | 60.0 |\n| {peer} | 15.0 | 60.0 |\n| {absent} | not run | not run |" in page
    assert f"| tiny | generate-8-4 | 322 ms | {ours} | {peer} | 4.00× | **yes** |" in page
    assert f"| tiny | generate-8-4 | 1,074 ms | {ours} | {peer} | 1.00× | no: a tie, their intervals overlap |" in page
    assert f"| {absent} | tiny | generate-8-4-server-1 | it cannot be had |" in page
    assert f"| {ours} | {SERVERS[0].note} | numpy 2.0 |" in page
    assert "highest 0.5; time stolen meanwhile: median 1.0%" in page
    assert "### 4 requests per second" in page
    assert "![p99 against throughput](page-tiny-generate-8-4.svg)" in page
    name, chart = charts["tiny", "generate-8-4"]
    assert name == "page-tiny-generate-8-4.svg"
    assert len(ElementTree.fromstring(chart).findall("{*}polyline")) == 2


def test_without_a_peer_or_without_ours_the_verdict_says_so() -> None:
    own, peer = line(SERVERS[0].name, 1, 100.0), line(BEST[1], 1, 100.0)
    alone = report.render(report.results_of([own], SERVERS, ABOUT), {})
    assert f"| {SERVERS[0].name} | none | – | **yes**, no peer is within it |" in alone
    assert f"| none | {BEST[1]} | – | no |" in report.render(report.results_of([peer], SERVERS, ABOUT), {})
    assert "Everything ran." in alone


def test_lines_of_an_older_version_do_not_count() -> None:
    lines = [line("a", 1, 100.0), line("a", 1, 700.0) | {"version": "2"}]
    (cell,) = report.results_of(lines, SERVERS, ABOUT)["cells"]
    assert cell["metrics"]["e2e_ms_p50"] == pytest.approx(752, rel=0.01)
    assert cell["rounds"] == 1


def test_too_few_requests_are_said() -> None:
    few = line("a", 1, 100.0)
    few["turn"]["samples"] = {name: values[:20] for name, values in few["turn"]["samples"].items()}
    page = report.render(report.results_of([few], SERVERS, ABOUT), {})
    assert "| a | too few requests for a p99 | too few requests for a p99 |" in page
    assert "| none | none | – | not known: too few requests of a for a p99 |" in page
    own = few | {"engine": BEST[0]}
    page = report.render(report.results_of([own, line(BEST[1], 1, 100.0)], SERVERS, ABOUT), {})
    assert f"| none | {BEST[1]} | – | not known: too few requests of {BEST[0]} for a p99 |" in page
