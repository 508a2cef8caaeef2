"""encoder.py end to end on tiny models: what it writes, that it equals torch, which form of the graph, every refusal.

The matrix of families and tasks is slow and leaves its figures for docs/families.md.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from slmdeploy.artifacts import Artifact
from slmdeploy.building.ladder import Rung
from slmdeploy.errors import GateError, InputError, UnsupportedModelError
from slmdeploy.exporting import encoder, tracing
from slmdeploy.exporting.encoder import EncoderSettings, export_encoder
from slmdeploy.exporting.encoder_module import longest_input
from slmdeploy.exporting.export import export
from slmdeploy.exporting.tasks import choose
from slmdeploy.exporting.tracing import can_fuse, quietly
from slmdeploy.progress import SILENT
from slmdeploy.runtime.encoder_model import load_encoder
from tests.exporting.conftest import Record
from tests.exporting.encoders import FAMILIES, ROLES, write_encoder, write_json, write_modules

TEXTS = ["The cat sat.", "where", "where is the cat on? the cat sat on the, on, on."]
FUSED = encoder._FUSED if can_fuse() else encoder._STANDARD


def states_of(folder: Path, model: PreTrainedModel, text: str) -> np.ndarray:
    """The vectors of one text's tokens in torch, by itself: nothing padded."""
    encoding = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text)
    inputs = {"input_ids": torch.tensor([encoding.ids]), "token_type_ids": torch.tensor([encoding.type_ids])}
    with torch.inference_mode():
        return np.asarray(model(**inputs).last_hidden_state[0])


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel, Artifact]:
    """A sentence-transformers BERT: first token, dense layer, normalisation; exported without saying a task."""
    folder = tmp_path_factory.mktemp("embedder")
    source = folder / "checkpoint"
    model = write_encoder(source)
    write_modules(source, "Dense", "Normalize", pooling={"pooling_mode_cls_token": True})
    write_json(source / "2_Dense" / "config.json", {"in_features": 32, "out_features": 6, "bias": True})
    dense = {"linear.weight": torch.randn(6, 32), "linear.bias": torch.randn(6)}
    save_file(dense, source / "2_Dense" / "model.safetensors")
    write_json(source / "sentence_bert_config.json", {"max_seq_length": 40})
    write_json(source / "config_sentence_transformers.json", {"prompts": {"query": "where "}})
    return source, model, export(source, out=folder / "graph")


def test_vectors_are_those_of_torch_and_of_each_text_alone(
    embedder: tuple[Path, PreTrainedModel, Artifact],
) -> None:
    source, model, artifact = embedder
    dense = load_file(source / "2_Dense" / "model.safetensors")
    first = np.stack([states_of(source, model, text)[0] for text in TEXTS])
    projected = np.tanh(first @ dense["linear.weight"].numpy().T + dense["linear.bias"].numpy())
    expected = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    loaded = load_encoder(artifact.path)
    assert np.allclose(loaded.embed(TEXTS), expected, atol=1e-5)
    assert np.allclose(loaded.embed(["is the cat"], prompt="query"), loaded.embed(["where is the cat"]))


