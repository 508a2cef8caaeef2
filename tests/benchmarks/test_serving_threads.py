"""The engine alone and behind HTTP give the same numbers of tokens, and the page says what was measured."""

import json
from pathlib import Path

import pytest

from benchmarks.serving_threads import BEGIN, END, WAYS, Alone, BehindHttp, Turn, Way, measure, rows_of, table, write
from slmdeploy.profiling.live_http import Server
from slmdeploy.runtime.engine import Engine
from slmdeploy.runtime.model import load
from slmdeploy.serving.app import create_app
from tests.graphs import write_tiny_graph
from tests.serving.live import running


def test_both_ways_stream_all_tokens(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path / "tiny", tasks=("generate",))
    with Engine(load(folder)) as engine, running(create_app(load(folder))) as url:
        ways: dict[tuple[int, str], Way] = {
            (1, WAYS[0]): Alone(engine),
            (1, WAYS[1]): BehindHttp(Server(url, "tiny")),
        }
        found = measure(ways, rounds=1, clients=2, prompt_tokens=4, new_tokens=5, vocab=200)
    for turns in found.values():
        (turn,) = turns
        assert [len(stamps) for stamps in turn.stamps_ms] == [5, 5]
        assert len(turn.gaps_ms) == 8
        assert turn.tokens_per_s > 0
    assert len(table(rows_of(found)).splitlines()) == 4


def test_figures_are_medians_of_turns_and_percentiles_of_gaps(tmp_path: Path) -> None:
    turns = [Turn([[10.0, 20.0, 40.0], [5.0, 15.0, 25.0]], seconds) for seconds in (1.0, 2.0, 3.0)]
    slow = [Turn([[10.0, 20.0, 40.0]], 2.0)]
    rows = rows_of({(2, WAYS[0]): turns, (2, WAYS[1]): slow})
    assert (rows[0]["tokens_per_s"], rows[0]["slowest_turn"], rows[0]["fastest_turn"]) == (3.0, 2.0, 6.0)
    assert rows[0]["itl_ms_p50"] == pytest.approx(10)
    assert "| 2 | behind HTTP | 1.5 (1.5 to 1.5) | 50% |" in table(rows)
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    about = {"build": "b", "cores": 2, "machine": "m", "clients": 2, "prompt_tokens": 1, "new_tokens": 3, "rounds": 3}
    for _ in range(2):  # a second time finds its own table
        write(about, rows, results, page)
        text = page.read_text()
        assert text.startswith(f"before\n{BEGIN}`b` on 2 cores of m")
        assert text.endswith(f"{table(rows)}{END}after\n")
    assert json.loads(results.read_text())["rows"] == rows
