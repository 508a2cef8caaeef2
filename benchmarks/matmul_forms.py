"""Which form of quantised matrix multiplication is fastest here: the measurement behind slmdeploy/building/w8a8.py.

Each form is a chain of layers K -> N -> K -> ... in a graph of its own, timed in interleaved rounds (A, B, C, A, ...),
so that a noisy neighbour hits all forms alike; the figure is the lower quartile of the CPU time of one thread, which a
busy machine disturbs least. Random weights: speed only, plus each form's error against fp32 (median over rows) on input
with one outlier row. Prints one table per shape:

    python benchmarks/matmul_forms.py
"""

import time
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime

from slmdeploy.building.blockwise import quantize_rows
from slmdeploy.building.w8a8 import quantize_columns

MICROSOFT = "com.microsoft"
Form = Callable[["Chain", ir.Value, np.ndarray], ir.Value]
SHAPES = [(m, 384, n) for n in (512, 1024) for m in (1, 32, 128, 512)] + [(1, 1024, 4096), (512, 1024, 4096)]


class Chain:
    """A graph under construction: adds nodes and constants, and ends as an ONNX Runtime session."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: int | float) -> ir.Value:
        node = ir.node(kind, inputs=list(inputs), attributes=attributes or None, domain=domain)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray | float) -> ir.Value:
        tensor = ir.tensor(np.asarray(array, np.float32) if isinstance(array, float) else array)
        name = f"constant_{len(self.constants)}"
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.constants.append(value)
        return value

    def session(self, source: ir.Value, result: ir.Value) -> onnxruntime.InferenceSession:
        result.name, result.type = "result", ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph([source], [result], nodes=self.nodes, initializers=self.constants,
                         opset_imports={"": 21, MICROSOFT: 1}, name="chain")  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def fp32(chain: Chain, x: ir.Value, weight: np.ndarray) -> ir.Value:
    return chain.op("MatMul", x, chain.constant(weight))


def rows_then_cast(chain: Chain, x: ir.Value, weight: np.ndarray) -> ir.Value:
    """Per-token W8A8 from the standard operators only: MatMulInteger, Cast, two multiplications."""
    values, scale = quantize_columns(weight)
    largest = chain.op("Max", chain.op("ReduceMax", chain.op("Abs", x), chain.constant(np.array([-1]))),
                       chain.constant(1e-30))  # fmt: skip
    step = chain.op("Mul", largest, chain.constant(1 / 127))
    zero = chain.constant(np.uint8(128))
    quantised = chain.op("QuantizeLinear", chain.op("Div", x, step), chain.constant(1.0), zero)
    product = chain.op("Cast", chain.op("MatMulInteger", quantised, chain.constant(values), zero), to=1)
    return chain.op("Mul", chain.op("Mul", product, step), chain.constant(scale))


def _folded(chain: Chain, x: ir.Value, weight: np.ndarray, largest: ir.Value) -> ir.Value:
    values, scale = quantize_columns(weight)
    zero = chain.constant(np.uint8(128))
    quantised = chain.op("QuantizeLinear", chain.op("Div", x, largest), chain.constant(1 / 127), zero)
    product = chain.op("MatMulIntegerToFloat", quantised, chain.constant(values), chain.constant(1 / 127),
                       chain.constant(scale), zero, domain=MICROSOFT)  # fmt: skip
    return chain.op("Mul", product, largest)


def rows_to_float(chain: Chain, x: ir.Value, weight: np.ndarray) -> ir.Value:
    """Per-token W8A8 with the scales folded into MatMulIntegerToFloat: one pass over the output instead of three."""
    axes, tiny = chain.constant(np.array([-1])), chain.constant(1e-30)
    return _folded(chain, x, weight, chain.op("Max", chain.op("ReduceMax", chain.op("Abs", x), axes), tiny))


def rows_min_max(chain: Chain, x: ir.Value, weight: np.ndarray) -> ir.Value:
    """The same with max|row| from ReduceMax and ReduceMin, which avoids writing |x|."""
    axes, tiny = chain.constant(np.array([-1])), chain.constant(1e-30)
    low = chain.op("Neg", chain.op("ReduceMin", x, axes))
    return _folded(chain, x, weight, chain.op("Max", chain.op("ReduceMax", x, axes), low, tiny))


def rows_blocked(chain: Chain, x: ir.Value, weight: np.ndarray) -> ir.Value:
    """The same with QuantizeLinear's blocked form (a block is a row), which avoids the division."""
    values, scale = quantize_columns(weight)
    axes, zero = chain.constant(np.array([-1])), chain.constant(np.uint8(128))
    largest = chain.op("ReduceMax", chain.op("Abs", x), axes)
    step = chain.op("Mul", chain.op("Gather", largest, chain.constant(np.array([0])), axis=-1), chain.constant(1 / 127))
    zeros = chain.op("QuantizeLinear", step, chain.constant(1e38), zero)  # the zero point in the shape of step
    quantised = chain.op("QuantizeLinear", x, step, zeros, axis=1, block_size=weight.shape[0])
    product = chain.op("MatMulIntegerToFloat", quantised, chain.constant(values), chain.constant(1.0),
                       chain.constant(scale), zero, domain=MICROSOFT)  # fmt: skip
    return chain.op("Mul", product, step)


def tensor_dynamic(chain: Chain, x: ir.Value, weight: np.ndarray) -> ir.Value:
    """DynamicQuantizeMatMul: one activation scale for the whole tensor, so a row's result depends on its neighbours."""
    values, scale = quantize_columns(weight)
    return chain.op("DynamicQuantizeMatMul", x, chain.constant(values), chain.constant(scale), domain=MICROSOFT)


