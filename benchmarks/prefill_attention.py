"""Which exact form of causal attention is fastest for a prompt on this CPU: the measurement behind prompts in pieces.

Every form goes from packed queries, keys and values [1, S, (heads + 2 kv_heads) D] to [1, S, heads D], rotary embedding
included, and is checked against GroupQueryAttention over the whole prompt. Rounds are interleaved; the figure is the
median CPU time of one thread, which other work on the machine disturbs least. "of peak" divides the operations of the
causal half, at the speed of a large fp32 MatMul in the same run, by that time.

    python benchmarks/prefill_attention.py
    python benchmarks/prefill_attention.py --heads 9 --kv-heads 3 --lengths 128,512,2048,8192
"""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
import typer
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

MICROSOFT = "com.microsoft"
FLOAT, INT32, INT64, INT8 = (getattr(onnx.TensorProto, name) for name in ("FLOAT", "INT32", "INT64", "INT8"))
BLOCK = 64
HIDDEN = -1e4
Run = Callable[[], np.ndarray]


class Shape:
    """Heads, KV heads, head width, and the rotary tables."""

    def __init__(self, heads: int, groups: int, dim: int, length: int) -> None:
        self.heads, self.groups, self.dim, self.length = heads, groups, dim, length
        self.width = (heads + 2 * groups) * dim
        angles = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, dim, 2) / dim)
        self.tables = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def session(
    shape: Shape,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    inputs: dict[str, tuple[int, list[int | str]]],
    *,
    opset: int = 21,
) -> ort.InferenceSession:
    """A session of one thread; the output is `out`."""
    every = [numpy_helper.from_array(array, name) for name, array in (shape.tables | constants).items()]
    sources = [helper.make_tensor_value_info(name, kind, size) for name, (kind, size) in inputs.items()]
    produced = {name for node in nodes for name in node.output}
    results = [helper.make_tensor_value_info("out", FLOAT, [1, "S", shape.heads * shape.dim])]
    for name in ("present_key", "present_value"):
        if name in produced:
            results.append(helper.make_tensor_value_info(name, inputs["past_key"][0], inputs["past_key"][1]))
    graph = helper.make_graph(nodes, "attention", sources, results, every)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    # exp of a hidden score may be a denormal number, on which the plain forms would be many times slower
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def grouped(shape: Shape, qkv: np.ndarray, piece: int, *, quantised: bool = False) -> Run:
    """GroupQueryAttention, `piece` tokens at a time behind what a shared buffer holds; optionally with int8 in it."""
    kind = INT8 if quantised else FLOAT
    names = ["qkv", "", "", "past_key", "past_value", "last", "total", "cos", "sin"]
    attributes: dict[str, int | str] = {"num_heads": shape.heads, "kv_num_heads": shape.groups, "do_rotary": 1}
    constants = {}
    if quantised:
        names += ["", "", "", "scale", "scale"]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        constants["scale"] = np.full(shape.groups * shape.dim, 5 / 127, np.float32)
    node = helper.make_node(
        "GroupQueryAttention", names, ["out", "present_key", "present_value"], domain=MICROSOFT, **attributes
    )
    cache: tuple[int, list[int | str]] = (kind, [1, shape.groups, "C", shape.dim])
    inputs = {"qkv": (FLOAT, [1, "S", shape.width]), "past_key": cache, "past_value": cache}
    made = session(shape, [node], constants, inputs | {"last": (INT32, [1]), "total": (INT32, [])})
    size = (1, shape.groups, shape.length, shape.dim)
    buffers = [np.zeros(size, np.int8 if quantised else np.float32) for _ in range(2)]
    out = np.empty((1, shape.length, shape.heads * shape.dim), np.float32)
    bindings = []
    for start in range(0, shape.length, piece):
        end = min(start + piece, shape.length)
        binding = made.io_binding()
        feeds = {"qkv": qkv[:, start:end], "last": np.array([end - 1], np.int32), "total": np.array(end, np.int32)}
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
        for part, buffer in zip(("key", "value"), buffers, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(f"past_{part}", value)
            binding.bind_ortvalue_output(f"present_{part}", value)
        binding.bind_ortvalue_output("out", ort.OrtValue.ortvalue_from_numpy(out[:, start:end]))
        bindings.append(binding)

    def run() -> np.ndarray:
        for binding in bindings:
            made.run_with_iobinding(binding)
        return out

    return run


def _heads_apart(shape: Shape) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Nodes from `qkv` to rotated `q`, `k` and to `v`, each [1, heads, S, D]."""
    counts = {"q": shape.heads, "k": shape.groups, "v": shape.groups}
    nodes = [helper.make_node("Split", ["qkv", "sizes"], ["q0", "k0", "v0"], axis=-1)]
    constants: dict[str, np.ndarray] = {"sizes": np.array([count * shape.dim for count in counts.values()])}
    for name, count in counts.items():
        source = f"{name}0"
        if name != "v":
            inputs = [source, "positions", "cos", "sin"]
            source = f"{name}1"
            nodes.append(helper.make_node("RotaryEmbedding", inputs, [source], domain=MICROSOFT, num_heads=count))
        constants[f"{name}_shape"] = np.array([1, -1, count, shape.dim])
        nodes.append(helper.make_node("Reshape", [source, f"{name}_shape"], [f"{name}2"]))
        nodes.append(helper.make_node("Transpose", [f"{name}2"], [name], perm=[0, 2, 1, 3]))
    return nodes, constants


def _side_by_side(shape: Shape, source: str) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    nodes = [
        helper.make_node("Reshape", [source, "apart"], ["apart_out"]),
        helper.make_node("Transpose", ["apart_out"], ["tokens"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["tokens", "wide"], ["out"]),
    ]
    wide = np.array([1, -1, shape.heads * shape.dim])
    return nodes, {"apart": np.array([1, shape.heads, -1, shape.dim]), "wide": wide}


def _of_graph(made: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> Run:
    binding = made.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    binding.bind_output("out")

    def run() -> np.ndarray:
        made.run_with_iobinding(binding)
        found: np.ndarray = binding.get_outputs()[0].numpy()
        return found

    return run


def _inputs(shape: Shape) -> dict[str, tuple[int, list[int | str]]]:
    return {"qkv": (FLOAT, [1, "S", shape.width]), "positions": (INT64, [1, "S"])}


def standard(shape: Shape, qkv: np.ndarray) -> Run:
    """The standard operator Attention of opset 23."""
    nodes, constants = _heads_apart(shape)
    nodes.append(helper.make_node("Attention", ["q", "k", "v"], ["mixed"], is_causal=1))
    tail, more = _side_by_side(shape, "mixed")
    made = session(shape, nodes + tail, constants | more, _inputs(shape), opset=23)
    return _of_graph(made, {"qkv": qkv, "positions": np.arange(shape.length)[None]})


def multi_head(shape: Shape, qkv: np.ndarray) -> Run:
    """MultiHeadAttention, whose keys and values have to be repeated for every query head."""
    nodes, constants = _heads_apart(shape)
    shared = shape.heads // shape.groups
    constants |= {"apart_kv": np.array([1, shape.groups, 1, -1, shape.dim]), "times": np.array([1, 1, shared, 1, 1])}
    constants["together"] = np.array([1, shape.heads, -1, shape.dim])
    for name in ("k", "v"):
        nodes += [
            helper.make_node("Reshape", [name, "apart_kv"], [f"{name}3"]),
            helper.make_node("Tile", [f"{name}3", "times"], [f"{name}4"]),
            helper.make_node("Reshape", [f"{name}4", "together"], [f"{name}5"]),
        ]
    nodes += [
        helper.make_node("Transpose", ["q"], ["q3"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["q3", "wide"], ["q4"]),
        helper.make_node("MultiHeadAttention", ["q4", "k5", "v5"], ["out"], domain=MICROSOFT,
                         num_heads=shape.heads, unidirectional=1),
    ]  # fmt: skip
    constants["wide"] = np.array([1, -1, shape.heads * shape.dim])
    made = session(shape, nodes, constants, _inputs(shape))
    return _of_graph(made, {"qkv": qkv, "positions": np.arange(shape.length)[None]})


def plain(shape: Shape, qkv: np.ndarray) -> Run:
    """MatMul, Softmax, MatMul over the whole prompt, query heads of a group stacked."""
    nodes, constants = _heads_apart(shape)
    shared = shape.heads // shape.groups
    constants["stacked"] = np.array([1, shape.groups, -1, shape.dim])
    nodes += [
        helper.make_node("Reshape", ["q", "stacked"], ["rows"]),
        helper.make_node("FusedMatMul", ["rows", "k"], ["scores"], domain=MICROSOFT, transB=1, alpha=shape.dim**-0.5),
        helper.make_node("Add", ["scores", "bias"], ["biased"]),
        helper.make_node("Softmax", ["biased"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["mixed"]),
    ]
    tail, more = _side_by_side(shape, "mixed")
    inputs = _inputs(shape) | {"bias": (FLOAT, [1, 1, "A", "S"])}
    made = session(shape, nodes + tail, constants | more, inputs)
    bias = np.tile(np.where(np.tri(shape.length, dtype=bool), 0, HIDDEN).astype(np.float32), (shared, 1))[None, None]
    return _of_graph(made, {"qkv": qkv, "positions": np.arange(shape.length)[None], "bias": bias})


def looped(shape: Shape, qkv: np.ndarray) -> Run:
    """The same for blocks of queries in a Loop, each against the keys up to its end."""
    nodes, constants = _heads_apart(shape)
    constants |= {name: np.array([n]) for name, n in (("zero", 0), ("axis2", 2), ("axis_last", -1), ("axis_rows", -2))}
    constants |= {
        "block": np.array(BLOCK),
        "stacked": np.array([1, shape.groups, -1, shape.dim]),
        "groups": np.array([1, shape.groups, shape.heads // shape.groups]),
        "apart": np.array([1, shape.heads, -1, shape.dim]),
        "wide": np.array([-1, shape.heads * shape.dim]),
        "batch": np.array([1, -1, shape.heads * shape.dim]),
    }
    steps: list[tuple[str, list[str], str, dict[str, object]]] = [
        ("Mul", ["turn", "block"], "start0", {}),
        ("Add", ["start0", "block"], "end0", {}),
        ("Unsqueeze", ["start0", "zero"], "start", {}),
        ("Unsqueeze", ["end0", "zero"], "end", {}),
        ("Slice", ["q", "start", "end", "axis2"], "queries", {}),
        ("Reshape", ["queries", "stacked"], "rows", {}),
        ("Slice", ["k", "zero", "end", "axis2"], "keys", {}),
        ("Slice", ["v", "zero", "end", "axis2"], "values", {}),
        ("FusedMatMul", ["rows", "keys"], "scores", {"domain": MICROSOFT, "transB": 1, "alpha": shape.dim**-0.5}),
        ("Slice", ["bias", "start", "end", "axis_rows"], "bias_rows", {}),
        ("Slice", ["bias_rows", "zero", "end", "axis_last"], "own_bias", {}),
        ("Shape", ["own_bias"], "bias_shape", {}),
        ("Concat", ["groups", "bias_shape"], "split_shape", {"axis": 0}),
        ("Reshape", ["scores", "split_shape"], "split_scores", {}),
        ("Add", ["split_scores", "own_bias"], "biased", {}),
        ("Softmax", ["biased"], "weights", {"axis": -1}),
        ("Shape", ["scores"], "scores_shape", {}),
        ("Reshape", ["weights", "scores_shape"], "stacked_weights", {}),
        ("MatMul", ["stacked_weights", "values"], "mixed", {}),
        ("Reshape", ["mixed", "apart"], "mixed_heads", {}),
        ("Transpose", ["mixed_heads"], "tokens", {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["tokens", "wide"], "done", {}),
        ("Identity", ["going"], "goes_on", {}),
    ]
    body_nodes = [helper.make_node(kind, inputs, [output], **more) for kind, inputs, output, more in steps]
    scalars = [
        helper.make_tensor_value_info("turn", INT64, []),
        helper.make_tensor_value_info("going", onnx.TensorProto.BOOL, []),
    ]
    ends = [
        helper.make_tensor_value_info("goes_on", onnx.TensorProto.BOOL, []),
        helper.make_tensor_value_info("done", FLOAT, [None, shape.heads * shape.dim]),
    ]
    body = helper.make_graph(body_nodes, "block", scalars, ends)
    nodes.append(helper.make_node("Loop", ["turns", ""], ["blocks"], body=body))
    nodes.append(helper.make_node("Reshape", ["blocks", "batch"], ["out"]))
    inputs = _inputs(shape) | {"bias": (FLOAT, ["S", "S"]), "turns": (INT64, [])}
    made = session(shape, nodes, constants, inputs)
    bias = np.where(np.tri(shape.length, dtype=bool), 0, HIDDEN).astype(np.float32)
    feeds = {"qkv": qkv, "positions": np.arange(shape.length)[None], "bias": bias}
    return _of_graph(made, feeds | {"turns": np.array(shape.length // BLOCK)})


def forms(shape: Shape, qkv: np.ndarray) -> dict[str, Run]:
    """Every form for one length."""
    pieces = [piece for piece in (512, 256, 128, 64) if piece < shape.length]
    found = {"GroupQueryAttention at once": grouped(shape, qkv, shape.length)}
    found |= {f"GroupQueryAttention, {piece} at a time": grouped(shape, qkv, piece) for piece in pieces}
    found["GroupQueryAttention at once, int8 KV (not exact)"] = grouped(shape, qkv, shape.length, quantised=True)
    if shape.length <= 2048:  # scores of all pairs at once: gigabytes beyond
        found |= {"MultiHeadAttention": multi_head(shape, qkv), "Attention (opset 23)": standard(shape, qkv)}
        found["MatMul, Softmax, MatMul"] = plain(shape, qkv)
    found[f"the same in a Loop over blocks of {BLOCK}"] = looped(shape, qkv)
    return found


def fp32_flops() -> float:
    """Operations per second of one thread in a large fp32 MatMul."""
    size = 1024
    a, b = (np.random.default_rng(i).standard_normal((size, size)).astype(np.float32) for i in range(2))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["out"])],
        "peak",
        [helper.make_tensor_value_info("a", FLOAT, [size, size])],
        [helper.make_tensor_value_info("out", FLOAT, [size, size])],
        [numpy_helper.from_array(b, "b")],
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    run = _of_graph(made, {"a": a})
    return 2 * size**3 / min(_cpu_seconds(run) for _ in range(8))


def _cpu_seconds(run: Run) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def measure(shape: Shape, rounds: int) -> list[tuple[str, float, float]]:
    """Name, milliseconds and largest difference from the first form, for each form."""
    qkv = np.random.default_rng(0).standard_normal((1, shape.length, shape.width)).astype(np.float32)
    candidates = forms(shape, qkv)
    exact = next(iter(candidates.values()))().copy()
    apart = {name: float(np.abs(run() - exact).max()) for name, run in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(_cpu_seconds(run))
    return [(name, median(seconds) * 1e3, apart[name]) for name, seconds in times.items()]


def main(heads: int = 14, kv_heads: int = 2, dim: int = 64, lengths: str = "128,512,2048", rounds: int = 9) -> None:
    """Print one table per length."""
    peak = fp32_flops()
    console = Console()
    console.print(f"fp32 MatMul, one thread: {peak / 1e9:.0f} GFLOP/s; ONNX Runtime {ort.__version__}")
    for length in map(int, lengths.split(",")):
        shape = Shape(heads, kv_heads, dim, length)
        table = Table(
            "form", "ms", "of peak", "difference", title=f"{length} tokens, {heads}/{kv_heads} heads of {dim}"
        )
        least = 2 * length * length * dim * heads / peak * 1e3
        for name, ms, apart in measure(shape, rounds):
            table.add_row(name, f"{ms:.2f}", f"{least / ms:.0%}", f"{apart:.1e}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
