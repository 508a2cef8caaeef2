"""static_w8a8.py and calibration.py: against numpy, and ranges that come from what the graph itself computes."""

from pathlib import Path

import numpy as np
import pytest

from slmdeploy.building.build import build
from slmdeploy.building.calibration import best_range, calibrate
from slmdeploy.building.onnxruntime import read_model
from slmdeploy.building.quantize import parts, quantize
from slmdeploy.building.static_w8a8 import Range
from slmdeploy.building.w8a8 import quantize_columns
from slmdeploy.errors import SpecError
from slmdeploy.specs import Profile, Weights, load_toml
from tests.building.small import Array, linear, normal, relative_error, run, write_graph

STATIC = Weights(scheme="w8a8-static", bits=8)


def counted(values: Array) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.bincount(values.astype(np.float16).view(np.uint16).ravel(), minlength=1 << 16)


def test_the_graph_computes_what_numpy_does_and_layers_share_the_rows() -> None:
    x, weights, found = normal(5, 64, seed=1), (normal(64, 8), normal(64, 12, seed=2)), Range(0.03, 120)
    model = linear(*weights)
    quantize(model, {"layer0": STATIC, "layer1": STATIC}, {"x": found})
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 1
    for y, weight in zip(run(model, x), weights, strict=True):
        values, scales = quantize_columns(weight)
        exact = found.rounded(x.astype(np.float64)) @ (values.astype(np.float64) * scales)
        assert relative_error(y, exact) < 1e-3  # one code may round the other way
        assert relative_error(y, x @ weight) < 0.03


def test_a_row_is_not_changed_by_its_neighbours() -> None:
    x, model = normal(5, 64), linear(normal(64, 32))
    x[3] *= 1000
    quantize(model, {"layer0": STATIC}, {"x": Range(0.03, 128)})
    (together,) = run(model, x)
    np.testing.assert_array_equal(together, np.concatenate([run(model, row[None])[0] for row in x]))


def test_a_range_holds_zero_and_leaves_a_rare_outlier_out() -> None:
    values = normal(4000) + np.float32(2)
    whole = best_range(counted(values))
    assert whole.rounded(np.zeros(1))[0] == 0
    assert whole.step * 255 == pytest.approx(values.max() - values.min(), rel=0.2)
    rare = counted(values) * 10_000 + counted(np.full(1, 60, np.float32))
    assert best_range(rare).step * 255 < 30
    assert best_range(counted(np.zeros(5, np.float32))) == Range(1.0, 0)


def test_calibration_counts_what_each_layer_reads(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph")
    ranges = calibrate(graph, [[1, 2, 3], [4, 5]])
    read = {node.inputs[0].name for name, node in parts(read_model(graph)).items() if name != "model.embed_tokens"}  # type: ignore[union-attr]
    assert set(ranges) == read
    assert all(found.step > 0 for found in ranges.values())
    assert ranges == calibrate(graph, [[4, 5], [1, 2, 3]])


def test_a_static_build_is_calibrated_and_near_its_graph(tmp_path: Path) -> None:
    gate = {"max_kl": 10.0, "min_top1": 0.0, "max_ppl_ratio": 10.0}
    fields = {"name": "p", "summary": "s", "engine": "onnxruntime", "gate": gate}
    wanted = Profile.model_validate(fields | {"weights": {"scheme": "w8a8-static", "bits": 8}})
    result = build(write_graph(tmp_path / "graph"), profile=wanted, out=tmp_path / "out").result
    assert "w8a8-static" in result["parts"].values()
    assert result["quality"]["kl"] < 0.01


def test_openvino_has_no_static_scheme(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('name = "p"\nsummary = "s"\nengine = "openvino"\n[weights]\nscheme = "w8a8-static"\nbits = 8\n')
    with pytest.raises(SpecError, match="no scheme w8a8-static"):
        load_toml(file, Profile)
