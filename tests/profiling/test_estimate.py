"""Rows of what is not here: their form, their labels, how they follow the target's figures, and refusals."""

import json

import pytest

from slmdeploy.errors import InputError, OutputExistsError
from slmdeploy.profiling.calibration import read_calibration
from slmdeploy.profiling.estimate import costs_on, estimate
from slmdeploy.selection import read_rows
from slmdeploy.specs import Target, load_target
from slmdeploy.specs.workloads import named_workload
from tests.graphs import write_manifest, write_tiny_graph

MACHINE = read_calibration().machine
SOURCES = dict.fromkeys(("read_bandwidth_bytes_per_s", "peak_ops"), "datasheet")
WORKLOADS = [named_workload(name) for name in ("generate-8-4", "generate-8-4-offline", "score-8-3x4-hot")]


def target(bandwidth=1.0, peak=1.0, engines=("onnxruntime",), **changes):
    facts = {
        "name": "other",
        "summary": "",
        "kind": "cpu",
        "engines": engines,
        "read_bandwidth_bytes_per_s": bandwidth * MACHINE.read_bandwidth_bytes_per_s,
        "peak_ops": {"fp32": peak * MACHINE.fp32_peak_ops_per_s, "int8": peak * MACHINE.int8_peak_ops_per_s},
        "sources": SOURCES,
    }
    return Target.model_validate(facts | changes)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = write_tiny_graph(tmp_path_factory.mktemp("b") / "tiny", hidden=256, intermediate=512)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    write_manifest(folder)
    return folder


def row_of(build, out, target, **options):
    (row,) = json.loads(estimate([build], target=target, workloads=WORKLOADS, out=out, **options).read_text())["rows"]
    return row


def test_a_row_says_that_it_is_estimated_and_on_what(build, tmp_path):
    out = estimate([build], target=target(), workloads=WORKLOADS, out=tmp_path / "e.json")
    report = json.loads(out.read_text())
    assert (report["schema"], report["source"], report["target"], report["machine"]) == (2, "estimated", "other", None)
    (row,) = report["rows"]
    assert (row["build"], row["source"], row["target"], row["role"]) == ("tiny", "estimated", "other", "candidate")
    assert "elsewhere it is unverified" in row["basis"]
    assert set(row["metrics"]) == {
        *(f"{name}_ms_p50" for name in ("ttft", "tpot", "itl", "e2e", "score")),
        *("tokens_per_s", "requests_per_s", "size_bytes", "rss_peak_bytes", "kv_bytes"),
    }
    assert row["metrics"]["kv_bytes"] == 12 * 2 * 2 * 16 * 2 * 4
    assert set(row["workloads"]) == {workload.name for workload in WORKLOADS}


def test_figures_agree_with_one_another_and_lie_in_their_intervals(build, tmp_path):
    metrics = (row := row_of(build, tmp_path / "e.json", target()))["metrics"]
    assert metrics["e2e_ms_p50"] == pytest.approx(metrics["ttft_ms_p50"] + 3 * metrics["tpot_ms_p50"])
    assert metrics["tokens_per_s"] == pytest.approx(4 * 1e3 / metrics["e2e_ms_p50"])
    assert metrics["requests_per_s"] == pytest.approx(metrics["tokens_per_s"] / 4)
    assert set(row["intervals"]) == set(metrics) - {"size_bytes", "rss_peak_bytes", "kv_bytes"}
    for name, (low, high) in row["intervals"].items():
        assert low < metrics[name] < high, name


def test_select_reads_it(build, tmp_path):
    (row,) = read_rows(estimate([build], target=target(), workloads=WORKLOADS, out=tmp_path / "e.json"))
    assert row.estimated
    assert row.metrics["generate-8-4:ttft_ms_p50"] == row.metrics["ttft_ms_p50"]


def test_a_faster_machine_is_never_slower(build, tmp_path):
    base = row_of(build, tmp_path / "a.json", target())["metrics"]
    for number, faster in enumerate((target(bandwidth=3.0), target(peak=3.0))):
        metrics = row_of(build, tmp_path / f"{number}.json", faster)["metrics"]
        assert metrics["ttft_ms_p50"] < base["ttft_ms_p50"]
        assert metrics["size_bytes"] == base["size_bytes"]


def test_a_target_without_our_engine_says_so(build, tmp_path):
    assert (
        "As if ONNX Runtime's operators ran on it"
        in row_of(build, tmp_path / "e.json", load_target("nvidia-hopper-sm90"))["basis"]
    )


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"read_bandwidth_bytes_per_s": None}, "read_bandwidth_bytes_per_s"),
        ({"peak_ops": {"int8": 1e12}}, r"peak_ops\.fp32"),
        (
            {"read_bandwidth_bytes_per_s": None, "peak_ops": {}},
            r"read_bandwidth_bytes_per_s, peak_ops\.fp32, peak_ops\.int8",
        ),
    ],
)
def test_a_target_without_figures(changes, missing):
    with pytest.raises(InputError, match=f"target 'other' states no {missing}, so nothing is estimated"):
        costs_on(target(**changes), read_calibration())


def test_refusals(build, tmp_path):
    with pytest.raises(InputError, match=r"is no \.json file"):
        estimate([build], target=target(), workloads=WORKLOADS, out=tmp_path / "e")
    with pytest.raises(InputError, match="needs a context of"):
        estimate([build], target=target(), workloads=[named_workload("generate-900-4")], out=tmp_path / "e.json")
    (tmp_path / "e.json").write_text("kept")
    with pytest.raises(OutputExistsError, match="pass --force"):
        estimate([build], target=target(), workloads=WORKLOADS, out=tmp_path / "e.json")
    assert (tmp_path / "e.json").read_text() == "kept"
    assert row_of(build, tmp_path / "e.json", target(), force=True)
