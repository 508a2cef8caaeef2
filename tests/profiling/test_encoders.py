"""Encoders under measurement: their requests, metrics and refusals, and that the fastest is chosen.

The way from a graph to a package is in tests/building/test_encoder_build.py, which has real encoders.
"""

from pathlib import Path

import numpy as np
import pytest

from slmdeploy.errors import InputError
from slmdeploy.profiling.load import requests
from slmdeploy.profiling.profile import profile
from slmdeploy.profiling.worker import FakeSession, answer
from slmdeploy.runtime.encoder_model import load_encoder
from slmdeploy.selection import Row, choose
from slmdeploy.specs import Workload, named_workload, parse_budget
from tests.profiling.fakes import run
from tests.runtime.encoder_graphs import write_encoder_graph

SHORT = Workload(name="short", task="embed", texts=2, text_tokens=4, requests=4)
CLASSIFY = Workload(name="labels", task="classify", texts=3, text_tokens=4, requests=4, scenario="offline")


def test_requests_hold_texts_of_the_length(tmp_path: Path) -> None:
    (request,) = requests(named_workload("embed-8x128"), 1, vocab_size=64, seed=0)
    assert request["op"] == "encode"
    assert [len(row) for row in request["rows"]] == [128] * 8


def test_latency_and_throughput_of_texts() -> None:
    (outcome,) = run(SHORT, a=FakeSession(item_s=0.004))[0].values()
    assert outcome.metrics["encode_ms_p50"] == pytest.approx(8, rel=1e-4)
    (outcome,) = run(CLASSIFY, a=FakeSession(item_s=0.004))[0].values()
    assert set(outcome.metrics) == {"texts_per_s", "requests_per_s"}
    assert outcome.metrics["texts_per_s"] == pytest.approx(250)


def test_a_decoder_session_is_asked_for_no_vectors() -> None:
    with pytest.raises(InputError, match="only an encoder"):
        answer(object(), {"op": "encode", "rows": [[1]]})  # type: ignore[arg-type]


def test_encoders_are_measured_by_their_own_tasks_alone(tmp_path: Path) -> None:
    folder = write_encoder_graph(tmp_path / "graph")
    with pytest.raises(InputError, match="exported for embed"):
        profile([folder], workloads=[CLASSIFY], out=tmp_path / "out")
    with pytest.raises(InputError, match="needs a context of 128 tokens"):
        profile([folder], workloads=[named_workload("embed-128")], out=tmp_path / "out")
    with pytest.raises(InputError, match="without a baseline"):
        profile([folder], workloads=[SHORT], data=tmp_path, out=tmp_path / "out")


def test_pairs_of_ids_score_as_their_texts_do(tmp_path: Path) -> None:
    model = load_encoder(write_encoder_graph(tmp_path / "graph", "score"), threads=1)
    pair = model.tokenizer.encode("a b", "c")
    cut = pair.type_ids.index(1)
    (logits,) = model.score_ids(pair.ids[:cut], [pair.ids[cut:]])
    assert model.score("a b", ["c"]) == pytest.approx(logits.tolist())
    np.testing.assert_array_equal(model.encode_ids([pair.ids])[0], logits)


def test_the_fastest_encoder_within_its_gates_is_chosen() -> None:
    sizes = {"size_bytes": 100.0}
    rows = [
        Row("cpu-fp32", {"encode_ms_p50": 30.0, **sizes}, precision="fp32", graph="g"),
        Row("cpu-int8", {"encode_ms_p50": 12.0, **sizes}, precision="w8a8", graph="g"),
        Row("broken", {"encode_ms_p50": 5.0, **sizes}, precision="w8a8", graph="g", gates_failed=("min_cosine",)),
        Row("slow", {"encode_ms_p50": 40.0, **sizes}, precision="int8", graph="g"),
    ]
    selection = choose(rows, parse_budget("encode_ms_p50<=35"))
    assert selection.chosen == "cpu-int8"
    reasons = {rejection.build: rejection.reason for rejection in selection.rejections}
    assert "min_cosine" in reasons["broken"]
    assert "slower than cpu-fp32" in reasons["slow"]
