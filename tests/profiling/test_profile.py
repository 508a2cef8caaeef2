"""The verb on fake builds: known service times, rows with ratios, and refusals; worker processes where they matter."""

import json
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from slmdeploy.artifacts import content_key, find, open_artifact, writing
from slmdeploy.errors import InputError, OutputExistsError
from slmdeploy.profiling import profile as verb
from slmdeploy.profiling.candidates import _baseline, unique_names
from slmdeploy.profiling.measure import Effort
from slmdeploy.profiling.profile import Asked, owners, profile, profile_to_file
from slmdeploy.profiling.search import search
from slmdeploy.selection import choose, read_rows
from slmdeploy.specs import Workload, parse_budget
from tests.profiling.fakes import Inside

EFFORT = Effort(rounds=2, seconds=0.05, limit_s=0.2)
WORKLOADS = [
    Workload(name="g", task="generate", prompt_tokens=4, new_tokens=3, requests=40),
    Workload(name="long", task="generate", prompt_tokens=8, new_tokens=3, requests=40),
    Workload(name="g-offline", task="generate", scenario="offline", prompt_tokens=4, new_tokens=3, requests=40),
    Workload(name="s", task="score", prefix_tokens=4, items=3, item_tokens=2, requests=40),
]
WORKER = """
import sys
import slmdeploy.profiling.worker as worker
from tests.profiling.fakes import paced

answer = worker.answer
worker.answer = lambda session, request, clock=None: answer(session, request, session.clock)
worker.serve(*paced(sys.argv[1], sys.argv[2:]))
"""


def put_tokenizer(folder):
    words = {f"w{index}": index for index in range(30)}
    model = Tokenizer(models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(folder / "tokenizer.json"))


def fake_build(folder, pace, *, tasks=("generate", "score"), passed=True):
    runtime = {
        "format": 1,
        "tasks": list(tasks),
        "interface": "shared",
        "layers": 1,
        "kv_heads": [1],
        "head_dim": 8,
        "vocab_size": 30,
        "max_length": 32,
        "bos_token_id": None,
        "eos_token_ids": [1],
        "score": {"labels": [" no", " yes"], "label_ids": [2, 3]} if "score" in tasks else None,
        "session": {"threads": 0, "spinning": True, "parallel_items": False},
        "precision": "int8",
    }
    with writing(folder, kind="build", plan={"profile": {"name": "cpu-int8"}, "pace": pace}, inputs={}) as draft:
        put_tokenizer(draft.path)
        (draft.path / "runtime.json").write_text(json.dumps(runtime))
        (draft.path / "pace.txt").write_text(str(pace))
        draft.result = {"passed": passed, "gates": {"kl": {"passed": passed, "value": 0.1, "limit": 0.2}}}
    return folder


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Two builds, a slow baseline and a data folder; workers are fakes with their folder's pace."""
    (tmp_path / "worker.py").write_text(WORKER)

    def command(path, options=(), **_):
        return [sys.executable, str(tmp_path / "worker.py"), str(path), *options]

    monkeypatch.setattr(verb, "build_command", command)
    monkeypatch.setattr(verb, "baseline_command", command)
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    put_tokenizer(teacher)
    (teacher / "config.json").write_text('{"max_position_embeddings": 32}')
    (teacher / "pace.txt").write_text("10")
    data = tmp_path / "data"
    data.mkdir()
    (data / "generate.test.jsonl").write_text('{"prompt": "w1 w2", "completion": "w3 w4"}\n')
    (data / "score.test.jsonl").write_text('{"prefix": "w1", "items": ["w2", "w9"], "labels": [0, 1]}\n')
    builds = [fake_build(tmp_path / "fast", 1.0), fake_build(tmp_path / "slow", 2.0, passed=False)]
    return builds, teacher, data, tmp_path / "m"


@pytest.fixture
def quick(bench, monkeypatch):
    """The same with workers that are no processes: for tests of what is made of their answers."""
    monkeypatch.setattr(verb, "WorkerProcess", Inside)
    return bench


