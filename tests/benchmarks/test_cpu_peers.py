"""The comparison with other engines, without any of them: statistics, goals, resuming, and the committed page."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import page, rounds, setup
from benchmarks.peers.cases import CASES, Missing, ask, measure, settle
from benchmarks.peers.catalogue import PEERS, Form, Peer, our_peers
from benchmarks.peers.goals import verdicts
from benchmarks.peers.protocol import NotOffered, Rows
from benchmarks.peers.report import render
from benchmarks.peers.rounds import Journal, Plan, read_lines, stolen_share
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.summary import Results, newest, spread, summarise, times_as_good
from benchmarks.peers.worker import answer
from slmdeploy.errors import ResourceError

ROOT = Path(__file__).resolve().parents[2]
QWEN = "qwen2.5-0.5b"
CASE = {case.name: case for case in CASES}
FORM = Form(4.25, 8, "4/8/8", "f32", "int8 in blocks")
OURS = Peer("slmdeploy cpu-int4", "ours", None, 4, FORM, scoring="items packed", is_ours=True)
THEM = Peer("genai-int4", "genai", None, 4, FORM, scoring="prefix reused, items one by one")
ABOUT = {
    "made": "2026-01-01",
    "commit": "abc",
    "machine": {"cpu": "a CPU", "threads": 2, "memory_bytes": 8e9, "system": "Linux", "isa": ["avx2"]},
}


def line(
    engine: str, case: str, value: float | None, *, round_: int = 0, version: str = "1", **more: Any
) -> dict[str, Any]:
    """A line of the journal."""
    found = {
        "engine": engine,
        "version": version,
        "model": QWEN,
        "case": case,
        "round": round_,
        "load": 0.5,
        "steal": 0.0,
    }
    return found | ({"value": value} if value is not None else {}) | more


def results(*lines: dict[str, Any]) -> Results:
    """What the page would be made of."""
    limits = {"engine": "limits", "case": "limits", "round": 0}
    limits["values"] = {"bandwidth": 30e9, "int8": 1e12, "bf16": 5e11, "fp32": 2e11}
    return Results(json.loads(json.dumps(summarise([*lines, limits], [OURS, THEM], ABOUT))))


class FakeEngine:
    """An engine on a clock of its own: a token takes 1 ms, a prompt's token 0.01 ms, an item's token 0.1 ms."""

    def __init__(self, *, batches: bool = True) -> None:
        self.now, self.batches = 0.0, batches
        self.prompts: list[tuple[int, ...]] = []

    def clock(self) -> float:
        return self.now

    def generate(self, prompts: Rows, new_tokens: int) -> Any:
        if len(prompts) > 1 and not self.batches:
            raise NotOffered("one row only")
        self.prompts += map(tuple, prompts)
        self.now += 1e-5 * sum(map(len, prompts))
        for _ in range(new_tokens):
            yield None
            self.now += 1e-3

    def begin(self, prefix: Any, hot: bool) -> None:
        self.now += 1e-5 * len(prefix)

    def score(self, items: Rows) -> object:
        self.now += 1e-4 * sum(map(len, items))
        return None

    def encode(self, rows: Rows) -> object:
        self.now += 1e-5 * sum(map(len, rows))
        return None

    def peak_rss_bytes(self) -> int:
        return 5_000_000


class FakeClient:
    """The worker's replies without a process."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.hello = engine, {"load_s": 0.25, "versions": {"fake": "1"}}

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        return json.loads(json.dumps(answer(self.engine, {"op": op, **fields}, self.engine.clock)))

    def __enter__(self) -> "FakeClient":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_spread_is_the_quartile_range_over_the_median() -> None:
    found = spread([10.0, 11.0, 12.0, 13.0, 100.0])
    assert (found.median, found.rounds) == (12.0, 5)
    assert found.spread == pytest.approx((13 - 11) / 12)
    assert spread([3.0]) == spread([3.0]).__class__(3.0, 0.0, 1)


def test_times_as_good_is_above_one_for_the_better_of_either_direction() -> None:
    assert times_as_good(50, 100, CASE["ttft_512"]) == 2.0
    assert times_as_good(50, 100, CASE["decode_1"]) == 0.5


