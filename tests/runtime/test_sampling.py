"""Sampling against a slow, literal reference, and the settings that are refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmdeploy.runtime.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.sampling import Sampler, Sampling, distribution, penalised

rows = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30).map(lambda row: np.array(row, np.float32))
settings = st.builds(
    Sampling,
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 32),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
)


def reference(logits: np.ndarray, sampling: Sampling) -> dict[int, float]:
    """Token → probability, filter after filter, each on the renormalised rest of the one before."""
    scaled = {i: float(x) / sampling.temperature for i, x in enumerate(logits)}
    if sampling.top_k:
        kth = sorted(scaled.values(), reverse=True)[: sampling.top_k][-1]
        scaled = {i: x for i, x in scaled.items() if x >= kth}
    best = max(scaled.values())
    weights = {i: math.exp(x - best) for i, x in scaled.items()}
    total = sum(weights.values())
    kept, mass = {}, 0.0
    for i in sorted(weights, key=lambda i: (-weights[i], i)):
        if kept and mass >= sampling.top_p:
            break
        kept[i] = weights[i] / total
        mass += kept[i]
    kept = {i: p for i, p in kept.items() if p >= sampling.min_p * max(kept.values())}
    return {i: p / sum(kept.values()) for i, p in kept.items()}


@given(rows, settings)
def test_distribution_equals_the_reference(logits: np.ndarray, sampling: Sampling) -> None:
    tokens, probabilities = distribution(logits, sampling)
    expected = reference(logits, sampling)
    got = dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))
    # Rounding may decide differently about a token that lies exactly on an edge.
    for token in got.keys() ^ expected.keys():
        assert abs(got.get(token, 0.0) - expected.get(token, 0.0)) < 1e-6 or on_an_edge(logits, sampling, token)
    if got.keys() == expected.keys():
        assert got == pytest.approx(expected, abs=1e-9)


def on_an_edge(logits: np.ndarray, sampling: Sampling, token: int) -> bool:
    looser = Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=min(1.0, sampling.top_p + 1e-9),
        min_p=max(0.0, sampling.min_p - 1e-9),
    )
    return token in reference(logits, looser)


def test_greedy_takes_the_best_and_leaves_the_logits_alone() -> None:
    logits = np.array([1, 5, 3], np.float32)
    assert Sampler(Sampling(), []).pick(logits) == 1
    assert logits.tolist() == [1, 5, 3]


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_tightest_filter_is_greedy(filters: dict[str, float]) -> None:
    logits = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    sampler = Sampler(Sampling(temperature=2.0, seed=1, **filters), [])
    assert {sampler.pick(logits) for _ in range(20)} == {int(logits.argmax())}


def test_the_kth_is_found_among_the_logits_as_they_are() -> None:
    tokens, _ = distribution(np.array([0, 1, 4e-35], np.float32), Sampling(temperature=1.0, top_k=2))
    assert tokens.tolist() == [1, 2]


def test_ties_with_the_kth_stay() -> None:
    tokens, _ = distribution(np.array([2, 1, 1, 0], np.float32), Sampling(temperature=1.0, top_k=2))
    assert tokens.tolist() == [0, 1, 2]


def test_a_seed_repeats_and_another_differs() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [])
        return [sampler.pick(logits) for _ in range(5)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_frequencies_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=0), [])
    counts = np.bincount([sampler.pick(logits) for _ in range(4000)], minlength=3) / 4000
    assert counts == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_repetition_penalty_pushes_seen_tokens_down_whatever_their_sign() -> None:
    assert penalised(np.array([2, -2, 4], np.float32), [0, 1], 2.0).tolist() == [1, -4, 4]
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0])
    logits = np.array([3, 2, 1.9], np.float32)
    assert [sampler.pick(logits) for _ in range(2)] == [1, 2], "the picked token counts as seen"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_no_tokens(bad: float) -> None:
    with pytest.raises(CorruptArtifactError, match="NaN or infinity"):
        Sampler(Sampling(), []).pick(np.array([0, bad, 9], np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} must be .*, not {value}"):
        Sampling(**{name: value})


def test_a_temperature_just_above_0_leaves_the_best_token() -> None:
    tokens, probabilities = distribution(np.array([1, 3, 2], np.float32), Sampling(temperature=5e-324))
    assert probabilities[tokens == 1] == 1
    assert probabilities.sum() == 1
