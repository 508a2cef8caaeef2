"""sentence.py: the modules of a sentence-transformers folder, old form and new, and what is refused of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.errors import CorruptArtifactError, InputError, UnsupportedModelError
from slmdeploy.exporting.sentence import NORMALIZE, Dense, Head, read_head, write_head
from tests.exporting.encoders import write_json, write_modules

NO_MEAN = {"pooling_mode_mean_tokens": False}
DENSE = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}


def test_a_checkpoint_that_is_no_such_folder_is_pooled_by_the_mean(tmp_path: Path) -> None:
    assert read_head(tmp_path) == Head("mean", ())


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({}, "mean"),
    ],
)
def test_the_pooling_is_the_folders(tmp_path: Path, pooling: dict[str, Any], mode: str) -> None:
    write_modules(tmp_path, "Normalize", pooling=pooling)
    head = read_head(tmp_path)
    assert (head.pooling, head.steps, head.normalized) == (mode, (NORMALIZE,), True)


def test_everything_that_a_folder_may_say(tmp_path: Path) -> None:
    write_modules(tmp_path, "Dense", "Normalize")
    write_json(tmp_path / "2_Dense" / "config.json", DENSE)
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False})
    prompts = {"query": "query: ", "passage": ""}
    write_json(tmp_path / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "query"})
    head = read_head(tmp_path)
    assert head.steps == (Dense(tmp_path / "2_Dense", 32, 8, True, "Identity"), NORMALIZE)
    assert (head.max_length, head.prompts, head.default_prompt) == (128, prompts, "query")
    write_head(tmp_path, head, 32, tmp_path / "graph")
    written = {str(f.relative_to(tmp_path / "graph")) for f in (tmp_path / "graph").rglob("*") if f.is_file()}
    assert written == {
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    }


def test_what_a_caller_sets_is_what_is_written(tmp_path: Path) -> None:
    write_modules(tmp_path, "Normalize", pooling={"pooling_mode": "mean"})
    head = read_head(tmp_path)
    assert head.changed(None, None) == head
    assert head.changed(None, True) == head
    changed = head.changed("cls", False)
    (tmp_path / "graph").mkdir()
    write_head(tmp_path, changed, 32, tmp_path / "graph")
    again = read_head(tmp_path / "graph")
    assert (again.pooling, again.normalized) == ("cls", False)


def test_a_folder_is_made_of_a_checkpoint_that_was_none(tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    write_head(tmp_path, read_head(tmp_path).changed("last", True), 32, tmp_path / "graph")
    again = read_head(tmp_path / "graph")
    assert (again.pooling, again.steps) == ("last", (NORMALIZE,))
    types = [module["type"] for module in json.loads((tmp_path / "graph" / "modules.json").read_text())]
    assert types == [f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling_mode = 'max' is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "one of them"),
        (
            "1_Pooling/config.json",
            {**NO_MEAN, "pooling_mode_weightedmean_tokens": True},
            r"\['weightedmean'\] is not supported",
        ),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling_mode_mean_tokens = None"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt = False"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case = True"),
        ("sentence_bert_config.json", {"max_seq_length": "many"}, "max_seq_length = 'many'"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task = 'fill-mask'"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "default_prompt_name = 'query'"),
        ("config_sentence_transformers.json", {"prompts": {"query": 1}}, "prompts = "),
        ("2_Dense/config.json", {**DENSE, "activation_function": "mine.Act"}, "activation_function = 'mine.Act'"),
        ("2_Dense/config.json", {**DENSE, "use_residual": True}, "use_residual = True"),
        ("2_Dense/config.json", {"in_features": 32}, "in_features, out_features"),
        ("modules.json", [{"type": "mine.Pooling", "path": ""}], "code that comes along is never run"),
        ("modules.json", [{"type": "sentence_transformers.models.WordEmbeddings", "path": ""}], "WordEmbeddings"),
    ],
)
def test_what_would_change_the_vector_is_refused_by_name(
    tmp_path: Path, name: str, value: object, message: str
) -> None:
    write_modules(tmp_path, "Dense")
    write_json(tmp_path / "2_Dense" / "config.json", DENSE)
    write_json(tmp_path / name, value)
    with pytest.raises(UnsupportedModelError, match=message):
        read_head(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    write_modules(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(InputError, match=r"1_Pooling/config\.json is missing"):
        read_head(tmp_path)
    write_json(tmp_path / "modules.json", [{"type": "sentence_transformers.models.Transformer", "path": "../x"}])
    with pytest.raises(CorruptArtifactError, match=r"path = '\.\./x' is no folder"):
        read_head(tmp_path)
    write_json(tmp_path / "modules.json", {"type": 1})
    with pytest.raises(CorruptArtifactError, match="is no list of modules"):
        read_head(tmp_path)
