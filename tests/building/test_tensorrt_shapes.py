"""Optimisation profiles: which shapes a plan takes, by interface and workload."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from slmdeploy.building.tensorrt_shapes import fix_capacity, phases_of, taken_by
from slmdeploy.errors import InputError
from slmdeploy.runtime.bundle import RuntimeConfig, read_runtime
from slmdeploy.specs import named_workload
from tests.building.small import write_graph


@pytest.fixture
def config(tmp_path: Path) -> RuntimeConfig:
    return replace(
        read_runtime(write_graph(tmp_path / "graph")), tasks=("generate",), interface="standard", max_length=64
    )


def test_prompts_begin_with_an_empty_past_and_steps_follow_any(config: RuntimeConfig) -> None:
    prefill, decode = phases_of(config, named_workload("generate-16-8"))
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 16), (1, 64))
    past = prefill.shapes["past_key_values.0.key"]
    assert {shape[2] for shape in past} == {0}
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (1, 1))
    assert [shape[2] for shape in decode.shapes["past_key_values.0.value"]] == [0, 20, 63]
    assert decode.shapes["attention_mask"] == ((1, 1), (1, 21), (1, 64))


def test_a_static_cache_has_the_length_of_the_context(config: RuntimeConfig) -> None:
    prefill, decode = phases_of(replace(config, interface="static"), None)
    for phase in (prefill, decode):
        assert {shape[2] for shape in phase.shapes["past_key_values.0.key"]} == {64}
        assert phase.shapes["cache_lengths"] == ((1,), (1,), (1,))
    assert prefill.shapes["input_ids"][1] == (1, 64)  # a usual prompt is longer than this context


def test_a_workload_that_does_not_fit_is_refused(config: RuntimeConfig) -> None:
    with pytest.raises(InputError, match="takes 65 tokens of 64 in context"):
        phases_of(config, named_workload("generate-60-5"))
    with pytest.raises(InputError, match="is of the task score"):
        phases_of(config, named_workload("score-16-2x4"))


def test_inputs_that_a_graph_has_not_and_open_lengths_of_a_static_cache(config: RuntimeConfig) -> None:
    cache = ir.Value(name="past_key_values.0.key", shape=ir.Shape(["batch", 2, "capacity", 16]))
    ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", "sequence"]))
    model = ir.Model(ir.Graph([ids, cache], [], nodes=[], opset_imports={"": 24}), ir_version=10)
    phase = taken_by(phases_of(config, None)[0], model)
    assert set(phase.shapes) == {"input_ids", "past_key_values.0.key"}
    fix_capacity(model, 64)
    assert cache.shape is not None
    assert cache.shape[2] == 64
    assert ids.shape is not None
    assert str(ids.shape[1]) == "sequence"