def test_every_case_measures_what_its_name_says() -> None:
    engine = FakeEngine()
    client, shape = FakeClient(engine), SHAPES["tiny"]
    value = {
        case.name: measure(case, client, shape, 0)[0] for case in CASES if case.measure and case.models == "decoder"
    }
    assert value["ttft_512"] == pytest.approx(5.12)
    assert value["decode_1"] == pytest.approx(1000.0)
    assert value["decode_8"] == pytest.approx(8000.0)
    assert value["balanced"] == pytest.approx(5.12 + 63)
    assert value["score_cold"] == pytest.approx(32 / (5.12 + 51.2) * 1e3)
    assert value["score_hot"] == pytest.approx(32 / 51.2 * 1e3)
    assert value["score_hot_one"] == pytest.approx(1.6)
    assert value["score_naive"] == pytest.approx(1e3 / 5.28)
    assert len(set(engine.prompts)) == len(engine.prompts), "a prompt that comes twice could be answered by a cache"
    assert measure(CASE["encode_8"], client, SHAPES["bert-base"], 0)[0] == pytest.approx(8 / 10.24e-3)
    assert settle(client, shape, 0) == (pytest.approx(0.08), 5_000_000)


def test_all_engines_of_a_round_get_the_same_prompts_and_rounds_differ() -> None:
    seen = []
    for round_ in (0, 0, 1):
        engine = FakeEngine()
        measure(CASE["ttft_128"], FakeClient(engine), SHAPES["tiny"], round_)
        seen.append(engine.prompts)
    assert seen[0] == seen[1] != seen[2]


def test_what_an_engine_does_not_offer_is_a_reason_and_no_figure() -> None:
    client = FakeClient(FakeEngine(batches=False))
    with pytest.raises(Missing, match="one row only"):
        measure(CASE["decode_8"], client, SHAPES["tiny"], 0)
    with pytest.raises(ValueError, match="unknown op"):
        ask(client, "nonsense")