def test_the_folder_says_what_it_is_and_what_was_proved(
    embedder: tuple[Path, PreTrainedModel, Artifact],
) -> None:
    _, _, artifact = embedder
    assert {"model.onnx", "model.onnx.data", "runtime.json", "config.json", "tokenizer.json", "modules.json"} | {
        "tokenizer_config.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    } == set(artifact.manifest["files"])
    assert artifact.plan == {"tasks": ["embed"], "dialect": "ort"}
    assert (artifact.result["exporter"], artifact.result["fusions"]) == ("transformers.exporters", FUSED)
    rungs = artifact.result["parity"]
    assert len(rungs) == 12, "six batches, two outputs"
    assert all(rung["passed"] and 0 < rung["difference"] < 1e-5 for rung in rungs)
    config = load_encoder(artifact.path).runtime
    assert config.max_length == 40, "what sentence-transformers lets through, not the 48 positions"
    assert config.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert config.embedding is not None
    assert (config.embedding.dimension, config.embedding.pooling, config.embedding.normalized) == (6, "cls", True)


def test_the_graph_has_the_names_that_other_runtimes_expect(
    embedder: tuple[Path, PreTrainedModel, Artifact],
) -> None:
    graph = onnx.load(embedder[2].path / "model.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in graph.opset_import} == (
        {"": 18, "com.microsoft": 1} if can_fuse() else {"": 18}
    )
    axes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert axes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "token_type_ids": ["batch", "sequence"],
        "last_hidden_state": ["batch", "sequence", 32],
        "sentence_embedding": ["batch", 6],
    }


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    """A RoBERTa with two labels for pairs, saved in bfloat16."""
    folder = tmp_path_factory.mktemp("cross")
    write_encoder(folder / "checkpoint", "RoBERTa", "score", dtype=torch.bfloat16, id2label={0: "no", 1: "yes"})
    return folder / "checkpoint", export(folder / "checkpoint", out=folder / "graph", tasks=("score", "classify"))


def test_scores_and_labels_of_pairs_are_those_of_torch(cross_encoder: tuple[Path, Artifact]) -> None:
    source, artifact = cross_encoder
    reference = ROLES["score"].from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    logits = []
    for item in TEXTS:
        with torch.inference_mode():
            logits.append(reference(torch.tensor([tokenizer.encode("where", item).ids])).logits[0].numpy())
    model = load_encoder(artifact.path)
    assert model.runtime.inputs == ("input_ids", "attention_mask")
    assert model.runtime.max_length == 48, "of 50 positions two stand before the first"
    assert np.allclose(model.score("where", TEXTS), [no_yes[1] - no_yes[0] for no_yes in logits], atol=1e-5)
    found = model.classify([("where", text) for text in TEXTS])
    assert [label.label for label in found] == [("no", "yes")[int(row.argmax())] for row in logits]


@pytest.mark.parametrize(
    ("fused", "standard", "fusions"),
    [
        (1e-6, 1e-6, encoder._FUSED),
        (1e-3, 1e-6, encoder._STANDARD),
        (None, 1e-6, encoder._STANDARD),
        (1e-3, 1e-3, None),
    ],
)
def test_fusions_are_kept_only_where_they_equal_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: float | None, standard: float, fusions: str | None
) -> None:
    def traced(*arguments: Any, **form: bool) -> list[Rung]:
        difference = fused if form["fused"] else standard
        if difference is None:
            raise UnsupportedModelError("it cannot be fused")
        return [Rung("all", difference, difference, 1e-4, difference <= 1e-4)]

    monkeypatch.setattr(encoder, "_traced", traced)
    monkeypatch.setattr(tracing, "can_fuse", lambda: True)
    write_encoder(tmp_path / "checkpoint")
    if fusions is None:
        with pytest.raises(GateError, match=r"differs from torch by 0\.001 in 'all', more than 0\.0001"):
            export(tmp_path / "checkpoint", out=tmp_path / "graph")
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
        return
    result = export(tmp_path / "checkpoint", out=tmp_path / "graph").result
    assert result["fusions"] == fusions
    refused = result["fusions_refused"] or {}
    assert refused.get("difference") == (None if fusions == encoder._FUSED else fused)
    assert refused.get("error") == ("it cannot be fused" if fused is None else None)


