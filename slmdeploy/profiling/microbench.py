"""How fast this machine reads memory and multiplies matrices, measured in about a second and a half.

The three figures that a roofline is drawn from: read bandwidth (numpy), float32 products (numpy's BLAS) and 8-bit
products (ONNX Runtime's MatMulInteger, unsigned by signed, the kernel that W8A8 builds run on). Each is the best of
repetitions within a time limit, because other work on the machine can only slow it down. Knows no target.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from slmdeploy.profiling.wire import field

_BANDWIDTH_BYTES = 256 << 20
_SECONDS = 0.4
_SIZE = 1024
"""Rows and columns of the matrices: large enough for full speed, small enough for dozens of repetitions."""
_UINT8, _INT8, _INT32 = 2, 3, 6
_INPUT, _WEIGHT, _OUTPUT = "x", "w", "y"


def read_bandwidth(threads: int, memory: int | None) -> float:
    """Bytes per second that ``threads`` threads together read from memory; the best of several passes.

    The arrays are larger than the caches of most machines, so a very large shared cache makes it too high. numpy
    releases the interpreter while it reduces.
    """
    total = min(_BANDWIDTH_BYTES, (memory or 4 * _BANDWIDTH_BYTES) // 4)
    parts = [np.ones(max(1, total // threads // 8), np.int64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return sum(part.nbytes for part in parts) / _best_seconds(lambda: list(pool.map(np.max, parts)))


def fp32_peak() -> float:
    """Multiplications and additions per second of numpy's float32 matrix product, on all threads of its BLAS."""
    left, right = (np.full((_SIZE, _SIZE), 0.5, np.float32) for _ in range(2))
    result = np.empty_like(left)
    return 2 * _SIZE**3 / _best_seconds(lambda: np.matmul(left, right, out=result))


def int8_peak(threads: int) -> float:
    """The same of ONNX Runtime's MatMulInteger on ``threads`` threads, with weights that it has packed beforehand."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(matmul_integer_model(_SIZE), options, providers=["CPUExecutionProvider"])
    feeds = {_INPUT: np.full((_SIZE, _SIZE), 3, np.uint8)}
    return 2 * _SIZE**3 / _best_seconds(lambda: session.run([_OUTPUT], feeds))


def matmul_integer_model(size: int) -> bytes:
    """An ONNX model of one MatMulInteger: uint8 [size, size] times int8 weights of the same shape gives int32."""
    weight = field(1, size) + field(1, size) + field(2, _INT8) + field(8, _WEIGHT) + field(9, bytes([1]) * size * size)
    node = field(1, _INPUT) + field(1, _WEIGHT) + field(2, _OUTPUT) + field(4, "MatMulInteger")
    graph = (
        field(1, node)
        + field(2, "microbench")
        + field(5, weight)
        + field(11, _tensor(_INPUT, _UINT8, size))
        + field(12, _tensor(_OUTPUT, _INT32, size))
    )
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))  # ir_version, graph, opset_import.version


def _tensor(name: str, element: int, size: int) -> bytes:
    """A ValueInfoProto of shape [size, size]."""
    dimension = field(1, field(1, size))
    return field(1, name) + field(2, field(1, field(1, element) + field(2, dimension + dimension)))


def _best_seconds(work: Callable[[], object]) -> float:
    """Shortest time of ``work`` within the time limit, of one run at least; one run first, which does not count."""
    work()
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while True:
        started = time.perf_counter()
        work()
        ended = time.perf_counter()
        best = min(best, ended - started)
        if ended >= until:
            return best
