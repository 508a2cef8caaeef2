"""Encoders trained on tables of texts: fine-tuning, distillation of classifiers and embedders, and what is refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from slmdeploy.compress.encoder_verbs import _wanted, distill_encoder, finetune
from slmdeploy.compress.encoders import open_encoder, pooled, read_pooling
from slmdeploy.compress.labelled import Labels
from slmdeploy.errors import InputError, SpecError, UnsupportedModelError
from slmdeploy.specs import EncoderStage, TextColumns, encoder_stage
from tests.exporting.encoders import write_encoder, write_json, write_modules

COLUMNS = TextColumns(text="review", label="mood")
STAGE = EncoderStage(steps=60, batch_rows=16, length=16, learning_rate=3e-3)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews whose mood is told by one word."""
    file, chance = tmp_path_factory.mktemp("table") / "reviews.csv", random.Random(0)
    words = ["the", "is", "on", "where", "a", "b", "c"]
    lines = ["review,other,mood,score"]
    for _ in range(200):
        good = chance.random() < 0.5
        text = [*chance.choices(words, k=5), "cat" if good else "sat"]
        chance.shuffle(text)
        lines.append(f"{' '.join(text)},the {chance.choice(words)},{'good' if good else 'bad'},{0.9 if good else 0.1}")
    file.write_text("\n".join(lines) + "\n")
    return file


def encoder(folder: Path, role: str = "embed", **changes: Any) -> Path:
    write_encoder(folder, role=role, **{"initializer_range": 0.05, **changes})
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, table: Path) -> Any:
    """A BERT without a head that learnt the moods."""
    folder = tmp_path_factory.mktemp("teacher")
    return finetune(encoder(folder / "base"), out=folder / "out", data=table, columns=COLUMNS, stage=STAGE)


def test_an_encoder_becomes_a_classifier_from_labels_alone(teacher: Any) -> None:
    found = teacher.result["valid"]
    assert found["after"]["accuracy"] == 1.0 > found["before"]["accuracy"]
    assert {"classifier.weight", "classifier.bias"} <= set(teacher.result["new_tensors"])
    model = AutoModelForSequenceClassification.from_pretrained(teacher.path)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert (teacher.path / "tokenizer.json").is_file()


def test_a_smaller_student_agrees_with_its_teacher(tmp_path: Path, table: Path, teacher: Any) -> None:
    student = encoder(tmp_path / "student", num_hidden_layers=1, intermediate_size=32)
    columns = TextColumns(text="review")
    made = distill_encoder(teacher.path, student, out=tmp_path / "out", data=table, columns=columns, stage=STAGE)
    before, after = made.result["valid"]["before"], made.result["valid"]["after"]
    assert after["agreement"] == 1.0
    assert after["distance"] < 0.1 * before["distance"]
    assert "accuracy" not in after
    assert AutoModelForSequenceClassification.from_pretrained(made.path).config.id2label == {0: "bad", 1: "good"}


def test_pairs_with_scores_make_a_cross_encoder_of_one_output(tmp_path: Path, table: Path) -> None:
    columns = TextColumns(text="review", pair="other", label="score")
    made = finetune(encoder(tmp_path / "base"), out=tmp_path / "out", data=table, columns=columns, stage=STAGE)
    assert made.result["valid"]["after"]["label_loss"] < 0.8 * made.result["valid"]["before"]["label_loss"]
    model = AutoModelForSequenceClassification.from_pretrained(made.path)
    assert model.config.num_labels == 1
    student = encoder(tmp_path / "student", "score", num_hidden_layers=1)
    taught = distill_encoder(
        made.path,
        student,
        out=tmp_path / "taught",
        data=table,
        columns=columns,
        stage=STAGE.model_copy(update={"ce_share": 0.2}),
    )
    valid = taught.result["valid"]
    assert valid["after"]["distance"] < 0.2 * valid["before"]["distance"]


