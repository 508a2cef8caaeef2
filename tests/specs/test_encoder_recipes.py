"""Recipes of encoders: told apart from those of decoders, and what cannot go together refused in one sentence."""

from pathlib import Path

import pytest

from slmdeploy import specs
from slmdeploy.errors import SpecError

RECIPE = """
name = "moods"
tasks = ["classify"]
[model]
teacher = "bert"
[data]
source = "reviews.csv"
columns = { text = "review", label = "mood" }
[finetune]
steps = 2
[prune]
layer_ratio = 0.5
[[distill]]
steps = 2
[candidates]
profiles = ["cpu-fp32"]
[[workload]]
name = "short"
task = "classify"
texts = 1
text_tokens = 8
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_an_encoders_recipe_loads_with_the_defaults_of_encoders(tmp_path: Path) -> None:
    recipe = specs.load_recipe(write(tmp_path, RECIPE))
    assert isinstance(recipe, specs.EncoderRecipe)
    assert recipe.finetune == specs.EncoderStage(steps=2)
    assert recipe.data.columns == specs.TextColumns(text="review", label="mood")
    assert recipe.prune is not None
    assert recipe.prune.settings["ratio"] == 0
    assert specs.choose_workloads([], write(tmp_path, RECIPE)) == recipe.workload


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('columns = { text = "review", label = "mood" }', "", "the key 'data.columns' is missing"),
        ('text = "review", ', "", "the key 'data.columns.text' is missing"),
        (', label = "mood"', "", "[finetune] learns from labels: name their column as data.columns.label"),
        ("[finetune]\nsteps = 2", "[finetune]\nstep = 2", "unknown key 'finetune.step': did you mean 'steps'?"),
        ("layer_ratio = 0.5", "hidden_ratio = 0.5", "unknown key 'prune.hidden_ratio'"),
        ("layer_ratio = 0.5", "layer_ratio = 1.0", "prune.layer_ratio = 1.0: input should be less than 1"),
        ("[[distill]]\nsteps = 2", "[[distill]]\nsteps = 2\non_policy = 0.5", "unknown key 'distill.0.on_policy'"),
        ('teacher = "bert"', 'teacher = "bert"\nstudent = "small"', "model.student and [prune] are two ways"),
        ("[prune]\nlayer_ratio = 0.5\n", "", "[[distill]] needs a student"),
        (
            'teacher = "bert"\n',
            'teacher = "bert"\n[budget]\nconstraints = ["size_bytes_ratio <= 0.5"]\n',
            "relative to the teacher, and encoders are measured without it",
        ),
        ('"classify"]', '"generate"]', "tasks.0 = 'generate': input should be 'embed', 'classify' or 'score'"),
        ("texts = 1\ntext_tokens = 8", "texts = 0\ntext_tokens = 8", "workload.0.texts = 0"),
        (
            'task = "classify"\ntexts = 1\ntext_tokens = 8',
            'task = "generate"\nprompt_tokens = 1\nnew_tokens = 1',
            "encoders are measured under embed and classify",
        ),
    ],
)
def test_what_is_wrong_with_an_encoders_recipe_is_said(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in RECIPE
    path = write(tmp_path, RECIPE.replace(old, new))
    with pytest.raises(SpecError) as caught:
        specs.load_recipe(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_student_of_its_own_has_to_learn(tmp_path: Path) -> None:
    own = RECIPE.replace("[prune]\nlayer_ratio = 0.5\n", "").replace("[model]\n", '[model]\nstudent = "small"\n')
    assert specs.load_recipe(write(tmp_path, own)).name == "moods"
    with pytest.raises(SpecError, match=r"model\.student learns in \[\[distill\]\], and there is none"):
        specs.load_recipe(write(tmp_path, own.replace("[[distill]]\nsteps = 2\n", "")))
