"""decoder.py: the interface of the graph, the names that other parts rely on, and what does not depend on torch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from slmdeploy.exporting.decoder import build_decoder
from slmdeploy.exporting.spec import DecoderSpec, LayerSpec, Names, Norm, Rope
from tests.exporting.checkpoints import FakeWeights

SPEC = DecoderSpec(
    names=Names(),
    hidden=64,
    vocab_size=50,
    head_dim=16,
    max_length=32,
    layers=(LayerSpec(4, 2, 37), LayerSpec(4, 2, 37)),
    norm=Norm(),
    ropes=(Rope(10000.0, "default", 16),),
    attention_scale=0.25,
    bos_token_id=0,
    eos_token_ids=(1,),
)


def save(spec: DecoderSpec, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    ir.save(build_decoder(spec, FakeWeights(spec)), folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"


def run(path: Path, spec: DecoderSpec, ids: list[int], rows: list[int]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "logits_positions": np.array(rows, np.int64),
    }
    for index, layer in enumerate(spec.layers):
        past = np.zeros((1, layer.kv_heads, 0, spec.head_dim), np.float32)
        feeds |= {f"past_key_values.{index}.key": past, f"past_key_values.{index}.value": past}
    return list(session.run(None, feeds))


def test_interface_and_names() -> None:
    model = build_decoder(SPEC, FakeWeights(SPEC))
    pasts = [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [v.name for v in model.graph.inputs] == ["input_ids", "attention_mask", "logits_positions", *pasts]
    presents = [f"present.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [v.name for v in model.graph.outputs] == ["logits", *presents]
    assert model.opset_imports == {"": 21, "com.microsoft": 1}
    linear = [node for node in model.graph if node.op_type == "MatMul"]
    layer = ("attn.qkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert [n.name for n in linear] == [f"model.layers.{i}.{p}" for i in range(2) for p in layer] + ["lm_head"]
    for node in linear:
        assert node.inputs[1].name == f"{node.name}.weight"
        assert node.inputs[1].is_initializer()
    assert linear[-1].inputs[0].name == "model.norm.output"
    embedding = next(node for node in model.graph if node.name == "model.embed_tokens")
    assert (embedding.op_type, embedding.inputs[0].name) == ("Gather", "model.embed_tokens.weight")


def test_fused_weights_hold_query_key_value_and_gate_before_up() -> None:
    weights = FakeWeights(SPEC)
    initializers = build_decoder(SPEC, weights).graph.initializers
    qkv = initializers["model.layers.0.attn.qkv_proj.weight"].const_value.numpy()
    parts = [weights.read(f"model.layers.0.self_attn.{name}_proj.weight") for name in "qkv"]
    assert np.array_equal(qkv, np.concatenate(parts).T)
    gate_up = initializers["model.layers.0.mlp.gate_up_proj.weight"].const_value.numpy()
    assert np.array_equal(gate_up[:, :37], weights.read("model.layers.0.mlp.gate_proj.weight").T)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = save(SPEC, tmp_path / "a"), save(SPEC, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert first.with_name("model.onnx.data").read_bytes() == second.with_name("model.onnx.data").read_bytes()
    assert first.stat().st_size < 20_000, "weights belong into the data file"


def test_only_the_rows_asked_for_in_the_order_asked_for(tmp_path: Path) -> None:
    path, ids = save(SPEC, tmp_path), [3, 1, 4, 1, 5]
    every = run(path, SPEC, ids, [0, 1, 2, 3, 4])[0]
    assert every.shape == (5, 50)
    assert np.allclose(run(path, SPEC, ids, [4, 0])[0], every[[4, 0]], atol=1e-6)
    assert run(path, SPEC, ids, [])[0].shape == (0, 50), "a prefix that only fills the cache asks for no logits"


def test_layers_may_differ_in_heads_and_width(tmp_path: Path) -> None:
    spec = replace(SPEC, layers=(LayerSpec(4, 2, 37), LayerSpec(3, 1, 21)), tied=True)
    logits, *presents = run(save(spec, tmp_path), spec, [1, 2, 3], [2])
    assert logits.shape == (1, 50)
    assert [present.shape[1] for present in presents] == [2, 2, 1, 1]
    assert np.isfinite(logits).all()