@pytest.mark.parametrize(("loss", "width"), [("cosine", 32), ("mse", 32), ("relation", 16)])
def test_an_embedder_learns_its_teachers_vectors(tmp_path: Path, table: Path, loss: Any, width: int) -> None:
    big = encoder(tmp_path / "big", num_hidden_layers=3)
    write_modules(big, "Normalize", pooling={"pooling_mode_mean_tokens": True})
    small = encoder(tmp_path / "small", num_hidden_layers=1, hidden_size=width, initializer_range=0.2)
    write_modules(small, "Normalize", pooling={"pooling_mode_mean_tokens": True})
    stage = STAGE.model_copy(update={"loss": loss})
    columns = TextColumns(text="review")
    made = distill_encoder(big, small, out=tmp_path / "out", data=table, columns=columns, stage=stage)
    valid = made.result["valid"]
    assert valid["after"]["distance"] < 0.5 * valid["before"]["distance"]
    assert AutoModel.from_pretrained(made.path).config.hidden_size == width
    assert json.loads((made.path / "modules.json").read_text())[2]["type"].endswith("Normalize")
    assert (made.path / "1_Pooling" / "config.json").is_file()


def test_vectors_do_not_depend_on_padding(tmp_path: Path) -> None:
    one = open_encoder(encoder(tmp_path / "one"), "embedder", 16)
    one.model.eval()
    with torch.no_grad():
        both = one.outputs(one.model, one.rows(["the cat", "the cat sat on the cat"], None))
        alone = one.outputs(one.model, one.rows(["the cat"], None))
    assert torch.allclose(both[0], alone[0], atol=1e-5)
    states, mask = torch.arange(12.0).reshape(1, 3, 4), torch.tensor([[1, 1, 0]])
    assert pooled(states, mask, "mean").tolist() == [[2, 3, 4, 5]]
    assert pooled(states, mask, "cls").tolist() == [[0, 1, 2, 3]]


