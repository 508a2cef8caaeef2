"""export.py end to end on tiny models: what it writes, that it equals torch, and every refusal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slmdeploy.errors import (
    CorruptArtifactError,
    GateError,
    InputError,
    OutputExistsError,
    ResourceError,
    UnsupportedModelError,
)
from slmdeploy.exporting import parity
from slmdeploy.exporting.eager import EagerModel
from slmdeploy.exporting.export import export
from slmdeploy.runtime.model import load
from slmdeploy.verification import verify
from tests.exporting.checkpoints import write_checkpoint

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "num_key_value_heads": 1},
    {"head_dim": 32, "intermediate_size": 37, "num_key_value_heads": 4},
    {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1, "rms_norm_eps": 1e-3},
    {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 33},
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_variant_equals_torch(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "checkpoint", **changes)
    artifact = export(tmp_path / "checkpoint", out=tmp_path / "graph", tasks=("generate", "score"))
    rungs = artifact.result["parity"]
    assert all(rung["passed"] and rung["max_abs_difference"] < 1e-4 for rung in rungs)
    against_torch = [rung for rung in rungs if not rung["name"].startswith("standard.onnx: ")]
    assert (len(against_torch), len(rungs)) == (8, 13)
    assert all(rung["max_abs_difference"] > 0 for rung in against_torch), "torch was not compared with itself"


def test_the_folder_runs_and_says_what_it_is(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path / "checkpoint", dtype=torch.bfloat16, eos_token_id=[1, 5])
    artifact = export(tmp_path / "checkpoint", out=tmp_path / "graph", tasks=("generate", "score"))
    assert artifact.kind == "graph"
    assert {"model.onnx", "model.onnx.data", "score.onnx", "runtime.json", "config.json", "tokenizer.json"} | {
        "generation_config.json"
    } | {"standard.onnx", "genai_config.json"} == set(artifact.manifest["files"])
    assert artifact.result["parameters"] == sum(parameter.numel() for parameter in reference.parameters())
    model = load(tmp_path / "graph")
    assert model.runtime.eos_token_ids == (1, 5)
    assert model.runtime.score is not None
    assert model.runtime.score.labels == (" no", " yes")
    expected = EagerModel(tmp_path / "checkpoint").logits([3, 1, 4])
    assert np.allclose(model.logits([3, 1, 4]), expected, atol=1e-5)
    assert len(model.score("is it", [" so", " not"])) == 2


def test_generating_only_writes_no_scoring_graph_and_needs_no_labels(checkpoint: Path, tmp_path: Path) -> None:
    artifact = export(checkpoint, out=tmp_path / "graph", labels=("several tokens", "here"))
    assert "score.onnx" not in artifact.manifest["files"]
    scorer = export(checkpoint, out=tmp_path / "scorer", tasks=("score",))
    assert {"standard.onnx", "genai_config.json"}.isdisjoint(scorer.manifest["files"])
    assert artifact.plan == {"tasks": ["generate"], "dialect": "ort"}
    assert json.loads((tmp_path / "graph" / "runtime.json").read_text())["score"] is None


def test_a_scorer_alone(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, out=tmp_path / "graph", tasks=("score",), labels=(" yes", " no"))
    scores = load(tmp_path / "graph").score("is it", [" so"])
    export(checkpoint, out=tmp_path / "turned", tasks=("score",))
    assert load(tmp_path / "turned").score("is it", [" so"])[0] == pytest.approx(-scores[0], abs=1e-5)


def test_two_exports_are_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    first, second = (export(checkpoint, out=tmp_path / name, tasks=("generate", "score")) for name in ("a", "b"))
    assert first.manifest["files"] == second.manifest["files"]
    assert first.content_key == second.content_key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("rank",)}, "task 'rank' is not known: choose from generate, score, embed, classify"),
        ({"tasks": ("embed",)}, "is no model for the task embed; it can generate and score"),
        ({"pooling": "cls"}, "pooling and normalize are settings of the task embed"),
        ({"tasks": ()}, "give a list of different ones"),
        ({"tasks": "score"}, "give a list of different ones"),
        ({"dialect": "mobile"}, "dialect 'mobile' is not known: choose from ort, portable"),
        ({"tasks": ("score",), "labels": (" maybe", " yes")}, "label ' maybe' is . tokens"),
        ({"tasks": ("score",), "labels": (" yes", " yes")}, "are the same token"),
    ],
)
def test_arguments_that_cannot_be_used(
    checkpoint: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export(checkpoint, out=tmp_path / "graph", **arguments)
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        export(checkpoint, out=tmp_path / "graph")


def test_damaged_texts_are_named(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 9999}')
    with pytest.raises(InputError, match="eos_token_id = 9999"):
        export(checkpoint, out=tmp_path / "graph")
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptArtifactError, match=r"tokenizer\.json is not a tokenizer"):
        export(checkpoint, out=tmp_path / "graph")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", vocab_size=200)
    with pytest.raises(InputError, match="has 263 tokens, but the model's vocab_size is 200"):
        export(tmp_path / "checkpoint", out=tmp_path / "graph")


def test_an_unsupported_architecture_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match=r"architectures = .'MambaForCausalLM'."):
        export(checkpoint, out=tmp_path / "graph")


def test_an_output_that_exists_is_refused_and_replaced_by_force(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, out=tmp_path / "graph")
    with pytest.raises(OutputExistsError):
        export(checkpoint, out=tmp_path / "graph")
    assert export(checkpoint, out=tmp_path / "graph", force=True).path == tmp_path / "graph"


def test_a_graph_outside_parity_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LIMIT", 1e-9)
    with pytest.raises(GateError, match=r"differs from torch by .* more than 1e-09"):
        export(checkpoint, out=tmp_path / "graph")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_hub_id_without_a_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    message = r"nobody/nothing is not a folder here.*(could not be downloaded|in the cache)"
    with pytest.raises(ResourceError, match=message):
        export("nobody/nothing", out=tmp_path / "graph")


def test_progress_counts_tensors_and_checks(checkpoint: Path, tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.counts: dict[str, int] = {}

        def start(self, label: str, total: int | None, unit: str) -> None:
            self.label = label

        def advance(self, n: int = 1, note: str = "") -> None:
            self.counts[self.label] = self.counts.get(self.label, 0) + n

        def finish(self) -> None:
            pass

    recorder = Recorder()
    export(checkpoint, out=tmp_path / "graph", progress=recorder)
    assert recorder.counts["write graph"] > 10
    assert recorder.counts["compare with torch"] == 7


def test_a_graph_may_go_without_parity_and_says_so(checkpoint: Path, tmp_path: Path) -> None:
    plain = export(checkpoint, out=tmp_path / "graph")
    quick = export(checkpoint, out=tmp_path / "quick", parity=False)
    assert quick.result["parity"] == "not measured: exported with --no-parity"
    assert quick.content_key != plain.content_key
    assert verify(tmp_path / "quick")["parity"] == quick.result["parity"]
    names = ("model.onnx", "model.onnx.data")
    assert all(quick.manifest["files"][name] == plain.manifest["files"][name] for name in names)
    with pytest.raises(InputError, match="always compared with torch"):
        export(checkpoint, out=tmp_path / "traced", parity=False, fallback=True)
