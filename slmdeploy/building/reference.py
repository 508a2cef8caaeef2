"""What a decoder build is compared with: its own fp32 graph, opened once, and what that says about some text.

One build may judge several forms and folders; all ask the same object, so the reference's logits are computed once, and
not at all where nothing is quantised. Knows nothing of gates.
"""

from functools import cached_property
from pathlib import Path

from slmdeploy.building.calibration import calibrate
from slmdeploy.building.gate import Comparison, sequences_for
from slmdeploy.building.onnxruntime import open_folder
from slmdeploy.building.static_w8a8 import Range
from slmdeploy.errors import InputError
from slmdeploy.runtime.model import Model


class Reference:
    """The fp32 graph in ``graph``, and text from ``data``'s validation split or, without it, of the graph's own."""

    def __init__(self, graph: Path, data: Path | None) -> None:
        self.graph, self._data = graph, data

    @cached_property
    def model(self) -> Model:
        """The graph, open."""
        return open_folder(self.graph)

    @cached_property
    def _sequences(self) -> tuple[list[list[int]], str]:
        return sequences_for(self.model, self._data)

    @cached_property
    def comparison(self) -> Comparison:
        """The text with the graph's own predictions, to compare candidates with."""
        return Comparison(self.model, self._sequences[0])

    @cached_property
    def ranges(self) -> dict[str, Range]:
        """Ranges of what linear layers read, on text that is not compared on (the graph's own if data has no more)."""
        compared = len(self._sequences[0])
        try:
            sequences, _ = sequences_for(self.model, self._data, skip=compared)
        except InputError:
            sequences, _ = sequences_for(self.model, None, skip=compared)
        return calibrate(self.graph, sequences)

    @property
    def origin(self) -> str:
        """Where the text comes from, as the result names it."""
        return self._sequences[1]
