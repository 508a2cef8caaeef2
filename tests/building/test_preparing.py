"""preparing.py in a build: what a profile asks for is done, measured, recorded, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slmdeploy.building import build as verb
from slmdeploy.building import phases, preparing
from slmdeploy.building.build import build
from slmdeploy.building.folding import places, put
from slmdeploy.building.onnxruntime import open_folder
from slmdeploy.building.preparing import prepared, product_of, refuse_for_encoders
from slmdeploy.building.reference import Reference
from slmdeploy.building.rewriting import weight_array
from slmdeploy.building.smooth import w8a8_product
from slmdeploy.errors import GateError, InputError
from slmdeploy.runtime.model import load
from slmdeploy.specs import Profile
from tests.building.small import relative_error, write_graph, write_planted
from tests.building.test_build import INT4, LENIENT, SPEED, profile

IDS = [0, 5, 9, 33, 100, 7]
W8A8 = {"scheme": "w8a8", "bits": 8}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("preparing"))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (verb, phases):
        monkeypatch.setattr(
            module, "speed_gate", lambda own, found: (SPEED, {"passed": True, "value": 0.5, "limit": 1.0})
        )
    monkeypatch.setattr("slmdeploy.building.texts._TOKENS", 128)
    monkeypatch.setattr("slmdeploy.building.texts._OWN_CALIBRATION_TOKENS", 128)


def kl(found: Any) -> float:
    return float(found.result["quality"]["kl"])


def test_outliers_cost_quality_and_smoothing_gives_it_back(graph: Path, tmp_path: Path) -> None:
    asked = {"gate": LENIENT | {"max_kl": 99.0}}
    plain = build(graph, profile=profile(W8A8, **asked), out=tmp_path / "plain")
    smooth = build(graph, profile=profile(W8A8, smooth=True, **asked), out=tmp_path / "smooth")
    both = build(graph, profile=profile(W8A8, smooth=True, rotate=True, **asked), out=tmp_path / "both")
    assert kl(smooth) < kl(plain) / 3
    assert kl(both) < kl(plain) / 3
    assert plain.result["prepared"] is None
    done = both.result["prepared"]
    assert done["rotated"] == {"reads": 5, "writes": 4, "attentions": 2}
    assert done["smoothed"]
    assert abs(done["kl"]) < 1e-6
    assert both.result["gates"]["parity"]["passed"], "scores and logits are of one head"
    model = load(both.path)
    np.testing.assert_allclose(
        model.score_ids(IDS[:3], [IDS[3:]])[0],
        model.logits(IDS)[-1, list(model.runtime.score.label_ids)],
        atol=0.05,
    )


def test_phases_share_one_prepared_graph(graph: Path, tmp_path: Path) -> None:
    asked = profile(INT4, prefill=W8A8, smooth=True, gate=LENIENT | {"max_kl": 99.0})
    assert product_of(asked) is w8a8_product
    found = build(graph, profile=asked, out=tmp_path / "split")
    assert found.result["prepared"]["smoothed"]
    assert found.result["gates"]["prefill parity"]["passed"]


def test_the_head_of_scores_is_the_prepared_one(graph: Path) -> None:
    before = open_folder(graph)
    with prepared(Reference(graph, None), profile(W8A8, rotate=True)) as (reference, done):
        assert done is not None
        after = open_folder(reference.graph)
        assert relative_error(after.score_ids([1], [[2, 3]]), before.score_ids([1], [[2, 3]])) < 1e-4
        assert reference.graph != graph


def test_a_preparation_that_moves_the_predictions_ends_the_build(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_sided(model: ir.Model, *_: Any, **__: Any) -> dict[str, float]:
        maker = places(model.graph)[0].makers[0].constant
        put(maker, weight_array(maker) * 2)
        return {}

    monkeypatch.setattr(preparing, "smooth", one_sided)
    with pytest.raises(GateError, match=r"moves its predictions by .* leave rotate and smooth out"):
        build(graph, profile=profile(W8A8, smooth=True), out=tmp_path / "build")
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("method", ["nearest", "gptq", "quantease"])
def test_a_method_that_is_named_is_for_every_form(graph: Path, tmp_path: Path, method: str) -> None:
    asked = profile(W8A8, rounding=method, gate=LENIENT | {"max_kl": 99.0})
    found = build(graph, profile=asked, out=tmp_path / "build")
    assert (found.result["calibration"] is None) == (method == "nearest")
    assert found.result["singular"] == [], "128 tokens span what every layer reads"
    assert found.result["gates"]["parity"]["passed"]


def test_static_builds_take_a_method_too_and_too_little_text_is_said(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmdeploy.building.texts._OWN_CALIBRATION_TOKENS", 64)
    lenient = LENIENT | {"max_kl": 99.0}
    builds = {
        method: build(
            graph,
            profile=profile({"scheme": "w8a8-static", "bits": 8}, rounding=method, gate=lenient),
            out=tmp_path / method,
        )
        for method in ("nearest", "gptq")
    }
    assert builds["nearest"].result["singular"] == []
    assert {name.rsplit(".", 1)[-1] for name in builds["gptq"].result["singular"]} == {"down_proj"}
    assert kl(builds["gptq"]) != kl(builds["nearest"])


def test_what_has_no_such_thing_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has smooth, which is for decoders: leave it out"):
        refuse_for_encoders(profile(W8A8, smooth=True))
    refuse_for_encoders(profile(W8A8))
    with pytest.raises(ValueError, match="scheme = 'fp32' has all"):
        profile({"scheme": "fp32"}, rotate=True)
    with pytest.raises(ValueError, match="does not take smooth"):
        Profile.model_validate(
            {"name": "n", "summary": "s", "engine": "openvino", "weights": W8A8 | {"scheme": "weight-only"}}
            | {"smooth": True}
        )
    standard = write_graph(tmp_path / "standard")
    runtime = (standard / "runtime.json").read_text(encoding="utf-8")
    (standard / "runtime.json").write_text(runtime.replace('"shared"', '"standard"'), encoding="utf-8")
    asked = prepared(Reference(standard, None), profile(W8A8, rotate=True))
    with pytest.raises(InputError, match="export the checkpoint with --dialect ort"), asked:
        pytest.fail("nothing is prepared")
