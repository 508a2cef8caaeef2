"""prepacking.py: packed weights in the file change no answer, are found again, and are left where they do not fit."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from slmdeploy.artifacts import open_artifact
from slmdeploy.building import build as verb
from slmdeploy.building import prepacking
from slmdeploy.building.build import build
from slmdeploy.building.prepacking import prepack
from slmdeploy.errors import GateError
from slmdeploy.exporting.export import export
from slmdeploy.runtime.encoder_model import load_encoder
from slmdeploy.runtime.model import Model, load
from slmdeploy.specs import Profile, load_profile
from tests.exporting.encoders import write_encoder
from tests.graphs import write_manifest, write_tiny_graph

IDS = [0, 5, 60, 7, 111]
ITEMS = [[1], [2, 3]]


def entries(graph: Path) -> dict[str, dict[str, str]]:
    """External data entries of each tensor by its name."""
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    return {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in tensors}


def opened(folder: Path) -> Model:
    write_manifest(folder)
    return load(folder, threads=1)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, object]]:
    """A folder as it was, the same prepacked, and what prepacking said."""
    plain = write_tiny_graph(tmp_path_factory.mktemp("prepacking") / "plain")
    folder = plain.parent / "packed"
    shutil.copytree(plain, folder)
    return plain, folder, prepack(folder)


def test_answers_are_the_same_to_the_bit(packed: tuple[Path, Path, dict[str, object]]) -> None:
    plain, folder, _ = packed
    models = [opened(plain), opened(folder)]
    assert np.array_equal(*(model.logits(IDS) for model in models))
    assert np.array_equal(*(model.score_ids(IDS, ITEMS) for model in models))


def test_each_matrix_is_stored_once_for_both_graphs(packed: tuple[Path, Path, dict[str, object]]) -> None:
    plain, folder, said = packed
    forms = [entries(folder / name) for name in ("model.onnx", "score.onnx")]
    matrices = [f"model.layers.{i}.{part}_proj.weight" for i in range(2) for part in ("attn.qkv", "mlp.down")]
    for name in matrices:
        assert forms[0][name]["prepacked_0"].startswith("MatMul+")
        assert forms[0][name] == forms[1][name]
    assert said["tensors"] == sum("prepacked_0" in entry for form in forms for entry in form.values())
    places = {value.split("|")[1] for form in forms for entry in form.values() if (value := entry.get("prepacked_0"))}
    assert said["bytes"] == sum(int(place.split(";")[1]) for place in places)
    assert all(int(place.split(";")[0]) % 4096 == 0 for place in places)
    grown = [(path / "model.onnx.data").stat().st_size for path in (plain, folder)]
    assert grown[1] - grown[0] >= said["bytes"]


def test_what_another_cpu_has_packed_is_left_alone(
    packed: tuple[Path, Path, dict[str, object]], tmp_path: Path
) -> None:
    """A hash that this CPU does not come to, and garbage under it: the session packs for itself."""
    plain, folder, _ = packed
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key.startswith("prepacked_"):
                operator, rest = entry.value.split("+")
                identity, offset = rest.split("|")[0], int(rest.split("|")[1].split(";")[0])
                entry.value = f"{operator}+{int(identity) ^ 1}|{rest.split('|', 1)[1]}"
                with (tmp_path / "other" / "model.onnx.data").open("r+b") as file:
                    file.seek(offset)
                    file.write(b"\xff" * 64)
    onnx.save(model, path)
    (tmp_path / "other" / "score.onnx").unlink()
    shutil.copy(plain / "score.onnx", tmp_path / "other")
    assert np.array_equal(opened(tmp_path / "other").logits(IDS), opened(plain).logits(IDS))


def test_answers_that_change_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_graph(tmp_path / "tiny", tasks=("generate",))
    answers = iter([[np.zeros(2, np.float32)], [np.ones(2, np.float32)]])
    monkeypatch.setattr(prepacking, "_answers", lambda folder: next(answers))
    with pytest.raises(GateError, match="computes something else from packed weights"):
        prepack(folder)


def test_a_profile_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = {"passed": True, "value": 0.5, "limit": 1.0}
    speed = {"prefill_ratio": 0.5, "decode_ratio": 0.5, "score_ratio": None}
    monkeypatch.setattr(verb, "speed_gate", lambda own, found: (speed, gate))
    monkeypatch.setattr("slmdeploy.building.texts._TOKENS", 128)
    graph = write_tiny_graph(tmp_path / "graph", tasks=("generate",), kind="graph")
    profile = Profile.model_validate(
        {
            "name": "mine",
            "summary": "s",
            "engine": "onnxruntime",
            "weights": {"scheme": "weight-only", "bits": 8, "block_size": 32},
            "prepacked": True,
            "session": {"threads": 1, "spinning": False},
        }
    )
    build(graph, profile=profile, out=tmp_path / "build")
    artifact = open_artifact(tmp_path / "build", "build")
    assert artifact.result["passed"]
    assert artifact.result["prepacked"]["tensors"] > 0
    assert any(rung["name"].startswith("decoded together") for rung in artifact.result["parity"])
    assert any("prepacked_0" in entry for entry in entries(tmp_path / "build" / "model.onnx").values())
    assert load(tmp_path / "build").generate_ids([1], max_new_tokens=1) is not None


@pytest.mark.slow
def test_an_encoder_too(tmp_path: Path) -> None:
    write_encoder(tmp_path / "checkpoint", role="embed", max_position_embeddings=128)
    export(tmp_path / "checkpoint", out=tmp_path / "graph")
    profile = load_profile("cpu-fp32").model_copy(update={"prepacked": True})
    made = build(tmp_path / "graph", profile=profile, out=tmp_path / "build")
    assert made.result["prepacked"]["tensors"] > 0
    vectors = [load_encoder(folder, threads=1).embed(["a b"]) for folder in (tmp_path / "graph", tmp_path / "build")]
    assert np.allclose(*vectors, atol=1e-5)
