"""A trace is read whole or refused with its line."""

import json

import pytest

from slmdeploy.errors import InputError, SpecError
from slmdeploy.profiling.load import context_tokens, requests
from slmdeploy.profiling.trace import read_trace
from slmdeploy.specs import choose_workloads

GOOD = [
    {"arrival_s": 0.0, "prompt_tokens": 3, "new_tokens": 2},
    {"arrival_s": 0.5, "prompt_tokens": 9, "new_tokens": 4},
]


def write(folder, lines, name="day.jsonl"):
    file = folder / name
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_a_trace_is_a_workload_with_lengths_of_its_own(tmp_path):
    (workload,) = choose_workloads([str(write(tmp_path, GOOD))])
    assert (workload.name, workload.task, workload.scenario) == ("day", "generate", "trace")
    made = requests(workload, 5, vocab_size=64, seed=0)
    assert [(len(one["prompt_ids"]), one["new_tokens"]) for one in made] == [(3, 2), (9, 4)]
    assert context_tokens(workload) == 13


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "has 0 lines"),
        (["{", GOOD[0]], ":1: not a line of JSON"),
        ([GOOD[0], {"arrival_s": 1.0, "prompt_tokens": 3}], ":2: 'new_tokens' is missing"),
        ([GOOD[1], GOOD[0]], r":2: arrival_s = 0 is before the line above"),
        ([{**GOOD[0], "arrival_s": -1.0}], "is negative"),
        ([{**GOOD[0], "prompt_tokens": 0}], ":1: prompt_tokens"),
        ([{**GOOD[0], "arrival_s": 1e400}], ":1: arrival_s"),
        ([{**GOOD[0], "user": "me"}], ":1: user"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, lines, words):
    with pytest.raises((InputError, SpecError), match=words):
        read_trace(str(write(tmp_path, lines)), "generate")


def test_a_trace_that_is_not_there_or_of_no_task(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl is no trace"):
        choose_workloads([str(tmp_path / "none.jsonl")])
    with pytest.raises(InputError, match="has none of prompt_tokens"):
        choose_workloads([str(write(tmp_path, [{"arrival_s": 0}]))])


def test_a_file_of_workloads_names_traces_beside_it(tmp_path):
    write(tmp_path, GOOD)
    file = tmp_path / "loads.toml"
    file.write_text('[[workload]]\nname = "replay"\ntask = "generate"\nscenario = "trace"\ntrace = "day.jsonl"\n')
    (workload,) = choose_workloads([str(file)])
    assert workload.trace == str(tmp_path / "day.jsonl")
