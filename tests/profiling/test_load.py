"""Requests are seeded, of exact lengths and distinct; a workload that a build cannot run is refused."""

import pytest

from slmdeploy.errors import InputError
from slmdeploy.profiling.load import check_fits, requests
from slmdeploy.specs import Workload

GENERATE = Workload(name="g", task="generate", prompt_tokens=12, new_tokens=3)
SCORE = Workload(name="s", task="score", prefix_tokens=20, items=4, item_tokens=5)


def test_lengths_and_range():
    for request in requests(GENERATE, 5, vocab_size=64, seed=0):
        assert (request["op"], len(request["prompt_ids"]), request["new_tokens"]) == ("generate", 12, 3)
        assert all(16 <= token < 64 for token in request["prompt_ids"])
    for request in requests(SCORE, 5, vocab_size=64, seed=0):
        assert len(request["prefix_ids"]) == 20
        assert [len(item) for item in request["item_ids"]] == [5, 5, 5, 5]


def test_same_seed_same_requests_and_a_longer_list_only_adds():
    many = requests(SCORE, 6, vocab_size=64, seed=7)
    assert many[:3] == requests(SCORE, 3, vocab_size=64, seed=7)
    assert many != requests(SCORE, 6, vocab_size=64, seed=8)


def test_prompts_are_distinct_within_and_across_workloads():
    other = GENERATE.model_copy(update={"name": "h"})
    prompts = [
        tuple(request["prompt_ids"])
        for one in (GENERATE, other)
        for request in requests(one, 20, vocab_size=64, seed=0)
    ]
    assert len(set(prompts)) == 40


def test_a_tiny_vocabulary_still_gives_ids_inside_it():
    (request,) = requests(GENERATE, 1, vocab_size=4, seed=0)
    assert set(request["prompt_ids"]) <= {2, 3}


def test_check_fits_names_task_and_lengths():
    check_fits(GENERATE, "b", max_length=15, tasks=("generate",))
    with pytest.raises(InputError, match="needs a context of 15 tokens, but b has 14"):
        check_fits(GENERATE, "b", max_length=14, tasks=("generate",))
    with pytest.raises(InputError, match="export it with --task score"):
        check_fits(SCORE, "b", max_length=99, tasks=("generate",))


def test_requests_of_a_hot_workload_share_one_prefix_whatever_the_seed():
    hot = SCORE.model_copy(update={"hot": True})
    made = [*requests(hot, 3, vocab_size=64, seed=0), *requests(hot, 3, vocab_size=64, seed=[1, 2])]
    assert len({tuple(one["prefix_ids"]) for one in made}) == 1
    assert len({str(one["item_ids"]) for one in made}) == 6
