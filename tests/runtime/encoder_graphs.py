"""Writes the smallest encoders in the layout of a graph folder: what each output has to be can be computed by hand.

A token's vector is its row of a table, a text's the mean of its tokens' rows; logits are the sum, or one row per token.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.graphs import write_manifest

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "d")
LABELS = ("low", "high")


def word_tokenizer() -> Tokenizer:
    """One token per word, [CLS] first [SEP] second [SEP]."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    return tokenizer


def table(width: int) -> np.ndarray:
    """The vector of each token, float32 [words, width]; that of padding is huge, so that using it shows."""
    rows = np.random.default_rng(width).standard_normal((len(WORDS), width)).astype(np.float32)
    rows[0] = 1e6
    return rows


def runtime_json(role: str = "embed", **changes: Any) -> dict[str, Any]:
    """runtime.json for a role: embed, classify, score or tokens."""
    tasks = {"embed": ["embed"], "classify": ["classify", "score"], "score": ["score"], "tokens": ["classify"]}[role]
    labels = {"names": list(LABELS[: 1 if role == "score" else 2]), "per_token": role == "tokens"}
    embedding = {"dimension": 3, "pooling": "mean", "normalized": False, "prompts": {}, "default_prompt": None}
    return {
        "format": 1,
        "model": "encoder",
        "tasks": tasks,
        "inputs": ["input_ids", "attention_mask", "token_type_ids"],
        "vocab_size": len(WORDS),
        "max_length": 8,
        "pad_token_id": 0,
        "embedding": embedding if role == "embed" else None,
        "labels": None if role == "embed" else {**labels, "activation": "softmax"},
        "session": {"threads": 1, "spinning": False},
        "precision": "fp32",
    } | changes


def write_encoder_graph(folder: Path, role: str = "embed", **changes: Any) -> Path:
    """Graph, tokenizer, runtime.json and manifest; `changes` are keys of runtime.json."""
    folder.mkdir(parents=True)
    runtime = runtime_json(role, **changes)
    width = 3 if role == "embed" else len(runtime["labels"]["names"])
    onnx.save(_model(role, width, runtime["inputs"]), folder / "model.onnx")
    word_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "runtime.json").write_text(json.dumps(runtime))
    write_manifest(folder, kind="graph")
    return folder


def _model(role: str, width: int, names: list[str]) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
    tokens, one = {"embed": "last_hidden_state", "tokens": "logits"}.get(role, "rows"), {"embed": "sentence_embedding"}
    text = one.get(role, "logits")
    nodes = [helper.make_node("Gather", ["table", "input_ids"], [tokens])]
    shapes = {tokens: ["batch", "sequence", width]} if tokens != "rows" else {}
    if role != "tokens":
        shapes[text] = ["batch", width]
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["weights"]),
            helper.make_node("Mul", [tokens, "weights"], ["weighted"]),
            helper.make_node("ReduceSum", ["weighted", "axis"], ["sum" if role == "embed" else text], keepdims=0),
        ]
    if role == "embed":
        nodes += [
            helper.make_node("ReduceSum", ["weights", "axis"], ["count"], keepdims=0),
            helper.make_node("Div", ["sum", "count"], [text]),
        ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    constants = {"table": table(width), "axis": np.array([1], np.int64), "last": np.array([-1], np.int64)}
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "encoder", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
