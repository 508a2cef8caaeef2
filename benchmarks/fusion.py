"""Which fp32 form of a decoder block is fastest in ONNX Runtime on this CPU: `python benchmarks/fusion.py`.

Decides three things that export/decoder.py builds in: one MatMul for query, key and value or three; one MatMul for
gate and up followed by Split, or two; silu as Sigmoid and Mul or as QuickGelu(alpha=1). Each pair does the same
arithmetic on the same random weights. Variants run in turn (A B A B ...), so that a busy machine slows all alike;
printed are the median milliseconds of each and the ratio to the first. Knows nothing of checkpoints.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir import tape

SHAPES = {  # hidden, query heads, key/value heads, head size, intermediate
    "teacher 384": (384, 12, 4, 32, 1024),
    "SmolLM2-135M": (576, 9, 3, 64, 1536),
    "Qwen2.5-0.5B": (896, 14, 2, 64, 4864),
}
ROWS = (1, 128, 512)
LAYERS = 4  # repeated in one graph, so that a call's fixed cost does not hide the difference
Body = Callable[["Block", ir.Value, int], ir.Value]


class Block:
    """A graph under construction over random weights of one shape."""

    def __init__(self, shape: tuple[int, int, int, int, int]) -> None:
        self.hidden, self.heads, self.kv_heads, self.head_dim, self.intermediate = shape
        self.tape = tape.Tape()
        self.random = np.random.default_rng(0)

    def op(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: object) -> list:
        made = self.tape.op_multi_out(kind, inputs, attributes, num_outputs=outputs, domain=domain)
        return list(made)

    def constant(self, array: np.ndarray) -> ir.Value:
        return self.tape.initializer(ir.tensor(array, name=f"c{len(self.tape.initializers)}"))

    def linear(self, x: ir.Value, rows: int, columns: int) -> ir.Value:
        weight = self.random.standard_normal((rows, columns), dtype=np.float32) / np.float32(rows) ** 0.5
        return self.op("MatMul", x, self.constant(weight))[0]


def attention(block: Block, x: ir.Value, rows: int, *, fused: bool) -> ir.Value:
    widths = [n * block.head_dim for n in (block.heads, block.kv_heads, block.kv_heads)]
    if fused:
        projected: list[ir.Value | None] = [block.linear(x, block.hidden, sum(widths)), None, None]
    else:
        projected = [block.linear(x, block.hidden, width) for width in widths]
    past = block.constant(np.zeros((1, block.kv_heads, 0, block.head_dim), np.float32))
    lengths = [block.constant(np.array([rows - 1], np.int32)), block.constant(np.array(rows, np.int32))]
    attended = block.op(
        "GroupQueryAttention", *projected, past, past, *lengths,
        outputs=3, domain="com.microsoft", num_heads=block.heads, kv_num_heads=block.kv_heads,
    )  # fmt: skip
    return block.linear(attended[0], widths[0], block.hidden)


def mlp(block: Block, x: ir.Value, rows: int, *, fused: bool, quick: bool = True) -> ir.Value:
    if fused:
        both = block.linear(x, block.hidden, 2 * block.intermediate)
        gate, up = block.op("Split", both, outputs=2, axis=-1, num_outputs=2)
    else:
        gate, up = (block.linear(x, block.hidden, block.intermediate) for _ in range(2))
    if quick:
        active = block.op("QuickGelu", gate, domain="com.microsoft", alpha=1.0)[0]
    else:
        active = block.op("Mul", gate, block.op("Sigmoid", gate)[0])[0]
    return block.linear(block.op("Mul", active, up)[0], block.intermediate, block.hidden)


VARIANTS: dict[str, dict[str, Body]] = {
    "attention": {
        "three MatMul": lambda b, x, n: attention(b, x, n, fused=False),
        "fused QKV": lambda b, x, n: attention(b, x, n, fused=True),
    },
    "mlp": {
        "two MatMul": lambda b, x, n: mlp(b, x, n, fused=False),
        "fused gate/up": lambda b, x, n: mlp(b, x, n, fused=True),
    },
    "silu": {
        "Sigmoid, Mul": lambda b, x, n: mlp(b, x, n, fused=False, quick=False),
        "QuickGelu": lambda b, x, n: mlp(b, x, n, fused=False, quick=True),
    },
}


def session(shape: tuple[int, int, int, int, int], rows: int, body: Body, threads: int) -> onnxruntime.InferenceSession:
    block = Block(shape)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, rows, block.hidden]))
    y = x
    for _ in range(LAYERS):
        y = body(block, y, rows)
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([x], [y], nodes=block.tape.nodes, initializers=block.tape.initializers, opset_imports=opsets)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if body in (VARIANTS["silu"]["Sigmoid, Mul"],):
        options.graph_optimization_level = (
            onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        )  # else fused to QuickGelu
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def interleaved_ms(
    sessions: dict[str, onnxruntime.InferenceSession], x: np.ndarray, seconds: float
) -> dict[str, float]:
    for each in sessions.values():
        each.run(None, {"x": x})
    times: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, each in sessions.items():
            start = time.perf_counter()
            each.run(None, {"x": x})
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per comparison")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    arguments = parser.parse_args()
    for shape_name, shape in SHAPES.items():
        for part, variants in VARIANTS.items():
            for rows in ROWS:
                sessions = {name: session(shape, rows, body, arguments.threads) for name, body in variants.items()}
                x = np.random.default_rng(1).standard_normal((1, rows, shape[0]), dtype=np.float32)
                medians = interleaved_ms(sessions, x, arguments.seconds)
                first, *_ = medians.values()
                cells = [f"{name} {ms:.3f} ms ({ms / first:.2f})" for name, ms in medians.items()]
                print(f"{shape_name:13} {part:9} M={rows:<4}", " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
