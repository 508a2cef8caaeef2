"""A choice alone: what it makes of logits, what it tells, and when it ends."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmdeploy.runtime.choices import Choice, constrained, log_probabilities, most_probable
from slmdeploy.runtime.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.requests import ChoiceDone, TokenEvent
from tests.runtime.receivers import generation

END = 1


def logits_for(token: int, vocab: int = 272) -> npt.NDArray[np.float32]:
    """Logits whose best token is this one."""
    logits = np.zeros(vocab, np.float32)
    logits[token] = 5
    return logits


def choice(model: Model, **options: object) -> Choice:
    return Choice(generation((0, 5), **options), 0, model.codec, model.runtime)


def test_an_end_token_ends_it_and_is_not_told(model: Model) -> None:
    one = choice(model)
    event = one.take(logits_for(40))
    assert event == TokenEvent(0, 40, model.tokenizer.decode([40]))
    assert one.take(logits_for(END)) is None
    assert (one.finish, one.token_ids) == ("stop", [40])


def test_end_tokens_are_like_others_where_they_are_to_be_ignored(model: Model) -> None:
    one = choice(model, ignore_eos=True, max_new_tokens=2)
    assert one.take(logits_for(END)) == TokenEvent(0, END, "")
    assert one.finish is None
    one.take(logits_for(40))
    assert one.finish == "length"


def test_it_ends_where_the_context_does(model: Model) -> None:
    one = Choice(generation((3,) * 62, max_new_tokens=50), 0, model.codec, model.runtime)
    one.take(logits_for(40))
    assert one.finish is None
    one.take(logits_for(41))
    assert one.finish == "length"


def test_text_that_is_held_back_comes_with_the_end(model: Model) -> None:
    ids = model.tokenizer.encode("xab", add_special_tokens=False).ids
    one = choice(model, stop=["abc"])
    texts = [event.text for token in ids if (event := one.take(logits_for(token))) is not None]
    assert texts == ["x", "", ""]
    assert one.done("length") == ChoiceDone(0, "length", "ab")
    stopped = choice(model, stop=["abc"])
    for token in [*ids, *model.tokenizer.encode("c", add_special_tokens=False).ids]:
        stopped.take(logits_for(token))
    assert stopped.finish == "stop"
    assert stopped.done("stop") == ChoiceDone(0, "stop", "")


def test_a_character_that_never_becomes_whole_is_marked(model: Model) -> None:
    one = choice(model)
    (lead, *_) = model.tokenizer.encode("é", add_special_tokens=False).ids
    event = one.take(logits_for(lead))
    assert event is not None
    assert event.text == ""
    assert one.done("length").text == "\N{REPLACEMENT CHARACTER}"


class Fixed:
    """Allows what it was given."""

    finished = False

    def __init__(self, allowed: npt.NDArray[np.bool_]) -> None:
        self._allowed = allowed

    def allowed(self) -> npt.NDArray[np.bool_]:
        return self._allowed

    def accept(self, token: int) -> None:
        assert self._allowed[token]


def test_constraints_that_cannot_be_are_errors() -> None:
    with pytest.raises(InputError, match=r"shape \(5,\) does not fit a vocabulary of 272"):
        constrained(logits_for(3), Fixed(np.ones(5, np.bool_)))
    with pytest.raises(InputError, match="allows no token here"):
        constrained(logits_for(3), Fixed(np.zeros(272, np.bool_)))


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 2.0}])
def test_sampling_never_leaves_a_constraint(model: Model, options: dict[str, float]) -> None:
    mask = np.zeros(272, np.bool_)
    mask[[7, 9]] = True
    one = choice(model, temperature=3.0, seed=2, max_new_tokens=30, constraint=lambda: Fixed(mask), **options)
    random = np.random.default_rng(0)
    for _ in range(30):
        one.take(random.standard_normal(272).astype(np.float32))
    assert set(one.token_ids) <= {7, 9}


def test_logits_that_are_no_numbers_are_an_error_of_the_build(model: Model) -> None:
    with pytest.raises(CorruptArtifactError, match="NaN or infinity"):
        choice(model).take(np.full(272, np.nan, np.float32))


def test_choices_have_seeds_of_their_own(model: Model) -> None:
    request = generation((0, 5), temperature=1.0, seed=3, max_new_tokens=9)
    first = Choice(replace(request, n=2), 1, model.codec, model.runtime)
    second = Choice(generation((0, 5), temperature=1.0, seed=4, max_new_tokens=9), 0, model.codec, model.runtime)
    flat = np.zeros(272, np.float32)
    for _ in range(9):
        first.take(flat)
        second.take(flat)
    assert first.token_ids == second.token_ids


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=30), st.integers(0, 40))
def test_the_most_probable_are_those_of_a_sort(values: list[int], count: int) -> None:
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert list(most_probable(np.array(values, np.float32), count)) == expected


def test_log_probabilities_are_of_a_softmax() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    value, top = log_probabilities(logits, 0, 2)
    assert value == pytest.approx(np.log(0.1), abs=1e-6)
    assert [token for token, _ in top] == [1, 2]
    assert [one for _, one in top] == pytest.approx(np.log([0.6, 0.3]).tolist(), abs=1e-6)
    assert log_probabilities(logits, 1, 0)[1] == ()
