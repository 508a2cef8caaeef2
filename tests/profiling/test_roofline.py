"""Work in bytes, operations and operators, counted by hand; costs carried to another machine."""

from dataclasses import replace

import pytest

from slmdeploy.profiling.facts import BuildFacts
from slmdeploy.profiling.graph_facts import GraphFacts, Linear
from slmdeploy.profiling.roofline import UNITS, carried, latencies, request_work, run_work
from slmdeploy.profiling.runs import Request, Run

GRAPH = GraphFacts(
    (Linear("int4", 10, 20, 100, False), Linear("w8a8", 20, 30, 600, False), Linear("fp32", 30, 5, 600, True)), 7
)
FACTS = BuildFacts("b", None, ("generate",), {"steps": GRAPH, "prompts": GRAPH}, (16, 8), (8, 4), 100, 64)


def units(run, facts=FACTS, cache=0, threads=2):
    work = run_work(run, facts, threads, cache)
    return {name: value for name, value in zip(UNITS, work.tolist(), strict=True) if value}


def test_a_run_by_units():
    assert units(Run("prompts", tokens=3, kept=1, pairs=9, keys=3)) == {
        "read_int4": 100,
        "read_w8a8": 600,
        "read_fp32": 600,
        "ops_int4": 2 * 3 * 200,
        "ops_w8a8": 2 * 3 * 600,
        "ops_fp32": 2 * 1 * 150,
        "values": 4 * (3 * 30 + 1 * 35),
        "values_w8a8": 4 * 3 * 50,
        "attention": 4 * 9 * 24,
        "keys": 3 * 2 * 4 * 12,
        "operators": 7,
    }


def test_a_head_that_no_row_reaches_is_not_read():
    assert "read_fp32" not in units(Run("prompts", tokens=3, kept=0, pairs=9, keys=3))


@pytest.mark.parametrize(("cache", "held"), [(0, 0.0), (1300, 1.0), (1000, 0.7), (650, 0.0), (100, 0.0)])
def test_what_the_cache_holds_is_not_read_from_memory(cache, held):
    found = units(Run("steps", 1, 1, 1, 1), cache=cache)
    assert found.get("read_cached", 0) == pytest.approx(held * 1300)
    assert found.get("read_int4", 0) == pytest.approx((1 - held) * 100)


def test_fewer_threads_and_lanes_compute_longer_and_read_once():
    run = Run("steps", 4, 1, 4, 4)
    plain, one = units(run), units(run, replace(FACTS, threads=1))
    lanes = units(replace(run, lanes=2))
    for name in ("ops_int4", "values", "attention"):
        assert one[name] == lanes[name] == 2 * plain[name]
    for name in ("read_int4", "operators", "keys"):
        assert one[name] == lanes[name] == plain[name]


def test_a_request_is_the_sum_of_its_runs():
    step = Run("steps", 1, 1, 5, 5, times=3)
    first, later = request_work(Request((replace(step, times=1),), (step,), 4, 1), FACTS, threads=2, cache_bytes=0)
    assert later.tolist() == pytest.approx((3 * run_work(step, FACTS, 2, 0)).tolist())
    assert (first - later / 3).tolist() == pytest.approx([float(name == "requests") for name in UNITS])


def test_latencies_by_task():
    assert latencies(10.0, 30.0, "generate", 4) == {"ttft_ms": 10, "e2e_ms": 40, "tpot_ms": 10, "itl_ms": 10}
    assert latencies(10.0, 0.0, "generate", 1) == {"ttft_ms": 10, "e2e_ms": 10}
    assert latencies(10.0, 0.0, "score", 4) == {"score_ms": 10}
    assert latencies(10.0, 0.0, "classify", 4) == {"encode_ms": 10}


def test_costs_on_a_machine_of_other_figures():
    found = carried(dict.fromkeys(UNITS, 1.0), bandwidth=2.0, peaks={"fp32": 4.0, "int8": 8.0})
    assert found["read_fp32"] == found["values"] == found["keys"] == 1 / 2
    assert found["ops_fp32"] == found["attention"] == 1 / 4
    assert found["ops_int4"] == found["ops_int8"] == found["ops_w8a8"] == 1 / 8
    assert found["operators"] == found["requests"] == 1
