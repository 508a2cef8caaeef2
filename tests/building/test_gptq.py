"""gptq.py and the second moments of calibration.py: less error where it counts."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from slmdeploy.building.blockwise import quantize_rows
from slmdeploy.building.calibration import Moments
from slmdeploy.building.gptq import _spread, compensated_rows
from tests.building.small import write_graph
from tests.building.test_blockwise import dequantise, round_to_nearest

Floats = NDArray[np.float32]


def correlated(rows: int, width: int, seed: int = 0) -> Floats:
    """Rows whose entries depend on one another, as activations do."""
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(rows, width // 4)) @ random.normal(size=(width // 4, width))
    return (hidden + 0.3 * random.normal(size=(rows, width))).astype(np.float32)


def weights(rows: int, width: int) -> Floats:
    return np.random.default_rng(7).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "block"), [(128, 32), (128, 128), (96, 64), (40, 128)])
def test_outputs_on_unseen_rows_are_nearer_than_by_rounding_alone(width: int, block: int, symmetric: bool) -> None:
    seen, unseen = np.split(correlated(2048, width), 2)
    matrix = weights(48, width)
    calibrated = compensated_rows(matrix, seen.T @ seen, bits=4, block_size=block, symmetric=symmetric)
    alone = quantize_rows(matrix, bits=4, block_size=block, symmetric=symmetric)
    errors = [
        np.linalg.norm(unseen @ (dequantise(blocks, 4, block, width) - matrix).T) for blocks in (calibrated, alone)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_inputs_that_do_not_depend_on_one_another_leave_plain_rounding() -> None:
    matrix = weights(8, 64)
    found = compensated_rows(matrix, np.eye(64, dtype=np.float32), bits=4, block_size=32, symmetric=True)
    np.testing.assert_array_equal(dequantise(found, 4, 32, 64), round_to_nearest(matrix, 32))


def test_errors_are_spread_by_the_factor_of_the_inverse_moments() -> None:
    seen = correlated(512, 150)
    moments = seen.T @ seen
    spread = _spread(moments).astype(np.float64)
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(150)
    np.testing.assert_array_equal(spread, np.triu(spread))
    np.testing.assert_allclose(spread.T @ spread @ damped, np.eye(150), atol=1e-3)


@pytest.mark.parametrize("moments", [np.zeros((64, 64)), np.ones((64, 64)), np.diag([1.0, 0.0] * 32)])
def test_inputs_that_are_always_zero_or_all_alike_give_finite_weights(moments: NDArray[np.float64]) -> None:
    matrix = weights(4, 64)
    found = compensated_rows(matrix, moments.astype(np.float32), bits=4, block_size=32, symmetric=False)
    back = dequantise(found, 4, 32, 64)
    assert np.isfinite(back).all()
    assert np.abs(back - matrix).max() < 2 * np.abs(matrix).max()


def test_rows_are_rounded_alike_however_many_there_are() -> None:
    seen, matrix = correlated(256, 32), weights(600, 32)
    whole = compensated_rows(matrix, seen.T @ seen, bits=4, block_size=32, symmetric=True)
    last = compensated_rows(matrix[-5:], seen.T @ seen, bits=4, block_size=32, symmetric=True)
    np.testing.assert_array_equal(whole.values[-5:], last.values)


def test_moments_are_those_of_what_the_layers_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, sequences = write_graph(tmp_path / "graph"), [[1, 2, 3], [4, 5]]
    moments = Moments(graph, sequences)
    names = list(moments._widths)
    found = {name: moments(name).copy() for name in names}
    for gram in found.values():
        np.testing.assert_array_equal(gram, gram.T)
        assert np.linalg.matrix_rank(gram) <= 5, "five tokens were seen"
        assert np.trace(gram) > 0
    monkeypatch.setattr("slmdeploy.building.calibration._MOMENT_BYTES", 1)
    narrow = Moments(graph, sequences)
    for name in names:
        np.testing.assert_allclose(narrow(name), found[name], rtol=1e-5, atol=1e-6)
        assert list(narrow._held) == [name]
    narrow.forget()
    assert not narrow._held
    np.testing.assert_allclose(narrow(names[0]), found[names[0]], rtol=1e-5, atol=1e-6)
