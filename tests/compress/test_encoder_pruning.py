"""Pruning of encoders: layers and neurons as ordinary checkpoints, heads as listed shapes that export understands."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from slmdeploy.artifacts import Artifact
from slmdeploy.compress.encoder_verbs import distill_encoder
from slmdeploy.compress.encoders import open_encoder
from slmdeploy.compress.families import ENCODERS
from slmdeploy.compress.prune import prune
from slmdeploy.errors import InputError
from slmdeploy.exporting.export import export
from slmdeploy.runtime.encoder_model import load_encoder
from slmdeploy.specs import EncoderStage, TextColumns
from tests.exporting.encoders import write_encoder, write_modules

COLUMNS = TextColumns(text="text")
NAMES = {"bert": "BERT", "roberta": "RoBERTa", "xlm-roberta": "XLM-R", "electra": "ELECTRA", "distilbert": "DistilBERT"}
DEEP: dict[str, Any] = {"num_hidden_layers": 4, "intermediate_size": 64}
DEEP_DISTIL: dict[str, Any] = {"n_layers": 4, "hidden_dim": 64}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("table") / "texts.jsonl"
    words = ["the", "cat", "sat", "where", "is", "on"]
    lines = [
        f'{{"text": "{" ".join(words[i % 6 :] + words[: i % 5])} {i}", "other": "the cat {i}"}}' for i in range(90)
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


def encoder(folder: Path, family: str = "BERT", role: str = "classify", **changes: Any) -> Path:
    write_encoder(folder, family, role, **(DEEP_DISTIL if family == "DistilBERT" else DEEP) | changes)
    return folder


def run(checkpoint: Path, table: Path, out: Path, **changes: Any) -> Artifact:
    settings: dict[str, Any] = {"ratio": 0.5, "calibration_tokens": 600, "columns": COLUMNS, **changes}
    return prune(checkpoint, out=out, data=table, **settings)


def test_every_family_has_a_test() -> None:
    assert set(NAMES) == set(ENCODERS) - {"camembert"}, "camembert is roberta under another name"


@pytest.mark.parametrize("family", sorted(NAMES.values()))
def test_layers_and_neurons_go_and_transformers_loads_the_rest(tmp_path: Path, table: Path, family: str) -> None:
    dense = encoder(tmp_path / "dense", family)
    made = run(dense, table, tmp_path / "out", layer_ratio=0.25)
    model = AutoModelForSequenceClassification.from_pretrained(made.path)
    sizes = model.config.to_dict()
    assert (sizes.get("num_hidden_layers", sizes.get("n_layers")), len(made.result["removed_layers"])) == (3, 1)
    assert sizes.get("hidden_dim", sizes.get("intermediate_size")) == 32
    assert made.result["kept_per_layer"] == {"kv_heads": 4, "neurons": 32}
    assert made.result["cut_max_difference"] < 1e-4
    assert "layer_shapes" not in sizes


@pytest.mark.parametrize("family", ["BERT", "DistilBERT"])
def test_heads_go_into_listed_shapes_which_export_and_distill_read(tmp_path: Path, table: Path, family: str) -> None:
    dense = encoder(tmp_path / "dense", family)
    made = run(dense, table, tmp_path / "out", attention_ratio=0.5)
    opened = open_encoder(made.path, "classifier", 16)
    assert opened.model.config.layer_shapes[0]["num_attention_heads"] == 2
    graph = export(made.path, out=tmp_path / "graph")
    texts = ["the cat sat", "where is the cat on the"]
    with torch.no_grad():
        logits = opened.outputs(opened.model.eval(), opened.rows(texts, None))
    deployed = load_encoder(graph.path)
    found = deployed.encoder.rows(deployed._codec.rows(texts), "logits")
    assert np.allclose(found, logits.numpy(), atol=1e-4)
    stage = EncoderStage(steps=2, batch_rows=4, length=16)
    taught = distill_encoder(dense, made.path, out=tmp_path / "taught", data=table, columns=COLUMNS, stage=stage)
    again = open_encoder(taught.path, "classifier", 16)
    assert again.model.num_parameters() == opened.model.num_parameters() == made.result["parameters"]["after"]


def test_the_removed_parts_are_those_of_least_error(tmp_path: Path, table: Path) -> None:
    dense = encoder(tmp_path / "dense")
    errors = {}
    for method in ("osscar", "minitron", "magnitude", "random"):
        made = run(dense, table, tmp_path / method, method=method, attention_ratio=0.5)
        errors[method] = [sum(one[f"{side}_error"] for one in made.result["layers"]) for side in ("mlp", "attention")]
    for side in range(2):
        assert errors["osscar"][side] < min(errors[name][side] for name in ("minitron", "magnitude", "random"))


def test_an_embedder_keeps_its_pooling_and_uneven_layers_are_read(tmp_path: Path, table: Path) -> None:
    dense = encoder(tmp_path / "dense", role="embed")
    write_modules(dense, "Normalize", pooling={"pooling_mode_mean_tokens": True})
    made = run(dense, table, tmp_path / "out", columns=TextColumns(text="text", pair="other"))
    assert AutoModel.from_pretrained(made.path).config.intermediate_size == 32
    assert (made.path / "1_Pooling" / "config.json").is_file()
    uneven = run(dense, table, tmp_path / "uneven", allocation="global")
    kept = [len(one["neurons"]) for one in uneven.result["layers"]]
    assert sum(kept) == 128
    assert open_encoder(uneven.path, "embedder", 16).model.num_parameters() == uneven.result["parameters"]["after"]


def test_what_cannot_be_pruned_is_refused(tmp_path: Path, table: Path) -> None:
    dense = encoder(tmp_path / "dense")
    for changes, said in (
        ({"columns": None}, "is an encoder: name the column of the texts"),
        ({"hidden_ratio": 0.5}, "hidden width cannot be pruned, since the residual stream of an encoder"),
        ({"attention_ratio": 0.95}, "removing 0.95 of its 4 KV heads leaves none"),
        ({"columns": TextColumns(text="words")}, "has no column 'words'"),
    ):
        with pytest.raises(InputError, match=said):
            run(dense, table, tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()
