"""tasks.py: what each class of checkpoint is taken for, what it can be asked for, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.errors import InputError, UnsupportedModelError
from slmdeploy.exporting.tasks import choose

ONE, THREE = {"id2label": {"0": "relevant"}}, {"id2label": {"0": "a", "1": "b", "2": "c"}}
OLD_CROSS_ENCODER = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
NEW_CROSS_ENCODER = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}


def checkpoint(folder: Path, architecture: str | None, modules: bool = False, **config: Any) -> Path:
    names = {} if architecture is None else {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(names | config))
    if modules:
        (folder / "modules.json").write_text("[]")
    return folder


@pytest.mark.parametrize(
    ("architecture", "config", "tasks", "role"),
    [
        ("LlamaForCausalLM", {}, ("generate",), "decoder"),
        ("GPT2LMHeadModel", {}, ("generate",), "decoder"),
        ("Gemma3ForConditionalGeneration", {}, ("generate",), "decoder"),
        ("BertModel", {}, ("embed",), "embedder"),
        ("BertForMaskedLM", {"modules": True}, ("embed",), "embedder"),
        ("Qwen3ForCausalLM", {"modules": True}, ("embed",), "embedder"),
        (None, {"modules": True}, ("embed",), "embedder"),
        ("BertForSequenceClassification", {}, ("classify",), "sequence classifier"),
        ("BertForSequenceClassification", THREE, ("classify",), "sequence classifier"),
        ("BertForSequenceClassification", ONE, ("score",), "sequence classifier"),
        ("BertForSequenceClassification", {"num_labels": 1}, ("score",), "sequence classifier"),
        ("BertForSequenceClassification", {**ONE, "modules": True}, ("score",), "sequence classifier"),
        ("BertForSequenceClassification", OLD_CROSS_ENCODER, ("score",), "sequence classifier"),
        ("BertForSequenceClassification", NEW_CROSS_ENCODER, ("score",), "sequence classifier"),
        ("BertForSequenceClassification", {**THREE, **NEW_CROSS_ENCODER}, ("classify",), "sequence classifier"),
        ("DebertaV2ForTokenClassification", ONE, ("classify",), "token classifier"),
    ],
)
def test_the_class_says_what_a_checkpoint_is_for(
    tmp_path: Path, architecture: str | None, config: dict[str, Any], tasks: tuple[str, ...], role: str
) -> None:
    choice = choose(checkpoint(tmp_path, architecture, **config))
    assert (choice.tasks, choice.role) == (tasks, role)


@pytest.mark.parametrize(
    ("architecture", "tasks"),
    [
        ("LlamaForCausalLM", ("generate", "score")),
        ("LlamaForCausalLM", ("score",)),
        ("BertForMaskedLM", ("embed",)),
        ("BertForSequenceClassification", ("score", "classify")),
        (None, ("generate",)),
    ],
)
def test_what_it_can_do_may_be_asked_for(tmp_path: Path, architecture: str | None, tasks: tuple[str, ...]) -> None:
    assert choose(checkpoint(tmp_path, architecture), tasks).tasks == tasks


@pytest.mark.parametrize(
    ("architecture", "config", "tasks", "message"),
    [
        ("BertModel", {}, ("generate",), r"\['BertModel'\] is no model for the task generate; it can embed"),
        ("LlamaForCausalLM", {}, ("generate", "embed"), "no model for the task embed; it can generate and score"),
        ("BertForSequenceClassification", THREE, ("score",), "no model for the task score; it can classify"),
        ("BertForTokenClassification", {}, ("embed",), "no model for the task embed; it can classify"),
        ("BertForMaskedLM", {}, None, "has a head that no task uses; give --task embed"),
        ("BertForQuestionAnswering", {}, None, "does not say what to export; known are classes that end in"),
        (None, {}, None, "architectures = None does not say what to export"),
        (None, {}, ("classify",), "architectures = None does not say what to export"),
        ("LlamaForCausalLM", {}, ("rank",), "task 'rank' is not known"),
        ("LlamaForCausalLM", {}, ("score", "score"), "give a list of different ones"),
        ("LlamaForCausalLM", {}, "score", "give a list of different ones"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(
    tmp_path: Path, architecture: str | None, config: dict[str, Any], tasks: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        choose(checkpoint(tmp_path, architecture, **config), tasks)


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "BartForSequenceClassification"])
def test_an_encoder_and_decoder_is_refused_by_the_field_that_says_so(tmp_path: Path, architecture: str) -> None:
    folder = checkpoint(tmp_path, architecture, is_encoder_decoder=True)
    with pytest.raises(UnsupportedModelError, match=r"config\.json: is_encoder_decoder = True"):
        choose(folder, ("classify",))
