"""Runs an encoder build of the engine openvino: the twin of encoding.py's Encoder over openvino_model.xml.

Rows, batches and checks are those of encoding.py; only what runs a batch is another. Knows nothing of what an output
means.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .encoder_config import EncoderConfig
from .encoding import Encoder, Floats, Row, feed
from .openvino_session import GRAPH, OpenVinoModel


class OpenVinoEncoder(Encoder):
    """openvino_model.xml of an encoder folder, open."""

    batch_tokens = 1024  # 8 texts of 128 fill this engine; with 32 a text of a MiniLM takes 5 % longer

    def __init__(self, folder: Path, config: EncoderConfig, threads: int) -> None:
        assert config.inference_precision is not None, "only builds of the engine openvino run here"
        self._config, self._path = config, folder / GRAPH
        self._model = OpenVinoModel(self._path, threads=threads, precision=config.inference_precision)
        self._check_interface()
        self._request = self._model.request()

    @property
    def inputs(self) -> dict[str, str]:
        """The element type of each input by name, as ONNX Runtime writes it."""
        names = {"i64": "tensor(int64)"}
        return {name: names.get(element, element) for name, element in self._model.inputs.items()}

    @property
    def outputs(self) -> Mapping[str, Sequence[int | str | None]]:
        """The shape of each output by name."""
        return self._model.outputs

    def run(self, rows: Sequence[Row], names: Sequence[str]) -> list[Floats]:
        """These outputs for one batch, padded on the right to its longest row; places of padding hold anything."""
        for name, array in feed(rows, self._config).items():
            self._request.set(name, array)
        self._request.run()
        return [self._request.output(name).copy() for name in names]
