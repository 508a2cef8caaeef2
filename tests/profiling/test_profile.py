"""The verb on fake builds: real worker processes, known service times, rows with ratios, and refusals."""

import json
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from slmdeploy.artifacts import content_key, find, open_artifact, writing
from slmdeploy.errors import InputError, OutputExistsError
from slmdeploy.profiling import profile as verb
from slmdeploy.profiling.profile import determinants, profile, unique_names
from slmdeploy.selection import choose, read_rows
from slmdeploy.specs import Workload, parse_budget

WORKLOADS = [
    Workload(name="g", task="generate", prompt_tokens=4, new_tokens=3, requests=4),
    Workload(name="long", task="generate", prompt_tokens=8, new_tokens=3, requests=4),
    Workload(name="g-offline", task="generate", scenario="offline", prompt_tokens=4, new_tokens=3, requests=4),
    Workload(name="s", task="score", prefix_tokens=4, items=3, item_tokens=2, requests=4),
]
WORKER = """
import sys
from pathlib import Path
from slmdeploy.profiling.worker import FakeSession, serve
import slmdeploy.profiling.worker as worker

pace = float((Path(sys.argv[1]) / "pace.txt").read_text())
session = FakeSession(prefill_s=0.01 * pace, step_s=0.002 * pace, item_s=0.001 * pace, vocab_size=30)
answer = worker.answer
worker.answer = lambda session, request, clock=None: answer(session, request, session.clock)
serve(session, {"load_s": 0.5 * pace})
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
    monkeypatch.setattr(
        verb,
        "worker_command",
        lambda path, threads, baseline, labels: [sys.executable, str(tmp_path / "worker.py"), str(path)],
    )
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


def test_measurement_has_rows_ratios_machine_and_gates(bench):
    builds, teacher, data, out = bench
    artifact = profile(builds, workloads=WORKLOADS, out=out, data=data, baseline=teacher, rounds=2, threads=1)
    report = json.loads((artifact.path / "measurement.json").read_text())
    assert report["machine"]["logical_cores"] >= 1
    assert report["threads"] == 1
    rows = {row["build"]: row for row in report["rows"]}
    assert list(rows) == ["baseline", "fast", "slow"]
    metrics = rows["fast"]["metrics"]
    assert metrics["ttft_ms_p50"] == pytest.approx(10)
    assert metrics["tpot_ms_p99"] == pytest.approx(2)
    assert metrics["tokens_per_s"] == pytest.approx(3 / 0.014)
    assert metrics["score_ms_p50"] == pytest.approx(3)
    assert metrics["load_s"] == pytest.approx(0.5 + 0.01 + 0.001)
    assert metrics["tpot_ms_p50_ratio"] == pytest.approx(0.1)
    assert metrics["tokens_per_s_ratio"] == pytest.approx(10)
    assert metrics["auc"] == 1.0
    assert metrics["kl_to_baseline"] == pytest.approx(0)
    assert metrics["size_bytes"] == sum((out.parent / "fast" / n).stat().st_size for n in _RUN_FILES)
    assert rows["baseline"]["metrics"]["tpot_ms_p50_ratio"] == 1.0
    assert rows["fast"]["profile"] == "cpu-int8"
    assert rows["slow"]["gates"] == {"kl": {"passed": False, "value": 0.1, "limit": 0.2}}
    assert rows["slow"]["workloads"]["long"]["requests"] == 4


_RUN_FILES = ("tokenizer.json", "runtime.json", "pace.txt", "manifest.json")


def test_selection_reads_what_profile_wrote(bench):
    builds, teacher, _, out = bench
    rows = read_rows(profile(builds, workloads=WORKLOADS[:1], out=out, baseline=teacher, rounds=2, threads=1))
    selection = choose(rows, parse_budget("tpot_ms_p50_ratio<=0.5"))
    assert selection.chosen == "fast"
    assert selection.rejections[0].reason == "outside its own gates: kl"
    assert not choose(rows, parse_budget("auc>=0.5")).feasible  # no data was given, so there is no auc


def test_the_content_key_can_be_known_before(bench):
    builds, teacher, _, out = bench
    settings = {"workloads": WORKLOADS[:1], "baseline": teacher, "rounds": 2, "threads": 1}
    key = content_key("measurement", *determinants(builds, **settings))
    assert find(out, key) is None
    assert profile(builds, out=out, **settings).content_key == key
    assert find(out, key) is not None
    assert content_key("measurement", *determinants(builds, **{**settings, "rounds": 3})) != key


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
    assert verb._baseline(teacher).max_length == 32
    (teacher / "config.json").write_text("{}")
    with pytest.raises(InputError, match="max_position_embeddings"):
        profile(builds, workloads=WORKLOADS, out=out, baseline=teacher)
    with writing(tmp_path / "d", kind="data", plan={}, inputs={}):
        pass
    with pytest.raises(InputError, match="is a data: profile measures"):
        profile([tmp_path / "d"], workloads=WORKLOADS, out=out)
    assert not out.exists()


def test_a_failing_worker_leaves_no_half_measurement(bench):
    builds, _, _, out = bench
    (builds[0].parent / "worker.py").write_text("raise SystemExit('broken')")
    with pytest.raises(Exception, match="ended during 'load' with status 1: broken"):
        profile(builds, workloads=WORKLOADS, out=out, rounds=2, threads=1)
    assert not out.exists()


def test_names_are_the_shortest_that_differ(tmp_path):
    assert unique_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert unique_names([tmp_path / "x/b", tmp_path / "y/b"]) == ["x/b", "y/b"]


def test_open_artifact_refuses_another_kind(bench):
    builds, *_ = bench
    with pytest.raises(InputError, match="is a build, but a measurement is needed"):
        open_artifact(builds[0], "measurement")
