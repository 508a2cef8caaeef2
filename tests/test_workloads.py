"""Names of workloads say them in full, and keys that do not go together are refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from slmdeploy.errors import InputError, SpecError
from slmdeploy.specs import Workload, choose_workloads, named_workload
from slmdeploy.specs.workloads import SUGGESTED

SCORE = {"name": "s", "task": "score", "prefix_tokens": 8, "items": 2, "item_tokens": 2}


@pytest.mark.parametrize("name", SUGGESTED)
def test_every_suggested_name_is_one(name: str) -> None:
    assert named_workload(name).name == name


def test_names_say_lengths_arrivals_and_batches() -> None:
    score = named_workload("score-512-32x16-hot")
    assert (score.task, score.prefix_tokens, score.items, score.item_tokens, score.hot) == ("score", 512, 32, 16, True)
    server = named_workload("generate-128-64-server-2.5-batch-4-sweep")
    assert (server.scenario, server.rate_per_s, server.batch, server.sweep) == ("server", 2.5, 4, True)
    clients = named_workload("embed-8x128-concurrent-16")
    assert (clients.texts, clients.text_tokens, clients.concurrency) == (8, 128, 16)
    assert named_workload("classify-32-offline").texts == 1
    assert not named_workload("score-512-32x16").hot


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("generate-128", "there is no workload 'generate-128': write one like generate-128-64"),
        ("generate-128-64-hot", "there is no workload"),
        ("score-0-1x1", "greater than 0"),
        ("generate-128-64-server-0", "greater than 0"),
        ("generate-128-64-batch-4", "batch goes with several requests"),
        ("score-8-2x2-offline-batch-4", "batch goes with several requests"),
        ("generate-8-8-offline-sweep", "sweep goes with"),
    ],
)
def test_names_that_say_nothing_possible_are_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        named_workload(name)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"scenario": "server"}, "needs rate_per_s"),
        ({"rate_per_s": 3.0}, "'single-stream' does not take rate_per_s"),
        ({"scenario": "concurrent"}, "needs concurrency"),
        ({"scenario": "trace"}, "does not take prefix_tokens"),
        ({"goodput": {"speed": 3.0}}, "goodput"),
        ({"new_tokens": 3}, "does not take new_tokens"),
    ],
)
def test_keys_that_do_not_go_together(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Workload.model_validate(SCORE | fields)


def test_a_file_of_workloads(tmp_path: Path) -> None:
    file = tmp_path / "loads.toml"
    file.write_text('[[workload]]\nname = "a"\ntask = "embed"\ntexts = 2\ntext_tokens = 8\n')
    assert [workload.name for workload in choose_workloads([str(file), "embed-16"])] == ["a", "embed-16"]
    file.write_text("[[workloads]]\n")
    with pytest.raises(SpecError, match="did you mean 'workload'"):
        choose_workloads([str(file)])
