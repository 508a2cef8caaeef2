"""Encoder builds of the engine openvino, end to end on tiny random BERTs."""

import json
from pathlib import Path

import numpy as np
import pytest

from slmdeploy.building import encoder_gate
from slmdeploy.building.build import build
from slmdeploy.errors import CorruptArtifactError
from slmdeploy.exporting.export import export
from slmdeploy.runtime.encoder_model import load_encoder
from slmdeploy.runtime.opening import load
from slmdeploy.specs import Gate, SessionOptions, load_profile
from tests.exporting.encoders import write_encoder

TEXTS = ["The cat sat.", "where", "where is the cat on? the cat sat on the, on, on."]
SPEED = {"single_ratio": 0.5, "batch_ratio": 0.5}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timing of something so small would be noise."""
    passed = {"passed": True, "value": 0.5, "limit": 1.0}
    monkeypatch.setattr(encoder_gate, "speed_gate", lambda own, found, config: (SPEED, passed))


@pytest.mark.parametrize("role", ["embed", pytest.param("classify", marks=pytest.mark.slow)])
def test_activations_are_quantised_too_and_outputs_stay_near(tmp_path: Path, role: str) -> None:
    write_encoder(tmp_path / "checkpoint", role=role)
    export(tmp_path / "checkpoint", out=tmp_path / "graph")
    # One scale for a whole tensor is hard on weights that are as random as these.
    changes = {"session": SessionOptions(threads=1), "gate": Gate(max_logit_difference=0.3)}
    shipped = load_profile("openvino-int8").model_copy(update=changes)
    made = build(tmp_path / "graph", profile=shipped, out=tmp_path / "out")
    assert made.result["passed"], made.result["gates"]
    assert "w8a8" in made.result["parts"].values()
    assert made.result["speed"] == SPEED
    runtime = json.loads((made.path / "runtime.json").read_text())
    assert runtime["openvino"]["inference_precision"] in made.result["precisions"]
    own, found = load_encoder(tmp_path / "graph", threads=1), load_encoder(made.path, threads=1)
    if role == "embed":
        vectors, expected = found.embed(TEXTS), own.embed(TEXTS)
        assert min(encoder_gate.cosine(*pair) for pair in zip(vectors, expected, strict=True)) > 0.97
        np.testing.assert_allclose(found.embed(TEXTS[:1]), vectors[:1], atol=0.02 * np.abs(vectors).max())
    else:
        assert [label.label for label in found.classify(TEXTS)] == [label.label for label in own.classify(TEXTS)]
    assert load(made.path).tasks == own.tasks
    (made.path / "openvino_model.xml").write_text("<net/>")
    with pytest.raises(CorruptArtifactError, match="does not load"):
        load_encoder(made.path, verify=False).encoder  # noqa: B018
