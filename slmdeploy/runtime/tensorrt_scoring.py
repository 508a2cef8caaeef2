"""Runs a compiled scorer on a GPU: the Scorer of scoring.py over the two phases of model.plan.

The prefix runs in one phase, items behind it in the other. What is read lies on the GPU until another array takes its
place, so the keys and values of a prefix are sent once for all its items; when a prefix is new they come back to the
host, where scoring.py keeps prefixes. Reaches the GPU through `Device` and `Call` alone, so tests put ONNX Runtime and
the host's memory behind those. Knows nothing of text or who compiled the plan. **Not run on a GPU yet.**
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from .bundle import RuntimeConfig, ScoreConfig
from .errors import InputError
from .scoring import RUN_TOKENS, Ids, Lane, Scorer, ScoreRun
from .session import Array, kv_names
from .tensorrt_memory import Buffer, Device
from .tensorrt_session import Call

_LOGITS = "label_logits"
_FLOAT_BYTES = 4


class TensorRTScorer(Scorer):
    """A plan that scores, with memory on ``device``; ``phase`` gives the calls of its phases."""

    def __init__(
        self, folder: Path, config: RuntimeConfig, score: ScoreConfig, phase: Callable[[str], Call], device: Device
    ) -> None:
        super().__init__(folder, replace(config, parallel_items=False), score, 1)
        self._phase, self._device = phase, device

    def begin(self, prefix: Ids, items: Sequence[Ids]) -> ScoreRun:
        """As of Scorer; InputError for an item that is longer than what the plan was compiled for."""
        for index, item in enumerate(items):
            if item.size > RUN_TOKENS:
                raise InputError(f"Item {index} has {item.size} tokens, and a plan takes {RUN_TOKENS}: shorten it.")
        return super().begin(prefix, items)

    def _open(self, threads: int, count: int) -> list[Lane]:
        bound = BoundPlan(self._config, self._labels, self._phase, self._device)
        return [Lane(bound, self._config, self._labels, self._nothing)]


class BoundPlan:
    """The phases of a scorer's plan as scoring.py's `Bound`, over one set of buffers on the device."""

    def __init__(self, config: RuntimeConfig, labels: int, phase: Callable[[str], Call], device: Device) -> None:
        self._calls = {name: phase(name) for name in ("prefix", "items")}
        self._device, self._labels, self._number = device, labels, np.dtype(config.cache).itemsize
        self._pasts, self._presents = kv_names(config.layers)
        self._buffers: dict[str, Buffer] = {}
        self._sent: dict[str, Array] = {}
        self._wanted: dict[str, Array] = {}

    def read(self, name: str, array: Array) -> None:
        """Send an array, which runs to come read as `name`."""
        sent: Array = np.require(array, requirements="C")
        self._sent[name] = sent  # copies may still read it when this returns
        self._device.upload(sent, self._room(name, sent.nbytes))

    def write(self, name: str, array: Array) -> None:
        """Fill an array with `name` in the runs to come."""
        self._wanted[name] = array

    def write_nothing(self) -> None:
        """Bring nothing back that is not asked for anew."""
        self._wanted.clear()

    def run(self) -> None:
        """One run, and what is wanted of it."""
        rows = self._sent["logits_positions"].size
        call = self._calls["items" if rows else "prefix"]
        for name, array in self._sent.items():
            call.set_input(name, array.shape, self._buffers[name].address)
        for name, size in self._sizes(rows).items():  # a plan writes all that it has, wanted or not
            call.set_output(name, self._room(name, size))
        call.run()
        for name, array in self._wanted.items():
            self._device.download(self._buffers[name].address, array)
        self._device.wait()

    def _sizes(self, rows: int) -> dict[str, int]:
        """Bytes of each output of the next run."""
        found = {_LOGITS: rows * self._labels * _FLOAT_BYTES}
        for past, present in zip(self._pasts, self._presents, strict=True):
            _, length, width = self._sent[past].shape
            found[present] = (length + self._sent["input_ids"].size) * width * self._number
        return found

    def _room(self, name: str, size: int) -> int:
        """The address of a buffer of so many bytes, at least one: an empty tensor has an address too."""
        buffer = self._buffers.setdefault(name, Buffer(self._device))
        buffer.hold(max(1, size))
        return buffer.address