def test_a_journal_goes_on_where_it_stopped(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "cells.jsonl")
    journal.write(line("a", "ttft_512", 1.0))
    journal.write(line("a", "decode_1", None, failed="killed"))
    journal.write(line("a", "decode_8", None, missing="no batches"))
    with (tmp_path / "cells.jsonl").open("a") as stream:
        stream.write('{"engine": "a", "cut sh')
    again = Journal(tmp_path / "cells.jsonl")
    key = {"engine": "a", "version": "1", "model": QWEN, "round": 0}
    assert len(again.lines) == 3
    assert again.has(**key, case="ttft_512")
    assert again.has(**key, case="decode_8"), "what an engine cannot do is not asked again"
    assert not again.has(**key, case="decode_1"), "a failure is tried again"
    assert not again.has(**key | {"version": "2"}, case="ttft_512"), "another version is measured anew"
    assert not again.has(**key | {"round": 1}, case="ttft_512")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Processes without processes; the list has the names of those that were started."""
    started: list[str] = []

    def process(name: str, *_: object, **__: object) -> FakeClient:
        started.append(name)
        if name == "broken":
            raise ResourceError("the worker of broken died")
        return FakeClient(FakeEngine(batches=name != "single"))

    monkeypatch.setattr(rounds, "WorkerProcess", process)
    monkeypatch.setattr(rounds, "ensure", lambda *_: ROOT / "profiles")
    monkeypatch.setattr(rounds, "worker_command", lambda *_: [])
    monkeypatch.setattr(rounds, "version_key", lambda peer, *_: f"v-{peer.name}")
    monkeypatch.setattr(rounds, "_limits", lambda *_: {"engine": "limits", "case": "limits", "round": 0, "values": {}})
    return started


def test_a_rerun_starts_only_what_is_not_there(tmp_path: Path, engines: list[str]) -> None:
    peers = tuple(Peer(name, "", None, 8, FORM) for name in ("good", "single", "broken"))
    cases = tuple(CASE[name] for name in ("ttft_512", "decode_8", "rss", "load", "score_naive", "encode_1"))
    plan = Plan((SHAPES["tiny"],), peers, cases, 2, 2)
    places = setup.Places(tmp_path, tmp_path)
    rounds.run(plan, Journal(tmp_path / "cells.jsonl"), places, lambda _: None)
    assert engines == ["good", "single", "broken", "broken", "good", "single"], "each round begins with another"
    lines = {(each["engine"], each["case"], each["round"]): each for each in read_lines(tmp_path / "cells.jsonl")}
    assert lines["good", "ttft_512", 0]["value"] == pytest.approx(5.12)
    assert lines["good", "rss", 1]["value"] == 5.0
    assert lines["good", "load", 1]["value"] == pytest.approx(0.25008)
    assert lines["single", "decode_8", 0]["missing"] == "one row only"
    assert "died" in lines["broken", "ttft_512", 0]["failed"]
    assert ("good", "score_naive", 0) not in lines, "only our own builds are measured naively"
    assert ("good", "encode_1", 0) not in lines, "a decoder does not encode"
    engines.clear()
    rounds.run(plan, Journal(tmp_path / "cells.jsonl"), places, lambda _: None)
    assert engines == ["broken", "broken"]


def test_cases_of_one_thread_have_a_process_of_their_own(
    tmp_path: Path, engines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(rounds, "worker_command", lambda peer, *rest: asked.append((peer.name, rest[-1])) or [])
    cases = tuple(CASE[name] for name in ("ttft_512", "ttft_512_t1", "rss"))
    plan = Plan((SHAPES["tiny"],), (Peer("good", "", None, 8, FORM),), cases, 1, 2)
    rounds.run(plan, Journal(tmp_path / "cells.jsonl"), setup.Places(tmp_path, tmp_path), lambda _: None)
    assert asked == [("good", 2), ("good", 1)]
    written = [each["case"] for each in read_lines(tmp_path / "cells.jsonl") if "value" in each]
    assert sorted(written) == ["rss", "ttft_512", "ttft_512_t1"]


def test_the_page_says_what_the_second_thread_brings() -> None:
    found = results(line(OURS.name, "ttft_512", 100.0), line(OURS.name, "ttft_512_t1", 180.0))
    text = render(found.data, "", {}, "results.json")
    assert f"| {OURS.name} | 180 | 1.80× as fast |  |  |" in text
    assert "One thread and two" not in render(results(line(OURS.name, "ttft_512", 1.0)).data, "", {}, "results.json")


def test_no_process_is_begun_after_the_time(tmp_path: Path, engines: list[str]) -> None:
    plan = Plan((SHAPES["tiny"],), (Peer("good", "", None, 8, FORM),), (CASE["rss"],), 1, 2, until=0.0)
    said: list[str] = []
    rounds.run(plan, Journal(tmp_path / "cells.jsonl"), setup.Places(tmp_path, tmp_path), said.append)
    assert engines == []
    assert "out of time" in said[0]


def test_an_engine_that_cannot_be_had_is_a_row_with_the_reason(
    tmp_path: Path, engines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Path:
        raise setup.NotRun("environment zentorch: no matching distribution")

    monkeypatch.setattr(rounds, "ensure", refuse)
    plan = Plan((SHAPES[QWEN],), (THEM,), (CASE["rss"],), 1, 2)
    journal = Journal(tmp_path / "cells.jsonl")
    rounds.run(plan, journal, setup.Places(tmp_path, tmp_path), lambda _: None)
    text = render(summarise(journal.lines, [THEM], ABOUT), "", {}, "results.json")
    assert "- genai-int4: environment zentorch: no matching distribution (qwen2.5-0.5b rss)" in text


def test_only_the_newest_version_that_ran_a_case_counts() -> None:
    old = [line("a", "ttft_512", 9.0), line("a", "ttft_512", 8.0, round_=1), line("a", "decode_1", 7.0)]
    found = newest([*old, line("a", "ttft_512", 5.0, version="2"), line("b", "ttft_512", 1.0)])
    assert [each["value"] for each in found] == [7.0, 5.0, 1.0]


def test_goals_are_judged_on_medians_and_say_by_how_much() -> None:
    found = results(
        *(line(OURS.name, "ttft_512", value, round_=i) for i, value in enumerate((90.0, 100.0, 500.0))),
        line(THEM.name, "ttft_512", 200.0),
        line(OURS.name, "decode_1", 110.0),
        line(THEM.name, "decode_1", 100.0),
        line(OURS.name, "score_cold", 40.0),
        line(OURS.name, "score_naive", 2.0),
        line(OURS.name, "score_hot", 64.0),
        line(OURS.name, "score_hot_one", 100.0),
    )
    by_goal = {verdict.goal: verdict for verdict in verdicts(found)}
    prompt = by_goal["TTFT 512: ≤ 0.6× the best peer's time (≥ 1.67× as fast)"]
    assert (prompt.figure, prompt.met) == (2.0, True)
    genai = by_goal["decode, batch 1, 4 bit: ≥ 1.2× onnxruntime-genai"]
    assert (genai.figure, genai.met) == (pytest.approx(1.1), False)
    ik = by_goal["decode, batch 1, 4 bit: ≥ 1.1× ik_llama.cpp"]
    assert (ik.figure, ik.met, ik.against) == (None, None, "none was run")
    assert by_goal["score 512 + 32×16, cold: ≥ 10× naive"].figure == 20.0
    # 32 items take 500 ms, three times one is 300 ms.
    assert by_goal["score hot: 32 items in ≤ 3× the time of one"].figure == pytest.approx(0.6)
    text = render(found.data, "What limits it: attention.", {}, "results.json")
    assert f"| {QWEN} | decode, batch 1, 4 bit: ≥ 1.2× onnxruntime-genai | {OURS.name} | {THEM.name} | 1.10×" in text
    assert "no: −8% of 1.20×" in text
    assert "What limits it: attention." in text
    assert "**slmdeploy cpu-int4** | 100 ± 102% (2.00×)" in text


def test_shares_of_limits_are_those_of_the_arithmetic_done() -> None:
    found = results(line(OURS.name, "ttft_512", 1000.0), line(OURS.name, "decode_1", 50.0))
    shape = SHAPES[QWEN]
    assert shape.linear_parameters == 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    attention = 2 * 512 * 512 * 896 * 24
    done = 2 * shape.linear_parameters * 512 + 2 * 151936 * 896 + attention
    assert found.share_of_limit(OURS.name, QWEN, "ttft_512") == pytest.approx(done / 1e12)
    read = (shape.linear_parameters * 4.25 + 151936 * 896 * 8) / 8 * 50
    assert found.share_of_limit(OURS.name, QWEN, "decode_1") == pytest.approx(read / 30e9)
    assert found.share_of_limit(OURS.name, QWEN, "rss") is None


def test_stolen_time_is_a_share_of_all_time(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  10 0 10 70 0 0 0 10 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    assert rounds.stolen_ticks(stat) == (10, 100)
    assert stolen_share((10, 100), (30, 200)) == pytest.approx(0.2)


def test_every_profile_of_a_cpu_that_quantises_is_a_row_and_names_are_unique() -> None:
    names = [peer.name for peer in (*our_peers(), *PEERS)]
    assert len(set(names)) == len(names)
    shipped = {f"slmdeploy {file.stem}" for file in (ROOT / "profiles").glob("*.toml")}
    elsewhere = {name for name in shipped if name.startswith(("slmdeploy cuda-", "slmdeploy tensorrt-"))}
    assert shipped - elsewhere - {"slmdeploy cpu-fp32"} == {name for name in names if name.startswith("slmdeploy")}
    assert all((ROOT / f"benchmarks/peers/engines/{peer.module}.py").is_file() for peer in PEERS)


def test_the_same_results_give_the_same_plot_and_plots_are_small() -> None:
    values = random.Random(0)
    found = results(*(line(peer.name, "ttft_512", values.random()) for peer in (OURS, THEM)))
    made = page.files(found.data, "")
    plot = made[Path(f"docs/performance-{QWEN}.svg")]
    assert made == page.files(found.data, "")
    assert plot.count("<rect") == 3
    assert len(plot) < 20_000


@pytest.mark.parametrize("machine", ["", "amx"])
def test_the_committed_page_is_what_the_committed_results_give(machine: str) -> None:
    data = json.loads((ROOT / page.results_file(machine)).read_text(encoding="utf-8"))
    notes = ROOT / page.notes_file(machine)
    made = page.files(data, notes.read_text(encoding="utf-8") if notes.exists() else "", machine)
    for file, text in made.items():
        assert (ROOT / file).read_text(encoding="utf-8") == text, f"{file}: run benchmarks/cpu_peers.py --report-only"
