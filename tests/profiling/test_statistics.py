"""Percentiles and intervals are what numpy and theory say; draws of ratios are paired or independent by their seeds."""

import numpy as np
import pytest

from slmdeploy.profiling.statistics import (
    bootstrap,
    draws,
    interval,
    percentile,
    percentile_draws,
    ratio_interval,
    spread,
)


def test_percentile_and_spread():
    assert percentile(range(101), 99) == 99
    assert spread(range(101)) == pytest.approx(80 / 50)
    assert spread([0.0, 0.0]) == 0.0


def test_bootstrap_of_a_mean_agrees_with_theory_and_is_seeded():
    values = np.random.default_rng(0).normal(10, 2, 400)
    low, high = bootstrap(values, lambda drawn: drawn.mean(-1), 1)
    assert (low, high) == bootstrap(values, lambda drawn: drawn.mean(-1), 1)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert low < values.mean() < high


def test_draws_in_blocks_keep_columns_together():
    table = np.array([[1.0, 2.0]] * 70_000)
    assert draws(table, lambda drawn: drawn[..., 0].sum(-1) / drawn[..., 1].sum(-1), 0, 40) == pytest.approx([0.5] * 40)


def test_percentile_draws_have_a_column_for_each():
    table = percentile_draws(np.arange(1000.0), [50.0, 99.0], 0)
    assert table.shape == (1000, 2)
    low, high = interval(table[:, 0])
    assert low < 499.5 < high
    assert (table[:, 1] > table[:, 0]).all()


def test_the_interval_of_a_ratio_is_narrow_where_records_are_shared():
    records = np.random.default_rng(0).lognormal(0, 1, 300)
    own = draws(1.1 * records, lambda drawn: drawn.mean(-1), 5)
    paired = ratio_interval(own, draws(records, lambda drawn: drawn.mean(-1), 5))
    unpaired = ratio_interval(own, draws(records, lambda drawn: drawn.mean(-1), 6))
    assert paired == pytest.approx((1.1, 1.1))
    assert unpaired[1] - unpaired[0] > 0.1
    assert ratio_interval(own, np.zeros(1000)) is None
