"""An encoder's recipe: its verbs in order, each once, and the whole way to a package that was tried."""

import json
import random
from pathlib import Path

import pytest

from slmdeploy import pipeline
from slmdeploy.checkpoint import read_config
from slmdeploy.encoder_pipeline import compress_encoder
from slmdeploy.errors import InputError
from slmdeploy.progress import SILENT
from slmdeploy.specs import EncoderRecipe, load_recipe
from tests.exporting.encoders import write_encoder

RECIPE = """
name = "moods"
tasks = ["classify"]
[model]
teacher = "bert"
[data]
source = "reviews.csv"
columns = { text = "review", label = "mood" }
[finetune]
steps = STEPS
batch_rows = 16
length = 16
learning_rate = 3e-3
[prune]
layer_ratio = 0.34
ratio = 0.5
calibration_tokens = 512
[[distill]]
steps = STEPS
batch_rows = 16
length = 16
learning_rate = 3e-3
[candidates]
profiles = ["cpu-fp32", "cpu-int8"]
[[workload]]
name = "short"
task = "classify"
texts = 2
text_tokens = 8
requests = 2
[budget]
constraints = ["encode_ms_p50 <= 1e9"]
objective = "smallest"
"""


def project(folder: Path, recipe: str = RECIPE, steps: int = 2) -> Path:
    """A tiny BERT, reviews whose mood one word tells, and the recipe; returns the recipe's path."""
    write_encoder(folder / "bert", initializer_range=0.05, num_hidden_layers=3, intermediate_size=64)
    chance, lines = random.Random(0), ["review,mood"]
    for _ in range(100):
        good = chance.random() < 0.5
        words = [*chance.choices(["the", "is", "on", "where", "a", "b"], k=5), "cat" if good else "sat"]
        chance.shuffle(words)
        lines.append(f"{' '.join(words)},{'good' if good else 'bad'}")
    (folder / "reviews.csv").write_text("\n".join(lines) + "\n")
    (folder / "recipe.toml").write_text(recipe.replace("STEPS", str(steps)))
    return folder / "recipe.toml"


def compressed(recipe: Path, teacher: Path) -> tuple[pipeline.Outcome, Path]:
    """What the compression of a recipe's encoder did, and the checkpoint that it made."""
    spec = load_recipe(recipe)
    assert isinstance(spec, EncoderRecipe)
    steps = pipeline._Steps(pipeline.Outcome(spec.name, recipe.parent / "run"), lambda text: None)
    student, texts = compress_encoder(spec, recipe, teacher, recipe.parent / "run", steps.do, SILENT)
    assert texts == recipe.parent / "run" / "texts"
    return steps.outcome, student


def test_the_teacher_learns_is_cut_and_teaches(tmp_path: Path) -> None:
    recipe = project(tmp_path)
    outcome, student = compressed(recipe, tmp_path / "bert")
    assert [step.name for step in outcome.steps] == ["texts", "finetune", "prune", "distill 1"]
    config = read_config(student)
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 32)
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert config["architectures"] == ["BertForSequenceClassification"]
    again, _ = compressed(recipe, tmp_path / "bert")
    assert all(step.reused for step in again.steps)


def test_a_student_of_its_own_learns_from_the_teacher_as_it_is(tmp_path: Path) -> None:
    text = RECIPE.replace('teacher = "bert"', 'teacher = "bert"\nstudent = "small"').replace('"classify"', '"embed"')
    text = text.replace(', label = "mood"', "")
    for name in ("finetune", "prune"):
        start = text.index(f"[{name}]")
        text = text[:start] + text[text.index("[", start + 1) :]
    recipe = project(tmp_path, text)
    write_encoder(tmp_path / "small", num_hidden_layers=1)
    outcome, student = compressed(recipe, tmp_path / "bert")
    assert [step.name for step in outcome.steps] == ["texts", "distill 1"]
    assert read_config(student)["num_hidden_layers"] == 1


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    recipe = project(tmp_path, RECIPE.replace("reviews.csv", "nowhere.csv"))
    with pytest.raises(InputError, match=r"data\.source = 'nowhere\.csv' is no file or folder beside it"):
        compressed(recipe, tmp_path / "bert")
    assert not (tmp_path / "run").exists()


def test_the_shipped_example_is_a_recipe_of_an_encoder() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "examples" / "encoder.toml")
    assert isinstance(recipe, EncoderRecipe)
    assert (recipe.finetune is not None, recipe.prune is not None, len(recipe.distill)) == (True, True, 1)


@pytest.mark.slow
def test_a_run_goes_from_labels_to_a_package_that_was_tried(tmp_path: Path) -> None:
    recipe = project(tmp_path, steps=60)
    outcome = pipeline.run(recipe, tmp_path / "run")
    names = ["texts", "finetune", "prune", "distill 1", "export", "build cpu-fp32", "build cpu-int8"]
    assert [step.name for step in outcome.steps] == [*names, "profile", "select", "package", "report"]
    assert {row["build"] for row in outcome.rows} == {"cpu-fp32", "cpu-int8"}
    assert outcome.feasible
    assert outcome.trial is not None
    assert outcome.trial["torch_importable"] is False
    assert outcome.trial["label"]["label"] == ("good" if "cat" in outcome.trial["classified"] else "bad")
    result = json.loads((tmp_path / "run" / "distilled-1" / "manifest.json").read_text())["result"]
    assert result["valid"]["after"]["agreement"] == 1.0
    again = pipeline.run(recipe, tmp_path / "run")
    assert all(step.reused for step in again.steps)