def test_measurement_has_rows_ratios_machine_and_gates(bench):
    builds, teacher, data, out = bench
    artifact = profile(builds, workloads=WORKLOADS, out=out, data=data, baseline=teacher, effort=EFFORT, threads=1)
    report = json.loads((artifact.path / "measurement.json").read_text())
    assert report["machine"]["logical_cores"] >= 1
    assert report["threads"] == 1
    rows = {row["build"]: row for row in report["rows"]}
    assert list(rows) == ["baseline", "fast", "slow"]
    metrics = rows["fast"]["metrics"]
    assert metrics["ttft_ms_p50"] == pytest.approx(10)
    assert metrics["tpot_ms_p50"] == pytest.approx(2)
    assert metrics["tokens_per_s"] == pytest.approx(3 / 0.014)
    assert metrics["score_ms_p50"] == pytest.approx(3)
    assert metrics["load_s"] == pytest.approx(0.5)
    assert metrics["first_request_s"] == pytest.approx(0.01 + 0.001)
    assert metrics["kv_bytes"] == 2 * 8 * 4 * 11
    assert metrics["tpot_ms_p50_ratio"] == pytest.approx(0.1)
    assert metrics["tokens_per_s_ratio"] == pytest.approx(10)
    assert metrics["auc"] == 1.0
    assert metrics["kl_to_baseline"] == pytest.approx(0)
    assert metrics["size_bytes"] == sum((out.parent / "fast" / n).stat().st_size for n in _RUN_FILES)
    assert rows["baseline"]["metrics"]["tpot_ms_p50_ratio"] == 1.0
    assert rows["fast"]["profile"] == "cpu-int8"
    assert rows["slow"]["gates"] == {"kl": {"passed": False, "value": 0.1, "limit": 0.2}}
    assert rows["slow"]["workloads"]["long"]["requests"] >= 2


_RUN_FILES = ("tokenizer.json", "runtime.json", "pace.txt", "manifest.json")


def test_a_file_holds_the_same_and_replaces_nothing_unasked(quick, tmp_path):
    builds, _, _, _ = quick
    file = tmp_path / "m.json"
    options = {"workloads": WORKLOADS[:1], "effort": EFFORT, "threads": 1}
    assert profile_to_file(builds, out=file, **options) == file
    report = json.loads(file.read_text())
    assert (report["schema"], report["source"]) == (2, "measured")
    assert [row["build"] for row in report["rows"]] == ["fast", "slow"]
    assert report["rows"][0]["workloads"]["g"]["samples"]["e2e_ms"]
    with pytest.raises(OutputExistsError):
        profile_to_file(builds, out=file, **options)
    assert profile_to_file(builds, out=file, force=True, **options) == file
    assert not list(tmp_path.glob(".*journal"))


def test_an_interrupted_measurement_goes_on(quick, monkeypatch):
    builds, _, _, out = quick
    options = {"workloads": WORKLOADS[:2], "effort": EFFORT, "threads": 1}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verb, "_flatten", interrupted)
        with pytest.raises(KeyboardInterrupt):
            profile(builds, out=out, **options)
    assert not out.exists()
    kept = out.with_name(".m.journal").read_text()
    found = profile(builds, out=out, **options)
    rows = {row["build"]: row for row in json.loads((found.path / "measurement.json").read_text())["rows"]}
    turns = [json.loads(line)["turn"] for line in kept.splitlines()[1:] if '"fast"' in line and '"long"' in line]
    assert rows["fast"]["workloads"]["long"]["requests"] == sum(turn["requests"] for turn in turns)
    assert not out.with_name(".m.journal").exists()


def test_the_options_that_were_found_are_those_that_are_measured(quick, monkeypatch):
    builds, _, _, out = quick
    monkeypatch.setattr(verb, "search", lambda *given, **options: search(*given, **(options | {"cores": 2})))
    options = {"workloads": WORKLOADS[:1], "effort": EFFORT}
    report = json.loads((profile(builds, out=out, search=True, **options).path / "measurement.json").read_text())
    (fast, _) = report["rows"]
    assert fast["search"]["options"]["threads"] == 1
    assert fast["metrics"]["tpot_ms_p50"] == pytest.approx(1)
    assert {entry["threads"] for entry in fast["search"]["compared"]} == {1, 2}


