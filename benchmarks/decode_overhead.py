"""What of a decode step is not the model: Python, and ONNX Runtime's own cost per run and per node.

    python benchmarks/decode_overhead.py [--shapes 5M 15M 30M 100M] [--profiles cpu-int4 cpu-int8] [--steps 400]

Makes random-weight Llamas of four sizes, exports and quantises them (no gates), and generates greedily with 1 and with
2 threads in turn. Medians over steps, in microseconds:

step      from one token to the next
python    the step without `run_with_iobinding`: sampling, binding, the generator; share is python / step
nodes     nodes of model.onnx; fixed is what ONNX Runtime spends on as many nodes that do nothing, from two graphs of
          scalar additions that are 1 and 401 nodes long

The last line on stdout is one JSON object.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from slmdeploy.building.onnxruntime import read_model, write_folder
from slmdeploy.building.quantize import plan_for, quantize
from slmdeploy.exporting.export import export
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.session import Binding
from slmdeploy.runtime.text import load_tokenizer
from slmdeploy.specs import load_profile
from tests.exporting.checkpoints import write_checkpoint

SHAPES = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "5M": (192, 512, 6, 6, 2, 8192),
    "15M": (384, 1024, 6, 6, 2, 8192),
    "30M": (512, 1408, 8, 8, 2, 8192),
    "100M": (768, 2048, 12, 12, 4, 16384),
}
THREADS = (1, 2)
PROMPT, ROUNDS, LONG = 64, 4, 401


def write_build(folder: Path, shape: str, profiles: list[str]) -> None:
    """One folder per profile below ``folder``: a random Llama of this shape, quantised as the profile says."""
    hidden, inner, layers, heads, kv_heads, vocab = SHAPES[shape]
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads}
    write_checkpoint(folder / "checkpoint", **sizes, **attention, max_position_embeddings=2048, initializer_range=0.02)
    export(folder / "checkpoint", out=folder / "graph", tasks=("generate",), parity=False)
    for name in profiles:
        profile, model = load_profile(name), read_model(folder / "graph")
        quantize(model, plan_for(profile, model))
        (folder / name).mkdir()
        write_folder(model, folder / "graph", folder / name, precision=name, session=profile.session)


class Timed:
    """Adds up what the runs of sessions take."""

    def __init__(self) -> None:
        self.inside_ns = 0
        run = Binding.run

        def timed(binding: Binding) -> None:
            started = time.perf_counter_ns()
            run(binding)
            self.inside_ns += time.perf_counter_ns() - started

        Binding.run = timed  # type: ignore[method-assign]


def step_times(model: Model, timed: Timed, steps: int) -> tuple[list[float], list[float]]:
    """Microseconds of each step and of its part outside the session."""
    ids = np.random.default_rng(0).integers(0, model.runtime.vocab_size, PROMPT).tolist()
    stream = model.generate_ids(ids, max_new_tokens=steps + 1, ignore_eos=True)
    next(stream)
    whole, outside = [], []
    for _ in range(steps):
        before, started = timed.inside_ns, time.perf_counter_ns()
        next(stream)
        elapsed = time.perf_counter_ns() - started
        whole.append(elapsed / 1e3)
        outside.append((elapsed - (timed.inside_ns - before)) / 1e3)
    return whole, outside


def chain(nodes: int, threads: int) -> float:
    """Median microseconds of one run of a graph of scalar additions, one behind the other."""
    names = [f"x{i}" for i in range(nodes + 1)]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in (names[0], names[-1])]
    body = [helper.make_node("Add", [a, names[0]], [b]) for a, b in itertools.pairwise(names)]
    graph = helper.make_graph(body, "chain", value[:1], value[1:])
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input(names[0], ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32)))
    binding.bind_ortvalue_output(names[-1], ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32)))
    times = []
    for _ in range(500):
        started = time.perf_counter_ns()
        session.run_with_iobinding(binding)
        times.append((time.perf_counter_ns() - started) / 1e3)
    return statistics.median(times)


def main() -> None:
    """Measure every shape under every profile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--profiles", nargs="+", default=["cpu-int4", "cpu-int8"])
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    timed, rows = Timed(), []
    one, long = (statistics.median(chain(nodes, 1) for _ in range(5)) for nodes in (1, LONG))
    per_node = (long - one) / (LONG - 1)
    print(f"ONNX Runtime: {one:.1f} us for a run of one node, {per_node:.2f} us for each further node")
    print(f"{'shape':6} {'profile':16} {'threads':>7} {'step':>8} {'python':>7} {'share':>6} {'nodes':>6} {'fixed':>6}")
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            write_build(Path(scratch), shape, options.profiles)
            for profile in options.profiles:
                folder = Path(scratch) / profile
                nodes = len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)
                runtime, tokenizer = read_runtime(folder), load_tokenizer(folder)
                found: dict[int, tuple[list[float], list[float]]] = {count: ([], []) for count in THREADS}
                for turn in range(1 + ROUNDS):
                    for count in THREADS:
                        times = step_times(Model(folder, runtime, tokenizer, count), timed, options.steps // ROUNDS)
                        if turn:
                            for kept, new in zip(found[count], times, strict=True):
                                kept += new
                for count, (whole, outside) in found.items():
                    step, python = statistics.median(whole), statistics.median(outside)
                    fixed = one + per_node * nodes
                    row = {"shape": shape, "profile": profile, "threads": count, "step_us": step, "python_us": python}
                    rows.append(row | {"nodes": nodes, "fixed_us": fixed})
                    print(
                        f"{shape:6} {profile:16} {count:7} {step:8.0f} {python:7.1f} {python / step:6.1%} {nodes:6} "
                        f"{fixed:6.0f}",
                        flush=True,
                    )
    print(json.dumps({"run_us": one, "node_us": per_node, "rows": rows}))


if __name__ == "__main__":
    main()
