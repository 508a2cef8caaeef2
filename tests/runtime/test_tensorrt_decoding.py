"""The decoder of a compiled plan, over a device that is the host's memory and phases that ONNX Runtime computes.

What is tested is ours: which buffer is read and written when, shapes, types, the recorded step. What is not is
TensorRT and a GPU: their names are checked in test_tensorrt_api.py, and nothing here says that they run.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from slmdeploy.errors import InputError
from slmdeploy.exporting.export import export
from slmdeploy.runtime.bundle import RuntimeConfig, read_runtime
from slmdeploy.runtime.model import load
from slmdeploy.runtime.tensorrt_decoding import TensorRTDecoder
from tests.exporting.families import CASES, write_case

IDS = np.arange(3, 30)


class HostDevice:
    """Memory of this process; work is done when it is queued, or kept while it is captured."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.launches = 0

    def allocate(self, size: int) -> int:
        block = np.full(size, 0xAB, np.uint8)
        self.memory[block.ctypes.data] = block
        return block.ctypes.data

    def release(self, address: int) -> None:
        del self.memory[address]

    def upload(self, array: np.ndarray[Any, Any], address: int) -> None:
        assert array.nbytes <= self.memory[address].nbytes
        assert array.flags.c_contiguous
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: np.ndarray[Any, Any]) -> None:
        assert array.nbytes <= self.memory[address].nbytes
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def wait(self) -> None:
        assert self.capturing is None, "a stream that records cannot be waited for"

    def begin_capture(self) -> None:
        self.capturing = []

    def end_capture(self) -> "HostRecording":
        assert self.capturing is not None
        work, self.capturing = self.capturing, None
        return HostRecording(self, work)


class HostRecording:
    def __init__(self, device: HostDevice, work: list[Callable[[], None]]) -> None:
        self.device, self.work = device, work

    def launch(self) -> None:
        self.device.launches += 1
        for one in self.work:
            one()


class HostCall:
    """model.onnx over what lies at the addresses."""

    def __init__(self, session: ort.InferenceSession, device: HostDevice) -> None:
        self.session, self.device = session, device
        self.types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
        self.inputs: dict[str, tuple[tuple[int, ...], int]] = {}
        self.outputs: dict[str, int] = {}

    def set_input(self, name: str, shape: tuple[int, ...], address: int) -> None:
        assert name in {node.name for node in self.session.get_inputs()}
        self.inputs[name] = shape, address

    def set_output(self, name: str, address: int) -> None:
        self.outputs[name] = address

    def run(self) -> None:
        work = self._work(dict(self.inputs), dict(self.outputs))
        if self.device.capturing is None:
            work()
        else:
            self.device.capturing.append(work)

    def _work(self, inputs: dict[str, tuple[tuple[int, ...], int]], outputs: dict[str, int]) -> Callable[[], None]:
        def work() -> None:
            types = {node.name: self.types[node.type] for node in self.session.get_inputs()}
            feeds = {name: self._read(address, shape, types[name]) for name, (shape, address) in inputs.items()}
            for name, value in zip(outputs, self.session.run(list(outputs), feeds), strict=True):
                self.device.upload(np.ascontiguousarray(value), outputs[name])

        return work

    def _read(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        array = np.empty(shape, dtype)
        self.device.download(address, array)
        return array


@pytest.fixture(scope="module", params=[21, 24])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that concatenates its cache, and one that scatters into it."""
    folder = tmp_path_factory.mktemp("graph")
    write_case(CASES["llama-gqa"], folder / "checkpoint")
    options: dict[str, Any] = {"tasks": ("generate",), "dialect": "portable", "opset": request.param, "parity": False}
    return export(folder / "checkpoint", out=folder / "graph", **options).path


def opened(graph: Path) -> tuple[TensorRTDecoder, HostDevice, RuntimeConfig]:
    device, config = HostDevice(), read_runtime(graph)
    session = ort.InferenceSession(str(graph / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}
    return TensorRTDecoder(config, lambda phase: HostCall(session, device), device, names), device, config


def near(found: Any, exact: Any) -> bool:
    return bool(np.allclose(found, exact, atol=1e-4))


def test_prompts_and_steps_are_those_of_the_graph(graph: Path) -> None:
    decoder, device, config = opened(graph)
    exact = load(graph, threads=1).logits(IDS.tolist())
    assert near(decoder.logits(IDS[:5]), exact[:5])
    assert near(decoder.prefill(IDS[:9]), exact[8])
    for place in range(9, IDS.size):
        assert near(decoder.step(int(IDS[place])), exact[place])
    assert (decoder.length, decoder.sequence) == (IDS.size, 2)
    assert (device.launches > 0) == (config.interface == "static")


def test_a_longer_prompt_between_steps_does_not_move_what_steps_read(graph: Path) -> None:
    decoder, _, _ = opened(graph)
    model = load(graph, threads=1)
    decoder.prefill(IDS[:4])
    decoder.step(7)
    decoder.step(8)
    decoder.prefill(IDS)
    assert near(decoder.step(9), model.logits([*IDS.tolist(), 9])[-1])


def test_a_batch_leaves_the_sequence_as_it_was(graph: Path) -> None:
    decoder, _, _ = opened(graph)
    model = load(graph, threads=1)
    decoder.prefill(IDS[:6])
    rows = [IDS[:3], IDS[4:20]]
    for found, row in zip(decoder.batch(rows), rows, strict=True):
        assert near(found, model.logits(row.tolist())[-1])
    assert near(decoder.step(11), model.logits([*IDS[:6].tolist(), 11])[-1])


def test_more_than_the_context_is_refused(graph: Path) -> None:
    decoder, _, config = opened(graph)
    with pytest.raises(InputError, match=f"holds {config.max_length}"):
        decoder.prefill(np.zeros(config.max_length + 1, np.int64))