def test_a_figure_without_a_workload_belongs_to_one_workload_whole():
    alone, queued = WORKLOADS[0], WORKLOADS[1].model_copy(update={"scenario": "server", "rate_per_s": 3.0})
    given = {
        "g": {"e2e_ms_p50", "e2e_ms_p90"},
        "long": {"e2e_ms_p50", "e2e_ms_p99", "queue_ms_p50", "tokens_per_s", "requests_per_s"},
        "g-offline": {"tokens_per_s", "requests_per_s"},
    }
    found = dict(owners([queued, alone, WORKLOADS[2]], given))
    assert found == {
        "e2e_ms_p50": "g",
        "e2e_ms_p90": "g",  # and no p99, which only another workload has
        "queue_ms_p50": "long",
        "tokens_per_s": "g-offline",
        "requests_per_s": "long",
    }


def test_selection_reads_what_profile_wrote(quick):
    builds, teacher, _, out = quick
    made = profile(builds, workloads=WORKLOADS[:1], out=out, baseline=teacher, effort=EFFORT, threads=1)
    rows = read_rows(made.path)
    selection = choose(rows, parse_budget("tpot_ms_p50_ratio<=0.5"))
    assert selection.chosen == "fast"
    assert selection.rejections[0].reason == "outside its own gates: kl"
    assert not choose(rows, parse_budget("auc>=0.5")).feasible  # no data was given, so there is no auc


def test_the_content_key_can_be_known_before(quick):
    builds, teacher, _, out = quick
    settings = {"workloads": WORKLOADS[:1], "baseline": teacher, "effort": EFFORT, "threads": 1}
    asked = Asked(builds, **settings)
    key = content_key("measurement", asked.plan, asked.inputs)
    assert find(out, key) is None
    assert profile(builds, out=out, **settings).content_key == key
    assert find(out, key) is not None
    other = Asked(builds, **{**settings, "seed": 1})
    assert content_key("measurement", other.plan, other.inputs) != key


def test_output_that_exists_is_refused_before_any_work(bench):
    builds, _, _, out = bench
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(OutputExistsError):
        profile(builds, workloads=WORKLOADS, out=out)


def test_refusals(bench, tmp_path):
    builds, teacher, data, out = bench
    writer = fake_build(tmp_path / "writer", 1.0, tasks=("generate",))
    with pytest.raises(InputError, match="writer was exported for generate"):
        profile([writer], workloads=WORKLOADS, out=out)
    with pytest.raises(InputError, match="no build was given"):
        profile([], workloads=WORKLOADS, out=out)
    with pytest.raises(InputError, match="was given twice"):
        profile([builds[0], builds[0]], workloads=WORKLOADS, out=out)
    with pytest.raises(InputError, match=r"config\.json does not exist: the baseline must be a checkpoint"):
        profile(builds, workloads=WORKLOADS, out=out, baseline=data)
    (teacher / "config.json").write_text('{"n_positions": 32}')
    assert _baseline(teacher).max_length == 32
    (teacher / "config.json").write_text("{}")
    with pytest.raises(InputError, match="max_position_embeddings"):
        profile(builds, workloads=WORKLOADS, out=out, baseline=teacher)
    with pytest.raises(InputError, match="two workloads are called 'g'"):
        profile(builds, workloads=[WORKLOADS[0], WORKLOADS[0]], out=out)
    with writing(tmp_path / "d", kind="data", plan={}, inputs={}):
        pass
    with pytest.raises(InputError, match="is a data: profile measures"):
        profile([tmp_path / "d"], workloads=WORKLOADS, out=out)
    assert not out.exists()


def test_a_failing_worker_leaves_no_half_measurement(bench):
    builds, _, _, out = bench
    (builds[0].parent / "worker.py").write_text("raise SystemExit('broken')")
    with pytest.raises(Exception, match="ended during 'load' with status 1: broken"):
        profile(builds, workloads=WORKLOADS, out=out, effort=EFFORT, threads=1)
    assert not out.exists()


def test_names_are_the_shortest_that_differ(tmp_path):
    assert unique_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert unique_names([tmp_path / "x/b", tmp_path / "y/b"]) == ["x/b", "y/b"]


def test_open_artifact_refuses_another_kind(bench):
    builds, *_ = bench
    with pytest.raises(InputError, match="is a build, but a measurement is needed"):
        open_artifact(builds[0], "measurement")
