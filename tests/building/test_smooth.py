"""smooth.py: outliers leave the activations, the model stays what it is, and only what helps is done."""

from pathlib import Path

import numpy as np
import pytest

from slmdeploy.building.calibration import inputs_of
from slmdeploy.building.folding import places
from slmdeploy.building.onnxruntime import open_folder, read_model, write_folder
from slmdeploy.building.smooth import ALPHAS, Inputs, blocks_product, factors, smooth, w8a8_product
from slmdeploy.specs import SessionOptions
from tests.building.small import normal, relative_error, write_planted
from tests.building.test_rotation import normed

IDS = [0, 5, 9, 33, 100, 7, 8]
SEQUENCES = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12, 13]]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("smooth"))


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_smoothing_takes_outliers_away_and_changes_nothing_else(
    planted: Path, tmp_path: Path, alpha: float | None
) -> None:
    model, inputs = read_model(planted), inputs_of(planted, SEQUENCES)
    taken = smooth(model, inputs, alpha=alpha)
    assert set(taken) <= {place.name for place in places(model.graph)}
    assert "n0" in taken
    write_folder(model, planted, tmp_path, precision="fp32", session=SessionOptions())
    expected = open_folder(planted).logits(IDS)
    assert relative_error(open_folder(tmp_path).logits(IDS), expected) < 1e-5
    after = inputs_of(tmp_path, SEQUENCES)
    for name in taken:
        before, smoother = (found[name].largest / np.median(found[name].largest) for found in (inputs, after))
        assert smoother.max() < before.max() / 2, name


def test_products_in_8_bits_are_nearer_behind_it(planted: Path) -> None:
    model, inputs = read_model(planted), inputs_of(planted, SEQUENCES)
    place = next(place for place in places(model.graph) if place.name == "m0")
    (weight,) = place.weights()
    found = inputs["m0"]
    spread = factors(place, found, 0.5)[place.channels]
    exact = found.rows @ weight
    plain = relative_error(w8a8_product(found.rows, weight), exact)
    assert relative_error(w8a8_product(found.rows / spread, weight * spread[:, None]), exact) < plain / 3


def test_calibration_sees_every_channel_and_the_first_row(planted: Path) -> None:
    found = inputs_of(planted, SEQUENCES)["n0"]
    assert found.largest.shape == (64,)
    assert len(found.rows) == 12, "all rows, since there are few"
    np.testing.assert_array_equal(found.largest, np.abs(found.rows).max(axis=0))


def test_values_without_calibration_and_channels_that_are_zero_stay(planted: Path) -> None:
    model = read_model(planted)
    assert smooth(model, {}) == {}
    place = places(model.graph)[0]
    dead = Inputs(np.zeros(64, np.float32), np.zeros((3, 64), np.float32))
    np.testing.assert_array_equal(factors(place, dead, 0.5), np.ones(64))


def test_it_is_not_done_where_it_does_not_help() -> None:
    model, rows = normed(normal(16, 16), np.ones(16, np.float32)), normal(64, 16)
    inputs = {place.name: Inputs(np.abs(rows).max(axis=0), rows) for place in places(model.graph)}
    assert smooth(model, inputs, product=lambda rows, weight: rows @ weight) == {}
    assert set(smooth(model, inputs, alpha=ALPHAS[0]).values()) == {ALPHAS[0]}


def test_4_bit_products_are_those_of_blocks() -> None:
    rows, weight = normal(9, 40), normal(40, 8, seed=1)
    coarse, fine = (blocks_product(bits, 32, symmetric=False)(rows, weight) for bits in (4, 8))
    exact = rows @ weight
    assert 0.03 < relative_error(coarse, exact) < 0.2
    assert relative_error(fine, exact) < 0.01


def test_steps_of_8_bits_suit_rows_however_small_they_are() -> None:
    rows, weight = normal(9, 40), normal(40, 8, seed=1)
    small = w8a8_product(rows * np.float32(2**-20), weight) * np.float32(2**20)
    np.testing.assert_array_equal(small, w8a8_product(rows, weight))
    np.testing.assert_array_equal(w8a8_product(rows * 0, weight), np.zeros((9, 8)))
