"""Tasks are found by name and pattern; what is unknown, broken or not for a text model is one sentence."""

from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from slmdeploy.errors import InputError
from slmdeploy.evaluation.catalogue import Catalogue

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def catalogue(own_tasks_only: None, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text('{"q": "one"}\n')
    for name in ("bakery_rolls", "bakery_bread"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder))
    (folder / "lost.yaml").write_text(TASK.format(name="lost_data", folder=folder / "nowhere"))
    (folder / "unsafe.yaml").write_text(TASK.format(name="unsafe_code", folder=folder) + "unsafe_code: true\n")
    return Catalogue(folder)


def test_names_and_patterns_are_found_once_each(catalogue: Catalogue) -> None:
    assert catalogue.names(["bakery_rolls", "bakery_*"]) == ["bakery_rolls", "bakery_bread"]


def test_an_unknown_task_is_answered_with_near_ones(catalogue: Catalogue) -> None:
    with pytest.raises(InputError, match=r"no task 'bakery_role': did you mean 'bakery_rolls'"):
        catalogue.names(["bakery_role"])
    with pytest.raises(InputError, match=r"no task '#####'; `lm-eval ls tasks` lists"):
        catalogue.names(["#####"])
    with pytest.raises(InputError, match="there are no tasks"):
        catalogue.names([])


def test_a_task_is_loaded_with_its_data(catalogue: Catalogue) -> None:
    (task,) = catalogue.load(["bakery_rolls"])["tasks"].values()
    assert list(task.test_docs()) == [{"q": "one"}]


def test_what_cannot_be_loaded_is_one_sentence(catalogue: Catalogue) -> None:
    with pytest.raises(InputError, match=r"lost_data cannot be loaded \(FileNotFoundError: "):
        catalogue.load(["lost_data"])
    with pytest.raises(InputError, match="unsafe_code runs code that the model writes"):
        catalogue.load(["unsafe_code"])


def test_a_folder_of_tasks_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        Catalogue(tmp_path / "nowhere")
