"""What cutting gate and up apart and letting the scale of up wait are worth: the measurement behind building/w8a8.py.

The MLP of a decoder, from its normalised input to the output of down, in three W8A8 forms that compute the same
numbers, and in fp32. Rounds are interleaved; the figure is the median CPU time of one thread.

    python benchmarks/gated_forms.py                                  # Qwen2.5-0.5B's widths
    python benchmarks/gated_forms.py --hidden 576 --intermediate 1536 # SmolLM2-135M's
"""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import typer
from rich.console import Console
from rich.table import Table

from slmdeploy.building.rewriting import remove_unused_initializers, weight_array
from slmdeploy.building.w8a8 import TokenQuantizer, cut_in_two

MICROSOFT = "com.microsoft"


class Scaling(TokenQuantizer):
    """The same without scales that wait."""

    def _without_scale(self, source: ir.Value) -> ir.Value | None:
        return None


def mlp(hidden: int, intermediate: int) -> ir.Model:
    """down(silu(gate) * up) with gate and up in one MatMul, in fp32."""
    random = np.random.default_rng(0)

    def constant(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)

    def weight(name: str, rows: int, columns: int) -> ir.Value:
        return constant(name, random.standard_normal((rows, columns)).astype(np.float32) * rows**-0.5)

    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", hidden]))
    constants = [weight("gate_up.weight", hidden, 2 * intermediate), weight("down.weight", intermediate, hidden)]
    constants.append(constant("sizes", np.array([intermediate, intermediate])))
    both = ir.node("MatMul", [source, constants[0]], name="gate_up")
    split = ir.node("Split", [both.outputs[0], constants[2]], {"axis": -1}, num_outputs=2, name="split")
    act = ir.node("QuickGelu", [split.outputs[0]], {"alpha": 1.0}, domain=MICROSOFT, name="act")
    product = ir.node("Mul", [act.outputs[0], split.outputs[1]], name="product")
    down = ir.node("MatMul", [product.outputs[0], constants[1]], name="down")
    down.outputs[0].name, down.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    nodes = [both, split, act, product, down]
    graph = ir.Graph(
        [source], [down.outputs[0]], nodes=nodes, initializers=constants, opset_imports={"": 21, MICROSOFT: 1}
    )
    return ir.Model(graph, ir_version=10)


def quantised(model: ir.Model, *, apart: bool, quantizer: type[TokenQuantizer]) -> ir.Model:
    """The model with its layers in W8A8."""
    layers = [node for node in model.graph if node.op_type == "MatMul"]
    halves = [half for node in layers for half in (cut_in_two(node) if apart else [node])]
    tokens = quantizer(model.graph)
    for node in halves:
        weight = node.inputs[1]
        assert weight is not None
        tokens.replace(node, weight_array(weight))
    remove_unused_initializers(model.graph)
    return model


def runner(model: ir.Model, rows: int) -> Callable[[], np.ndarray]:
    """Runs the model on `rows` random rows with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    made = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    width = made.get_inputs()[0].shape[1]
    binding = made.io_binding()
    x = np.random.default_rng(1).standard_normal((rows, width)).astype(np.float32)
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output("y")

    def run() -> np.ndarray:
        made.run_with_iobinding(binding)
        found: np.ndarray = binding.get_outputs()[0].numpy()
        return found

    return run


def cpu_ms(run: Callable[[], np.ndarray]) -> float:
    started = time.process_time()
    run()
    return (time.process_time() - started) * 1e3


def main(hidden: int = 896, intermediate: int = 4864, rows: str = "1,8,64,128,256,512", rounds: int = 15) -> None:
    """Print milliseconds of each form by number of rows, and the last one's speed."""
    names = ("fp32", "W8A8, one product", "gate and up apart", "and the scale of up waits")
    table = Table("rows", *names, "GOP/s of the last", title=f"MLP {hidden} x {intermediate}, ms of one thread")
    for count in map(int, rows.split(",")):
        models = [
            mlp(hidden, intermediate),
            quantised(mlp(hidden, intermediate), apart=False, quantizer=Scaling),
            quantised(mlp(hidden, intermediate), apart=True, quantizer=Scaling),
            quantised(mlp(hidden, intermediate), apart=True, quantizer=TokenQuantizer),
        ]
        runs = [runner(model, count) for model in models]
        exact = runs[0]()
        errors = [float(np.linalg.norm(run() - exact) / np.linalg.norm(exact)) for run in runs]
        assert max(errors) < 0.05, f"a form is wrong: {errors}"
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run, found in zip(runs, times, strict=True):
                found.append(cpu_ms(run))
        medians = [median(found) for found in times]
        speed = 6 * count * hidden * intermediate / medians[-1] / 1e6
        table.add_row(str(count), *(f"{ms:.3f}" for ms in medians), f"{speed:.0f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