def edit(folder: Path, name: str, **changes: Any) -> None:
    write_json(folder / name, json.loads((folder / name).read_text()) | changes)


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def spoil_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "arguments", "error", "message"),
    [
        (drop_tensor, {}, UnsupportedModelError, "has no tensor encoder.layer.1.output.dense.weight"),
        (spoil_tensor, {}, InputError, "encoder.layer.1.output.dense.weight holds NaN"),
        (lambda f: edit(f, "config.json", intermediate_size=40), {}, UnsupportedModelError, "in another shape the ten"),
        (lambda f: edit(f, "config.json", model_type="mine"), {}, InputError, "is no embedder that can be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), {}, InputError, "safetensors is missing"),
        (lambda f: (f / "tokenizer.json").unlink(), {}, InputError, "tokenizer.json is missing"),
        (lambda f: None, {"pooling": "max"}, InputError, "pooling 'max' is not known: choose from mean, cls, last"),
        (lambda f: None, {"dialect": "portable", "opset": 24}, InputError, "by its cache, and an encoder has none"),
        (lambda f: None, {"fallback": True}, InputError, "fallback and labels are settings of decoders"),
        (lambda f: None, {"max_length": 49}, InputError, "has positions for 1 to 48 tokens"),
        (lambda f: None, {"tasks": ("generate",)}, InputError, "no model for the task generate"),
    ],
)
def test_a_checkpoint_that_cannot_be_exported_is_one_sentence(
    tmp_path: Path, spoil: Any, arguments: dict[str, Any], error: Any, message: str
) -> None:
    write_encoder(tmp_path / "checkpoint")
    spoil(tmp_path / "checkpoint")
    with pytest.raises(error, match=message):
        export(tmp_path / "checkpoint", out=tmp_path / "graph", **arguments)
    assert not (tmp_path / "graph").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path / "checkpoint", vocab_size=40)
    with pytest.raises(InputError, match="has 65 tokens, but the model's vocab_size is 40"):
        export(tmp_path / "checkpoint", out=tmp_path / "graph")


def test_settings_of_vectors_are_refused_for_a_classifier(tmp_path: Path) -> None:
    write_encoder(tmp_path / "checkpoint", role="classify")
    with pytest.raises(InputError, match="settings of the task embed, not of classify"):
        export(tmp_path / "checkpoint", out=tmp_path / "graph", normalize=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_input_is_what_there_are_positions_for(family: str) -> None:
    with quietly():  # importing DeBERTa warns before transformers 5.23
        model = ROLES["embed"].from_config(FAMILIES[family])
    assert longest_input(model) == 48


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_task_equals_torch(tmp_path: Path, record_check: Record, family: str, role: str) -> None:
    write_encoder(tmp_path / "checkpoint", family, role)
    task = "classify" if role == "tokens" else role
    choice = choose(tmp_path / "checkpoint")
    assert choice.tasks == (task,)
    name = {"tokens": "classify tokens", "classify": "classify texts"}.get(role, role)
    for dialect in ("ort", "portable"):
        settings = EncoderSettings(dialect, "mean" if role == "embed" else None, role == "embed" or None, None)
        out = tmp_path / dialect
        inputs = {"checkpoint": tmp_path / "checkpoint"}
        arguments: dict[str, Any] = {"out": out, "inputs": inputs, "force": False, "progress": SILENT}
        artifact = export_encoder(tmp_path / "checkpoint", choice, settings, **arguments)
        worst = max(rung["difference"] for rung in artifact.result["parity"])
        record_check(family, f"{name}, {dialect}", worst, worst <= 1e-4, artifact.result["fusions"])
        assert worst <= 1e-5
        assert artifact.result["fusions_refused"] is None
        assert artifact.result["fusions"] == (FUSED if dialect == "ort" else encoder._STANDARD)
        if dialect == "portable":
            onnx.checker.check_model(out / "model.onnx", full_check=True)
            domains = {entry.domain for entry in onnx.load(out / "model.onnx", load_external_data=False).opset_import}
            assert domains == {""}


@pytest.mark.slow
def test_the_shape_of_minilm_l6(tmp_path: Path, record_check: Record) -> None:
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    more = {"vocab_size": 30522, "max_position_embeddings": 512, "initializer_range": 0.05}
    write_encoder(tmp_path / "checkpoint", "BERT", "embed", **sizes, **more)
    artifact = export(tmp_path / "checkpoint", out=tmp_path / "graph")
    worst = max(rung["difference"] for rung in artifact.result["parity"])
    record_check("BERT", "embed, shape of all-MiniLM-L6", worst, worst <= 1e-4, artifact.result["fusions"])
    assert worst <= 1e-4
