"""quantize.py: what a profile asks for, part by part, and what is left of the graph afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slmdeploy.building.quantize import describe, higher, parts, plan_for, quantize
from slmdeploy.errors import InputError, SpecError
from slmdeploy.specs import Profile, Weights, load_profile
from tests.building.small import constant, embedding, linear, model_of, normal, run
from tests.graphs import write_tiny_graph


def profile(**tables: Any) -> Profile:
    return Profile.model_validate({"name": "p", "summary": "s", "engine": "onnxruntime"} | tables)


W8A8 = {"scheme": "w8a8", "bits": 8}
INT4 = {"scheme": "weight-only", "bits": 4, "block_size": 32}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    return ir.load(write_tiny_graph(tmp_path_factory.mktemp("tiny"), layers=1, tasks=("generate",)) / "model.onnx")


def test_the_parts_of_a_decoder_are_its_linear_layers_its_head_and_its_embedding(tiny: ir.Model) -> None:
    layer = "model.layers.0."
    linear_layers = [f"{layer}{name}" for name in ("attn.qkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")]
    assert list(parts(tiny)) == ["model.embed_tokens", *linear_layers, "lm_head"]


def test_a_product_of_two_computed_values_is_no_part() -> None:
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 2]))
    node = ir.node("MatMul", [source, source], name="square")
    assert parts(model_of([node], source, [])) == {}


def test_each_part_gets_the_form_of_its_table(tiny: ir.Model) -> None:
    plan = plan_for(profile(weights=INT4, embedding={"bits": 8}, head={"bits": 4, "block_size": 64}), tiny)
    assert describe(plan["model.embed_tokens"]) == "int8 block 128"
    assert describe(plan["lm_head"]) == "int4 block 64"
    assert describe(plan["model.layers.0.attn.o_proj"]) == "int4 block 32"


def test_what_stays_fp32_is_not_in_the_plan(tiny: ir.Model) -> None:
    assert plan_for(profile(weights={"scheme": "fp32"}), tiny) == {}
    plan = plan_for(profile(weights=W8A8), tiny)
    assert "lm_head" not in plan
    assert "model.embed_tokens" not in plan
    assert len(plan) == 4


def test_a_graph_with_nothing_to_quantise_is_refused_unless_nothing_is_wanted() -> None:
    model = embedding(normal(4, 32))
    with pytest.raises(InputError, match="no MatMul with a constant weight"):
        plan_for(profile(weights=W8A8), model)
    assert plan_for(profile(weights={"scheme": "fp32"}), model) == {}


def test_the_next_more_precise_form() -> None:
    four = Weights.model_validate(INT4)
    assert describe(higher(four)) == "int8 block 128"
    assert describe(higher(higher(four))) == "fp32"
    assert describe(higher(Weights.model_validate(W8A8))) == "int8 block 128"
    assert describe(higher(Weights.model_validate(W8A8 | {"scheme": "w8a8-static"}))) == "w8a8"


def test_a_quantised_layer_keeps_its_output_and_loses_its_weight() -> None:
    weights, x = (normal(32, 8), normal(32, 8, seed=1)), normal(2, 32)
    model = linear(*weights)
    quantize(model, {"layer1": Weights.model_validate(INT4)})
    assert [value.name for value in model.graph.outputs] == ["y0", "y1"]
    assert "layer0.weight" in model.graph.initializers
    assert "layer1.weight" not in model.graph.initializers
    np.testing.assert_allclose(run(model, x)[0], x @ weights[0], rtol=1e-5, atol=1e-5)


def test_a_weight_that_another_node_reads_stays() -> None:
    """A tied head: the embedding is quantised, the head reads the same table on."""
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["rows"]))
    table = constant("table", normal(32, 32))
    nodes = [ir.node("Gather", [table, source], name="model.embed_tokens")]
    nodes.append(ir.node("MatMul", [nodes[0].outputs[0], table], name="lm_head"))
    model = model_of(nodes, source, [table])
    quantize(model, {"model.embed_tokens": Weights.model_validate(INT4)})
    assert "table" in model.graph.initializers
    assert [node.op_type for node in model.graph] == ["GatherBlockQuantized", "MatMul"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ('scheme = "weight-only"\nbits = 3', "weights.bits"),
        ('scheme = "w8a8"\nbits = 4', "bits = 4 does not go with"),
        ('scheme = "int7"', "weights.scheme"),
    ],
)
def test_a_scheme_or_width_that_does_not_exist_is_refused(tmp_path: Path, weights: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'name = "mine"\nsummary = "s"\nengine = "onnxruntime"\n[weights]\n{weights}\n')
    with pytest.raises(SpecError, match=message):
        load_profile(str(file))