def tensor_integer(chain: Chain, x: ir.Value, weight: np.ndarray) -> ir.Value:
    """One dynamic scale per tensor in standard operators, which ONNX Runtime fuses into one or two of its own."""
    values, scale = quantize_columns(weight)
    node = ir.node("DynamicQuantizeLinear", inputs=[x], num_outputs=3)
    chain.nodes.append(node)
    rows, step, zero = node.outputs
    product = chain.op("Cast", chain.op("MatMulInteger", rows, chain.constant(values), zero), to=1)
    return chain.op("Mul", product, chain.op("Mul", step, chain.constant(scale)))


STATIC_STEP = 4 / 127
"""Of the static forms: random rows of unit variance lose little beyond four deviations, the outlier row nearly all."""


def static_to_float(chain: Chain, x: ir.Value, weight: np.ndarray) -> ir.Value:
    """One scale per tensor that calibration found beforehand: no pass over the rows for their range, none behind."""
    values, scale = quantize_columns(weight)
    zero = chain.constant(np.uint8(128))
    rows = chain.op("QuantizeLinear", x, chain.constant(STATIC_STEP), zero)
    return chain.op("MatMulIntegerToFloat", rows, chain.constant(values), chain.constant(STATIC_STEP),
                    chain.constant(scale), zero, domain=MICROSOFT)  # fmt: skip


def static_qdq(chain: Chain, x: ir.Value, weight: np.ndarray) -> ir.Value:
    """The same as QuantizeLinear and DequantizeLinear around a MatMul, for ONNX Runtime to fuse."""
    values, scale = quantize_columns(weight)
    step, zero = chain.constant(STATIC_STEP), chain.constant(np.uint8(128))
    rows = chain.op("DequantizeLinear", chain.op("QuantizeLinear", x, step, zero), step, zero)
    zeros = chain.constant(np.zeros(scale.shape, np.int8))
    return chain.op("MatMul", rows, chain.op("DequantizeLinear", chain.constant(values), chain.constant(scale), zeros,
                                             axis=1))  # fmt: skip


def static_qdq_both_ends(chain: Chain, x: ir.Value, weight: np.ndarray) -> ir.Value:
    """The same with a quantised output too, which ONNX Runtime fuses into QLinearMatMul."""
    step, zero = chain.constant(STATIC_STEP), chain.constant(np.uint8(128))
    product = static_qdq(chain, x, weight)
    return chain.op("DequantizeLinear", chain.op("QuantizeLinear", product, step, zero), step, zero)


def blockwise(bits: int, block: int, *, symmetric: bool = True) -> Form:
    def form(chain: Chain, x: ir.Value, weight: np.ndarray) -> ir.Value:
        packed = quantize_rows(np.ascontiguousarray(weight.T), bits=bits, block_size=block, symmetric=symmetric)
        attributes = {"K": weight.shape[0], "N": weight.shape[1], "bits": bits, "block_size": block,
                      "accuracy_level": 4}  # fmt: skip
        inputs = [x, chain.constant(packed.values), chain.constant(packed.scales)]
        if packed.zero_points is not None:
            inputs.append(chain.constant(packed.zero_points))
        return chain.op("MatMulNBits", *inputs, domain=MICROSOFT, **attributes)

    return form


FORMS: dict[str, Form] = {
    "fp32": fp32,
    "rows, cast, two muls": rows_then_cast,
    "rows, to float": rows_to_float,
    "rows, min and max": rows_min_max,
    "rows, blocked quantize": rows_blocked,
    "tensor, dynamic": tensor_dynamic,
    "tensor, MatMulInteger": tensor_integer,
    "static, to float": static_to_float,
    "static, QDQ": static_qdq,
    "static, QDQ at both ends": static_qdq_both_ends,
    "8 bit, block 128": blockwise(8, 128),
    "8 bit, block 32": blockwise(8, 32),
    "4 bit, block 128": blockwise(4, 128),
    "4 bit, block 32": blockwise(4, 32),
    "4 bit, block 32, zero points": blockwise(4, 32, symmetric=False),
}


def chain_of(form: Form, weights: list[np.ndarray]) -> onnxruntime.InferenceSession:
    chain = Chain()
    x = source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["M", weights[0].shape[0]]))
    for weight in weights:
        x = form(chain, x, weight)
    return chain.session(source, x)


def relative_error(form: Form, rows: np.ndarray, weight: np.ndarray) -> float:
    exact = rows @ weight
    found = chain_of(form, [weight]).run(None, {"x": rows})[0]
    return float(np.median(np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)))


def measure(m: int, k: int, n: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    layers = 12 if k * n < 1 << 21 else 4
    sizes = [(k, n) if i % 2 == 0 else (n, k) for i in range(layers)]
    weights = [(rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32) for s in sizes]
    rows = rng.standard_normal((m, k)).astype(np.float32)
    sessions = {name: chain_of(form, weights) for name, form in FORMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for turn in range(rounds + 2):
        for name, session in sessions.items():
            start = time.process_time()
            session.run(None, {"x": rows})
            if turn >= 2:
                seconds[name].append(time.process_time() - start)
    outlier = rng.standard_normal((8, k)).astype(np.float32)
    outlier[3] *= 50
    base = np.percentile(seconds["fp32"], 25)
    print(f"\nM={m} K={k} N={n}, {layers} layers: microseconds per layer, speed-up, relative error")
    for name, form in FORMS.items():
        typical = np.percentile(seconds[name], 25)
        error = relative_error(form, outlier[[0, 1, 2, 3]], weights[0])
        print(f"  {name:28} {typical / layers * 1e6:9.1f} {base / typical:6.2f}x  {error:.4f}")


def main() -> None:
    for m, k, n in SHAPES:
        measure(m, k, n, rounds=31 if m * k * n < 1 << 30 else 9)


if __name__ == "__main__":
    main()
