"""The physical limits of the machine, measured in the same run: read bandwidth and the peaks of 8-bit, bf16 and fp32.

The peak of a type is the fastest square-ish product that a common library reaches: ONNX Runtime's MatMulInteger and
torch's oneDNN for 8 bits, torch for the others. Run as `python -m benchmarks.peers.limits THREADS`; the last line is
one JSON object. In a process of its own, so that its pools and buffers disturb nobody.
"""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

_ROWS, _WIDTH = 1024, 4096
_BUFFER_BYTES = 1 << 30
"""Far above any shared cache, so that what is read comes from memory."""


def bandwidth(threads: int) -> float:
    """Bytes per second that all threads together read."""
    parts = [np.ones(_BUFFER_BYTES // threads // 8, np.int64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        best = _best(lambda: list(pool.map(np.max, parts)), passes=6)
    return sum(part.nbytes for part in parts) / best


def _best(work: Callable[[], object], passes: int) -> float:
    """Seconds of the fastest pass but the first."""
    taken = []
    for _ in range(passes + 1):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def _peak(work: Callable[[], object]) -> float:
    return 2.0 * _ROWS * _WIDTH * _WIDTH / _best(work, passes=8)


def torch_peaks(threads: int) -> dict[str, float]:
    """Operations per second of torch's products by type."""
    import torch

    torch.set_num_threads(threads)
    found = {}
    with torch.inference_mode():
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = torch.randn(_ROWS, _WIDTH).to(dtype), torch.randn(_WIDTH, _WIDTH).to(dtype)
            found[name] = _peak(partial(torch.matmul, a, b))
        left = torch.randint(-127, 127, (_ROWS, _WIDTH), dtype=torch.int8)
        right = torch.randint(-127, 127, (_WIDTH, _WIDTH), dtype=torch.int8)
        found["int8 (torch)"] = _peak(lambda: torch._int_mm(left, right))
    return found


def onnxruntime_peak(threads: int) -> float:
    """Operations per second of MatMulInteger, unsigned activations times signed weights."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.integers(-127, 127, (_WIDTH, _WIDTH), np.int8), "w")
    zero = numpy_helper.from_array(np.array(128, np.uint8), "zero")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])],
        "peak",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [_ROWS, _WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [_ROWS, _WIDTH])],
        [weight, zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": rng.integers(0, 255, (_ROWS, _WIDTH), np.uint8)}
    return _peak(lambda: session.run(None, feed))


def measure(threads: int) -> dict[str, float]:
    """All limits: bytes per second under "bandwidth", operations per second under the types."""
    found = {"bandwidth": bandwidth(threads), "int8 (onnxruntime)": onnxruntime_peak(threads), **torch_peaks(threads)}
    return found | {"int8": max(found["int8 (onnxruntime)"], found["int8 (torch)"])}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
