"""Writes a tiny decoder with random weights in the layout of a build folder: tests need no exporter and no torch.

The graph is the `ort` dialect: packed QKV into GroupQueryAttention with rotary embedding, logits at asked positions
only, and score.onnx as slmdeploy derives it.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from slmdeploy.building.scoring_graph import write_score_graph
from slmdeploy.runtime.bundle import sha256_file

LABELS = (" no", " yes")


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE over all 256 bytes with <s>, </s> and the two label words as single tokens; 263 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "n"), ("Ġn", "o"), ("Ġ", "y"), ("Ġy", "e"), ("Ġye", "s")]
    words = ["<s>", "</s>", *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def write_tiny_graph(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: tuple[int, ...] | None = None,
    head_dim: int = 16,
    intermediate: int = 96,
    vocab: int = 272,
    max_length: int = 64,
    tasks: tuple[str, ...] = ("generate", "score"),
    kind: str = "build",
    seed: int = 0,
    result: dict[str, object] | None = None,
) -> Path:
    """Write graphs, weights, runtime.json, config.json, tokenizer.json and manifest.json; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = kv_heads or (2,) * layers
    tokenizer = tiny_tokenizer()
    label_ids = [tokenizer.token_to_id("Ġno"), tokenizer.token_to_id("Ġyes")]
    weights = _weights(groups, hidden, heads, head_dim, intermediate, vocab, max_length, seed)
    model = _model(weights, groups, heads, head_dim, vocab)
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256
    )
    if "score" in tasks:
        write_score_graph(folder / "model.onnx", weights["lm_head.weight"][:, label_ids], folder / "score.onnx")
    tokenizer.save(str(folder / "tokenizer.json"))
    runtime = {
        "format": 1,
        "tasks": list(tasks),
        "interface": "shared",
        "layers": layers,
        "kv_heads": list(groups),
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_length": max_length,
        "bos_token_id": 0,
        "eos_token_ids": [1],
        "score": {"labels": list(LABELS), "label_ids": label_ids} if "score" in tasks else None,
        "session": {"threads": 1, "spinning": False, "parallel_items": False},
        "precision": "fp32",
    }
    (folder / "runtime.json").write_text(json.dumps(runtime))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    write_manifest(folder, kind=kind, result=result)
    return folder


def write_manifest(folder: Path, *, kind: str = "build", result: dict[str, object] | None = None) -> None:
    """(Re)write manifest.json over every file that the folder holds now."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest = {"schema": 1, "kind": kind, "content_key": "0" * 64, "plan": {}, "inputs": {}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"result": result or {}}))


def _weights(
    groups: tuple[int, ...], hidden: int, heads: int, dim: int, inner: int, vocab: int, max_length: int, seed: int
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    weights = {"model.embed_tokens.weight": draw(vocab, hidden) * np.float32(np.sqrt(vocab))}
    for i, kv in enumerate(groups):
        layer = f"model.layers.{i}."
        weights[layer + "attn.qkv_proj.weight"] = draw(hidden, (heads + 2 * kv) * dim)
        weights[layer + "attn.o_proj.weight"] = draw(heads * dim, hidden)
        weights[layer + "mlp.gate_up_proj.weight"] = draw(hidden, 2 * inner)
        weights[layer + "mlp.down_proj.weight"] = draw(inner, hidden)
        weights[layer + "input_layernorm.weight"] = np.ones(hidden, np.float32)
        weights[layer + "post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    weights["lm_head.weight"] = draw(hidden, vocab)
    angles = np.arange(max_length)[:, None] / 10000.0 ** (np.arange(dim // 2) * 2 / dim)
    weights["cos_cache"], weights["sin_cache"] = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return weights


def _model(
    weights: dict[str, np.ndarray], groups: tuple[int, ...], heads: int, dim: int, vocab: int
) -> onnx.ModelProto:
    constants = {"one": np.array([1], np.int64), "width_axis": np.array(1, np.int64)}
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("logits_positions", TensorProto.INT64, ["n"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", vocab])]
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["row_sums"], keepdims=0),
        helper.make_node("Sub", ["row_sums", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "width_axis"], ["width"]),
        helper.make_node("Cast", ["width"], ["total_length"], to=TensorProto.INT32),
        helper.make_node("Gather", ["model.embed_tokens.weight", "input_ids"], ["x0"], name="model.embed_tokens"),
    ]
    for i, kv in enumerate(groups):
        for part, ends in (("past_key_values", inputs), ("present", outputs)):
            for name in ("key", "value"):
                shape = ["batch", kv, "buffer", dim]
                ends.append(helper.make_tensor_value_info(f"{part}.{i}.{name}", TensorProto.FLOAT, shape))
        nodes += _layer(i, heads, kv)
    hidden = weights["model.norm.weight"].size
    constants["flat"] = np.array([-1, hidden], np.int64)
    nodes += [
        _norm(f"x{len(groups)}", "model.norm.weight", "normed"),
        helper.make_node("Reshape", ["normed", "flat"], ["rows"]),
        helper.make_node("Gather", ["rows", "logits_positions"], ["model.norm.output"]),
        helper.make_node("MatMul", ["model.norm.output", "lm_head.weight"], ["logits"], name="lm_head"),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in {**weights, **constants}.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _norm(x: str, weight: str, out: str) -> onnx.NodeProto:
    return helper.make_node("SimplifiedLayerNormalization", [x, weight], [out], axis=-1, epsilon=1e-5)


def _layer(i: int, heads: int, kv: int) -> list[onnx.NodeProto]:
    layer = f"model.layers.{i}"

    def linear(x: str, path: str, out: str) -> onnx.NodeProto:
        return helper.make_node("MatMul", [x, f"{layer}.{path}.weight"], [out], name=f"{layer}.{path}")

    past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
    attention = helper.make_node(
        "GroupQueryAttention",
        [f"qkv{i}", "", "", *past, "seqlens_k", "total_length", "cos_cache", "sin_cache"],
        [f"context{i}", f"present.{i}.key", f"present.{i}.value"],
        name=f"{layer}.attn",
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv,
        do_rotary=1,
    )
    return [
        _norm(f"x{i}", f"{layer}.input_layernorm.weight", f"n{i}"),
        linear(f"n{i}", "attn.qkv_proj", f"qkv{i}"),
        attention,
        linear(f"context{i}", "attn.o_proj", f"o{i}"),
        helper.make_node("Add", [f"x{i}", f"o{i}"], [f"h{i}"]),
        _norm(f"h{i}", f"{layer}.post_attention_layernorm.weight", f"m{i}"),
        linear(f"m{i}", "mlp.gate_up_proj", f"gu{i}"),
        helper.make_node("Split", [f"gu{i}"], [f"g{i}", f"u{i}"], axis=-1, num_outputs=2),
        helper.make_node("Sigmoid", [f"g{i}"], [f"s{i}"]),
        helper.make_node("Mul", [f"g{i}", f"s{i}"], [f"silu{i}"]),
        helper.make_node("Mul", [f"silu{i}", f"u{i}"], [f"act{i}"]),
        linear(f"act{i}", "mlp.down_proj", f"d{i}"),
        helper.make_node("Add", [f"h{i}", f"d{i}"], [f"x{i + 1}"]),
    ]