def test_a_killed_training_goes_on_to_the_same_weights(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slmdeploy.compress.encoder_training import EncoderTrainer

    base = encoder(tmp_path / "base")
    stage = STAGE.model_copy(update={"steps": 4, "save_steps": 2})
    whole = finetune(base, out=tmp_path / "whole", data=table, columns=COLUMNS, stage=stage)
    loss = EncoderTrainer.compute_loss

    def killed(self: Any, *rest: Any, **named: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return loss(self, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(EncoderTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(base, out=tmp_path / "out", data=table, columns=COLUMNS, stage=stage)
    resumed = finetune(base, out=tmp_path / "out", data=table, columns=COLUMNS, stage=stage)
    assert resumed.result["resumed_from_step"] == 2
    name = "model.safetensors"
    assert resumed.manifest["files"][name] == whole.manifest["files"][name]


def test_a_diverging_training_keeps_the_last_good_model(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slmdeploy.compress import encoder_training

    monkeypatch.setattr(encoder_training, "label_loss", lambda made, targets: made.sum() * float("nan"))
    base = encoder(tmp_path / "base")
    with pytest.raises(InputError, match="training diverged: the loss is nan at step 1; lower learning_rate"):
        finetune(base, out=tmp_path / "out", data=table, columns=COLUMNS, stage=STAGE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "columns", "said"),
    [
        ("review,mood\nthe cat,good\nthe sat,good\n", {}, "has only the label 'good': it needs at least two"),
        ("review,mood\n", {}, r"t\.csv is empty"),
        ("", {}, r"t\.csv (is empty|cannot be read)"),
        ("review,mood\nthe cat,good\n,bad\n", {}, "record 2 has no text in 'review'"),
        ("review,mood\nthe cat,good\nthe sat,\n", {}, "record 2 has no label in 'mood'"),
        ("text,mood\nthe cat,good\n", {}, "has no column 'review': it has mood, text"),
        ("review,mood\nthe cat,0.5\nthe sat,2.5\n", {}, "label 2.5 is no score between 0 and 1"),
        ("review,mood\nthe cat,good\n", {"label": None}, "finetune learns from labels"),
    ],
)
def test_unfit_tables_are_refused(tmp_path: Path, content: str, columns: dict[str, Any], said: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    base = encoder(tmp_path / "base")
    with pytest.raises(InputError, match=said):
        finetune(
            base,
            out=tmp_path / "out",
            data=tmp_path / "t.csv",
            columns=COLUMNS.model_copy(update=columns),
            stage=STAGE,
        )
    assert not (tmp_path / "out").exists()


def test_models_and_losses_that_do_not_fit_are_refused(tmp_path: Path, table: Path, teacher: Any) -> None:
    plain, head = encoder(tmp_path / "plain"), encoder(tmp_path / "head", "classify", num_hidden_layers=1)
    wide = encoder(tmp_path / "wide", hidden_size=64)
    text = TextColumns(text="review")
    for pair, columns, changes, said in (
        ((plain, head), text, {}, "fine-tune the teacher on labels first"),
        ((head, teacher.path), text, {}, "swap the two"),
        ((wide, plain), text, {}, "which only the loss relation compares"),
        ((wide, plain), COLUMNS, {"loss": "relation"}, "leave the label column out"),
        ((teacher.path, head), text, {"loss": "cosine"}, "loss cosine is none of a classifier: use one of kl, mse"),
        ((teacher.path, head), text, {"relation_weight": 1.0}, "relation_weight belongs to embedders"),
        ((teacher.path, head), text, {"ce_share": 0.5}, "ce_share = 0.5 needs labels"),
        ((teacher.path, head), text, {"length": 64}, "length = 64 is more than the 48 positions"),
        ((teacher.path, head), TextColumns(text="review", label="other"), {}, "is none of the model's: bad, good"),
    ):
        stage = STAGE.model_copy(update=changes)
        with pytest.raises(InputError, match=said):
            distill_encoder(*pair, out=tmp_path / "out", data=table, columns=columns, stage=stage)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="loss belongs to distillation"):
        finetune(plain, out=tmp_path / "out", data=table, columns=COLUMNS, stage=EncoderStage(steps=1, loss="kl"))
    with pytest.raises(SpecError, match="does not take on_policy"):
        encoder_stage(steps=1, on_policy=0.5)


def test_poolings_that_are_not_trained_are_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, "Dense", pooling={"pooling_mode_mean_tokens": True})
    with pytest.raises(UnsupportedModelError, match="modules Transformer, Pooling, Dense are not trained here"):
        read_pooling(tmp_path)
    write_modules(tmp_path, pooling={"pooling_mode_max_tokens": True})
    with pytest.raises(UnsupportedModelError, match="only mean and cls"):
        read_pooling(tmp_path)
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode": "cls"})
    assert read_pooling(tmp_path) == "cls"


def test_a_head_of_many_classes_is_kept_however_its_names_are_ordered(tmp_path: Path) -> None:
    names = {str(number): f"class {number:02}" for number in range(12)}
    base = encoder(tmp_path / "base", "classify", id2label=names)
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", config | {"id2label": dict(sorted(names.items()))})
    assert _wanted(base, Labels(tuple(names.values()))) is None
    assert _wanted(base, Labels(("a", "b"))) == ("a", "b")
    write_json(base / "config.json", config | {"id2label": ["a", "b"]})
    with pytest.raises(InputError, match="id2label is no object of names by number"):
        _wanted(base, Labels(("a", "b")))


def test_what_an_earlier_head_was_for_does_not_outlive_it(tmp_path: Path, table: Path) -> None:
    base = encoder(tmp_path / "base", "classify", problem_type="multi_label_classification")
    stage = STAGE.model_copy(update={"steps": 1})
    made = finetune(base, out=tmp_path / "out", data=table, columns=COLUMNS, stage=stage)
    assert json.loads((made.path / "config.json").read_text())["problem_type"] == "single_label_classification"
    columns = TextColumns(text="review", label="score")
    scorer = finetune(base, out=tmp_path / "scorer", data=table, columns=columns, stage=stage)
    assert json.loads((scorer.path / "config.json").read_text()).get("problem_type") is None


def test_a_teacher_of_several_labels_teaches_logits_alone(tmp_path: Path, table: Path) -> None:
    names = {"0": "a", "1": "b", "2": "c"}
    several = encoder(tmp_path / "several", "classify", problem_type="multi_label_classification", id2label=names)
    student = encoder(tmp_path / "student", num_hidden_layers=1)
    stage = STAGE.model_copy(update={"steps": 1})
    columns = TextColumns(text="review")
    with pytest.raises(InputError, match="gives a text several labels, which only the loss mse"):
        distill_encoder(several, student, out=tmp_path / "out", data=table, columns=columns, stage=stage)
    stage = stage.model_copy(update={"loss": "mse"})
    made = distill_encoder(several, student, out=tmp_path / "out", data=table, columns=columns, stage=stage)
    assert json.loads((made.path / "config.json").read_text())["problem_type"] == "multi_label_classification"


def test_a_token_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    opened = open_encoder(encoder(tmp_path / "small", vocab_size=40), "embedder", 16)
    assert opened.rows(["a b"], None)["input_ids"].shape == (1, 4)
    with pytest.raises(InputError, match=r"a text has the token 'the', number 59, and .*small has a vocabulary of 40"):
        opened.rows(["the a"], None)
