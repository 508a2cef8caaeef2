"""The smallest encoder that has all that a compiler for GPUs fuses, as the tracer writes it, in its folder.

One layer: queries, keys and values each with a product of their own, scaled products under a mask, a dense layer behind
them, another that widens, and the mean of the tokens. No torch, so that it takes no time.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from slmdeploy.exporting.encoder_portable import make_portable
from tests.graphs import write_manifest
from tests.runtime.encoder_graphs import WORDS, runtime_json, word_tokenizer

WIDTH, HEADS, WIDE = 64, 2, 80
INPUTS = ["input_ids", "attention_mask"]
HEADER = f"""<ir_version: 10, opset_import: ["": 18]>
encoder (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask) =>
(float[batch,sequence,{WIDTH}] last_hidden_state, float[batch,{WIDTH}] sentence_embedding)"""
BODY = """{
    x = Gather(table, input_ids)
    hidden = Cast<to = 1>(attention_mask)
    absent = Sub(one, hidden)
    far = Mul(absent, lowest)
    bias = Unsqueeze(far, middle)
    q0 = MatMul(x, wq)
    q1 = Add(q0, bq)
    k1 = MatMul(x, wk)
    v0 = MatMul(x, wv)
    v1 = Add(bv, v0)
    q2 = Reshape(q1, cut)
    k2 = Reshape(k1, cut)
    v2 = Reshape(v1, cut)
    q3 = Transpose<perm = [0, 2, 1, 3]>(q2)
    v = Transpose<perm = [0, 2, 1, 3]>(v2)
    k = Transpose<perm = [0, 2, 3, 1]>(k2)
    q = Mul(q3, root)
    kt = Mul(k, root)
    raw = MatMul(q, kt)
    masked = Add(raw, bias)
    shares = Softmax<axis = -1>(masked)
    mixed = MatMul(shares, v)
    turned = Transpose<perm = [0, 2, 1, 3]>(mixed)
    joined = Reshape(turned, join)
    dense = MatMul(joined, wo)
    sum = Add(dense, x)
    normal = LayerNormalization<axis = -1>(sum, gain, shift)
    up = MatMul(normal, wu)
    active = Relu(up)
    down = MatMul(active, wd)
    last_hidden_state = Add(down, normal)
    weights = Unsqueeze(hidden, last)
    weighted = Mul(last_hidden_state, weights)
    total = ReduceSum<keepdims = 0>(weighted, tokens)
    count = ReduceSum<keepdims = 0>(weights, tokens)
    sentence_embedding = Div(total, count)
}"""


def traced(body: str = BODY) -> ir.Model:
    """The graph as it is traced, in opset 18; products are named by their outputs."""
    random = np.random.default_rng(0)
    constants: dict[str, NDArray[Any]] = {
        "table": random.standard_normal((len(WORDS), WIDTH)).astype(np.float32),
        "wu": random.standard_normal((WIDTH, WIDE)).astype(np.float32) / 8,
        "wd": random.standard_normal((WIDE, WIDTH)).astype(np.float32) / 8,
        "cut": np.array([0, 0, HEADS, -1]),
        "join": np.array([0, 0, WIDTH]),
        "root": np.float32(0.4),
        "one": np.float32(1),
        "lowest": np.float32(np.finfo(np.float32).min),
        "middle": np.array([1, 2]),
        "last": np.array([-1]),
        "tokens": np.array([1]),
    }
    constants |= {n: random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 8 for n in ("wq", "wk", "wv", "wo")}
    constants |= {n: random.standard_normal(WIDTH).astype(np.float32) for n in ("bq", "bv", "gain", "shift")}
    proto = parser.parse_model(HEADER + body)
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items() if k in read)
    for node in proto.graph.node:
        node.name = f"layer.{node.output[0]}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def write_portable_encoder(folder: Path, opset: int = 23) -> Path:
    """A graph folder of the portable dialect: an embedder of vectors of 64 numbers, 32 tokens at most."""
    folder.mkdir(parents=True)
    model = traced()
    make_portable(model, opset)
    ir.save(model, folder / "model.onnx")
    word_tokenizer().save(str(folder / "tokenizer.json"))
    embedding = {"dimension": WIDTH, "pooling": "mean", "normalized": False, "prompts": {}, "default_prompt": None}
    runtime = runtime_json(inputs=INPUTS, max_length=32, embedding=embedding)
    (folder / "runtime.json").write_text(json.dumps(runtime))
    write_manifest(folder, kind="graph")
    return folder
