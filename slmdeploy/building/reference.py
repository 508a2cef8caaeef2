"""What a decoder build is compared with: its own fp32 graph, and what that says about some text.

One build may judge several forms and folders; all ask the same object, so the reference's logits are computed once, and
not at all where nothing is quantised. Knows nothing of gates.
"""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from pathlib import Path

from slmdeploy.building.calibration import Counts, Moments, calibrate, count
from slmdeploy.building.gate import Comparison
from slmdeploy.building.onnxruntime import open_folder
from slmdeploy.building.rounding import Rounding
from slmdeploy.building.static_w8a8 import Range
from slmdeploy.building.texts import calibration_for, sequences_for
from slmdeploy.runtime.model import Model
from slmdeploy.specs import RoundingMethod


class Reference:
    """The fp32 graph in ``graph``, and text from ``data``'s validation split or, without it, of the graph's own."""

    def __init__(self, graph: Path, data: Path | None, rounding: RoundingMethod | None = None) -> None:
        self.graph, self._data, self._method = graph, data, rounding

    def of(self, graph: Path) -> "Reference":
        """The same text and predictions for builds of another graph, which computes what this one does."""
        shared = {"comparison": self.comparison, "_calibration": self._calibration, "_sequences": self._sequences}
        self.release()
        other = copy(self)
        other.graph = graph
        for name in ("ranges", "rounding", "_moments"):
            vars(other).pop(name, None)
        vars(other).update(shared)
        return other

    @cached_property
    def model(self) -> Model:
        """The graph, open."""
        return open_folder(self.graph)

    def release(self) -> None:
        """Let go of the open graph and of second moments, gigabytes each; who asks for them has them made again."""
        vars(self).pop("model", None)
        if "_moments" in vars(self):
            self._moments.forget()

    @cached_property
    def _sequences(self) -> tuple[list[list[int]], str]:
        return sequences_for(self.model, self._data)

    @cached_property
    def comparison(self) -> Comparison:
        """The text with the graph's own predictions, to compare candidates with."""
        return Comparison(self.model, self._sequences[0])

    @cached_property
    def ranges(self) -> dict[str, Range]:
        """Ranges of what linear layers read on the text to calibrate on."""
        return calibrate(self.graph, self._calibration[0])

    def counts(self, besides: Sequence[str] = ()) -> dict[str, Counts]:
        """Numbers in what linear layers read, and in values ``besides``, on the text to calibrate on, counted."""
        return count(self.graph, self._calibration[0], besides)

    @cached_property
    def rounding(self) -> Rounding:
        """Rounds linear layers by what they read on the text to calibrate on."""
        moments = self._moments
        self.release()  # they come from a session of their own
        return Rounding(moments, self._method)

    @cached_property
    def _moments(self) -> Moments:
        return Moments(self.graph, self._calibration[0])

    @property
    def calibration_text(self) -> list[list[int]]:
        """The text to calibrate on, token ids."""
        return self._calibration[0]

    @cached_property
    def _calibration(self) -> tuple[list[list[int]], str]:
        return calibration_for(self.model, self._data, compared=len(self._sequences[0]))

    @property
    def calibrated_on(self) -> str:
        """Where the text to calibrate on comes from, as the result names it."""
        return self._calibration[1]

    @property
    def origin(self) -> str:
        """Where the text comes from, as the result names it."""
        return self._sequences[1]
