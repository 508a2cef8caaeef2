"""Drafts: what prompt lookup finds, and that a model's draft continues the text whatever became of its guesses."""

import numpy as np
import pytest

from slmdeploy.runtime.drafting import ModelDraft, PromptLookup
from slmdeploy.runtime.generation import Settings
from slmdeploy.runtime.model import Model, load
from tests.graphs import write_tiny_graph


def looked_up(text: list[int], count: int) -> list[int]:
    """What lookup guesses behind a text."""
    lookup = PromptLookup()
    lookup.begin(text[:-1], Settings())
    return list(lookup.propose(text[-1:], count).tokens)


def test_lookup_guesses_what_followed_the_longest_match() -> None:
    assert looked_up([1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3], 3) == [4, 5, 9]
    assert looked_up([1, 2, 8, 1, 2, 9, 1, 2], 1) == [9]  # of two matches of a length the later one


def test_lookup_goes_on_with_a_repetition() -> None:
    assert looked_up([7, 1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert looked_up([5, 5, 5], 4) == [5, 5, 5, 5]


@pytest.mark.parametrize("text", [[1], [1, 2], [1, 2, 3, 4, 5], [1, 2, 3, 2]])
def test_lookup_guesses_nothing_without_a_match(text: list[int]) -> None:
    assert looked_up(text, 5) == []


def test_lookup_forgets_the_sequence_before() -> None:
    lookup = PromptLookup()
    lookup.begin([1, 2, 3, 1], Settings())
    assert lookup.propose([2], 1).tokens == [3]
    lookup.begin([1], Settings())
    assert not lookup.propose([2], 1).tokens


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A draft with a context of 24 tokens."""
    return load(write_tiny_graph(tmp_path_factory.mktemp("graphs") / "small", max_length=24, tasks=("generate",)))


def said(model: Model, text: list[int], count: int) -> list[int]:
    """What a model says behind a text, from the logits of all positions."""
    reader = load(model.path)
    made: list[int] = []
    for _ in range(count):
        made.append(int(np.argmax(reader.logits([*text, *made])[-1])))
    return made


def test_a_draft_goes_on_behind_what_was_kept(small: Model) -> None:
    draft = ModelDraft(small.decoder, 0.1)
    text = [5, 6, 7]
    draft.begin(text, Settings())
    grown = [11]
    for kept, count in ((2, 3), (0, 2), (3, 3), (1, 4), (0, 0), (1, 1)):
        text += grown
        guessed = list(draft.propose(grown, count).tokens)
        assert guessed == said(small, text, count)
        grown = [*guessed[:kept], 17]  # the target keeps so many and then says something else


def test_a_draft_whose_model_was_used_by_others_begins_anew(small: Model) -> None:
    draft = ModelDraft(small.decoder, 0.1)
    draft.begin([5, 6, 7], Settings())
    draft.propose([8], 3)
    small.generate([9, 9, 9, 9], max_new_tokens=2)
    assert list(draft.propose([17], 3).tokens) == said(small, [5, 6, 7, 8, 17], 3)


def test_a_draft_ends_with_its_context(small: Model) -> None:
    draft = ModelDraft(small.decoder, 0.1)
    draft.begin([5] * 20, Settings())
    assert len(draft.propose([6], 8).tokens) == 3
    assert not draft.propose([7, 8, 9], 8).tokens
    assert not draft.propose([7], 8).tokens


def test_drawn_guesses_come_with_the_odds_that_they_were_drawn_from(small: Model) -> None:
    draft = ModelDraft(small.decoder, 0.1)
    draft.begin([5, 6], Settings(temperature=0.9, top_k=5, seed=1))
    proposal = draft.propose([7], 4)
    assert len(proposal.odds) == 4
    for token, odds in proposal.places():
        assert odds is not None
        assert odds.tokens.size == 5
        assert odds.of(token) > 0
