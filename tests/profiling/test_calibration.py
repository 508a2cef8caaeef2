"""Fitting costs: known ones are found again, outliers do not bend them, and files that are none are refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.profiling.calibration import (
    Reference,
    Sample,
    error_summary,
    first_guess,
    fit,
    fit_memory,
    non_negative,
    read_calibration,
    seconds,
)
from slmdeploy.profiling.roofline import UNITS

MACHINE = Reference(
    cpu="x",
    arch="x86_64",
    threads=2,
    read_bandwidth_bytes_per_s=3e10,
    fp32_peak_ops_per_s=2e11,
    int8_peak_ops_per_s=8e11,
    cache_bytes=1 << 25,
)
GUESS = first_guess(MACHINE)


def made(costs, count=200, noise=0.0):
    generator = np.random.default_rng(0)
    scale = 1 / np.array([GUESS[name] for name in UNITS])
    works = generator.exponential(size=(count, len(UNITS))) * scale
    factors = np.exp(noise * generator.standard_normal(count))
    return [Sample(work, seconds(work, costs) * factor) for work, factor in zip(works, factors, strict=True)]


def test_the_first_guess_is_the_machine():
    assert set(GUESS) == set(UNITS)
    assert GUESS["read_int4"] == 1 / 3e10
    assert (GUESS["ops_fp32"], GUESS["ops_w8a8"]) == (1 / 2e11, 1 / 8e11)


def test_known_costs_are_found_again():
    true = {name: cost * (1 + index % 4) for index, (name, cost) in enumerate(GUESS.items())}
    found = fit(made(true), GUESS)
    assert [found[name] / true[name] for name in UNITS] == pytest.approx([1] * len(UNITS), rel=0.02)


def test_an_outlier_does_not_bend_them():
    samples = made(GUESS, noise=0.02)
    spoiled = [*samples[:-5], *(Sample(sample.work, 20 * sample.seconds) for sample in samples[-5:])]
    costs = fit(spoiled, GUESS)
    assert max(abs(sample.error(costs)) for sample in samples) < 0.15


def test_a_cost_that_nothing_moves_stays_where_it_was():
    samples = [Sample(sample.work * (np.array(UNITS) != "keys"), sample.seconds) for sample in made(GUESS)]
    assert fit(samples, GUESS)["keys"] == pytest.approx(GUESS["keys"])


def test_nothing_to_fit_to():
    with pytest.raises(InputError, match="no measurement to fit to"):
        fit([], GUESS)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 12))
def test_the_best_vector_without_negative_parts(seed, columns, rows):
    generator = np.random.default_rng(seed)
    matrix, target = generator.standard_normal((rows, columns)), generator.standard_normal(rows)
    x = non_negative(matrix, target)
    gradient = matrix.T @ (target - matrix @ x)
    # Kuhn and Tucker: nothing is gained by more of any part, nor by less of one that is there.
    assert (x >= 0).all()
    assert gradient.max() < 1e-6
    assert np.abs(gradient[x > 0]).max(initial=0) < 1e-6


def test_memory_is_a_base_and_a_share_of_the_weights():
    memory = fit_memory([1e8, 2e8, 4e8], [1.8e8, 2.8e8, 4.8e8])
    assert (memory.base_bytes, memory.per_weight_byte) == (pytest.approx(8e7), pytest.approx(1.0))
    assert fit_memory([1.0, 2.0], [1.0, 3.0]).base_bytes == 0
    assert fit_memory([1.0, 2.0], [3.0, 1.0]).per_weight_byte == 0


def test_what_errors_come_to():
    errors = error_summary([-0.1, 0.0, 0.1, 0.2])
    assert (errors.median, errors.samples) == (pytest.approx(0.1), 4)
    low, high = errors.interval(100.0)
    assert low < 100 / 1.15 < 100 < high


def test_the_shipped_calibration():
    calibration = read_calibration()
    assert calibration.samples > 100
    assert calibration.errors.median < 0.25
    assert calibration.memory.per_weight_byte > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"costs": {"read_fp32": 1.0}}, "costs are not those of"),
        ({"costs": dict.fromkeys(UNITS, -1.0)}, "costs.read_fp32"),
        ({"more": 1}, "more"),
    ],
)
def test_a_file_that_is_no_calibration(tmp_path, change, message):
    file = tmp_path / "c.json"
    file.write_text(json.dumps(read_calibration().model_dump() | change))
    with pytest.raises(CorruptArtifactError, match=message):
        read_calibration(file)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_calibration(tmp_path / "none.json")
    (tmp_path / "c.json").write_bytes(b"\xff{")
    with pytest.raises(CorruptArtifactError, match="not UTF-8"):
        read_calibration(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(CorruptArtifactError, match="is no calibration: the file"):
        read_calibration(tmp_path / "c.json")
