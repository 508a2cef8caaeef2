"""Runs a compiled encoder on a GPU: the twin of encoding.py's Encoder over model.plan.

Rows, batches and checks are those of encoding.py; only what runs a batch is another. Reaches the GPU through `Device`
and `Call` alone, so tests put ONNX Runtime and the host's memory behind those. Knows nothing of what an output means or
who compiled the plan. **Not run on a GPU yet.**
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .encoder_config import EncoderConfig
from .encoding import Encoder, Floats, Row, feed
from .tensorrt_memory import Buffer, Device
from .tensorrt_plan import PLAN
from .tensorrt_session import Call

Shape = tuple[int, ...]


class TensorRTEncoder(Encoder):
    """The phase of an encoder's plan, with memory on ``device``.

    outputs: the shape of each output by name, -1 for the rows of a batch and their tokens. rows: those of the largest
    batch that the plan takes.
    """

    batch_tokens = 1 << 24  # a plan bounds the rows of a batch and their length, not the two together

    def __init__(
        self, folder: Path, config: EncoderConfig, call: Call, device: Device, outputs: Mapping[str, Shape], rows: int
    ) -> None:
        self._config, self._path, self._shapes = config, folder / PLAN, outputs
        self._call, self._device, self.batch_rows = call, device, rows
        self._places = {name: Buffer(device) for name in (*config.inputs, *outputs)}
        self._check_interface()

    @property
    def inputs(self) -> dict[str, str]:
        """The element type of each input by name, as ONNX Runtime writes it."""
        return dict.fromkeys(self._config.inputs, "tensor(int64)")

    @property
    def outputs(self) -> Mapping[str, Sequence[int | str | None]]:
        """The shape of each output by name."""
        return {name: [None if size < 0 else size for size in shape] for name, shape in self._shapes.items()}

    def run(self, rows: Sequence[Row], names: Sequence[str]) -> list[Floats]:
        """These outputs for one batch, padded on the right to its longest row; places of padding hold anything."""
        sent = feed(rows, self._config)
        for name, ids in sent.items():
            place = self._places[name]
            place.hold(ids.nbytes)
            self._call.set_input(name, ids.shape, place.address)
            self._device.upload(ids, place.address)
        sizes = sent["input_ids"].shape
        shapes = {name: (*sizes[: len(shape) - 1], shape[-1]) for name, shape in self._shapes.items()}
        found: dict[str, Floats] = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        for name, array in found.items():
            place = self._places[name]
            place.hold(array.nbytes)
            self._call.set_output(name, place.address)
        self._call.run()
        for name in names:
            self._device.download(self._places[name].address, found[name])
        self._device.wait()
        return [found[name] for name in names]
