"""The choice of a shape from times and losses: least loss within the limit, depth against width."""

import itertools

import pytest

from slmdeploy.compress.shapes import Choices, Form, Losses, choose, times_of, to_measure
from slmdeploy.errors import InfeasibleError, InputError

CHOICES = Choices((1, 2, 3, 4, 5, 6), (1, 2, 4), tuple(range(16, 257, 16)))


def seconds(form: Form) -> float:
    """A machine on which 2 ms stand around layers of 1 ms, 0.25 ms per head and 1 ms per 256 neurons."""
    return 2 + form.layers * (1 + 0.25 * form.kv_heads + form.neurons / 256)


def losses(*, width: float, depth: float) -> Losses:
    heads = tuple(0.1 * width * (1 - kept / 4) for kept in CHOICES.kv_heads)
    neurons = tuple(width * (1 - kept / 256) for kept in CHOICES.neurons)
    return Losses(tuple(depth * gone for gone in range(7)), (3, 4, 2, 1, 5, 0), (heads,) * 6, (neurons,) * 6)


def test_few_shapes_say_the_times_of_all() -> None:
    forms = to_measure(CHOICES, 16)
    assert forms[:2] == [Form(1, 4, 256), Form(4, 4, 256)]
    assert len(forms) == len(set(forms)) == 2 + 2 + 4
    grid = times_of(forms, [seconds(form) for form in forms]).grid(CHOICES)
    every = itertools.product(CHOICES.layers, CHOICES.kv_heads, CHOICES.neurons[1:])
    for form in itertools.starmap(Form, every):
        sizes = (CHOICES.layers, CHOICES.kv_heads, CHOICES.neurons)
        at = [size.index(one) for size, one in zip(sizes, form, strict=True)]
        assert grid[tuple(at)] == pytest.approx(seconds(form))


def test_a_model_of_one_layer_is_timed_too() -> None:
    forms = to_measure(Choices((1,), (2,), (16, 32)), 16)
    assert forms == [Form(1, 2, 32), Form(1, 2, 16)]
    assert times_of(forms, [3.0, 2.0]).grid(Choices((1,), (2,), (16, 32))).ravel().tolist() == [2.0, 3.0]


def test_times_that_contradict_each_other_are_refused() -> None:
    forms = to_measure(CHOICES, 16)
    for first in (5.0, 0.2):  # more layers take less time, or far more than their share
        with pytest.raises(InputError, match=r"contradict each other .*: the machine was busy"):
            times_of(forms, [first, 4.5, *([4.0] * (len(forms) - 2))])


def test_what_costs_little_goes() -> None:
    forms = to_measure(CHOICES, 16)
    times = times_of(forms, [seconds(form) for form in forms])
    shallow = choose(CHOICES, losses(width=1.0, depth=0.01), times, 12.0)
    narrow = choose(CHOICES, losses(width=0.01, depth=1.0), times, 12.0)
    assert shallow.best.form.layers == 3  # 2 + 3 · 3 ms: as deep as whole layers allow
    assert shallow.best.form.neurons == 256
    assert narrow.best.form.layers == 6
    assert narrow.best.form.neurons < 256
    for chosen in (shallow, narrow):
        assert chosen.best.milliseconds <= 12.0
        assert chosen.dense_milliseconds == pytest.approx(20.0)
        assert chosen.best.loss == min(option.loss for option in chosen.depths)


def test_the_choice_is_the_best_of_all() -> None:
    forms = to_measure(CHOICES, 16)
    times, lost = times_of(forms, [seconds(form) for form in forms]), losses(width=0.3, depth=0.2)
    within = times.grid(CHOICES) <= 10.0
    assert choose(CHOICES, lost, times, 10.0).best.loss == lost.grid(CHOICES)[within].min()


def test_a_limit_below_the_fastest_shape_is_refused_with_it() -> None:
    forms = to_measure(CHOICES, 16)
    times = times_of(forms, [seconds(form) for form in forms])
    with pytest.raises(InfeasibleError, match=r"limit of 2 ms: the fastest, 1 layers of 1 KV heads and 16 neurons"):
        choose(CHOICES, losses(width=1.0, depth=1.0), times, 2.0)
