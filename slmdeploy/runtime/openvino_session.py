"""OpenVINO models as this project runs them: read, checked, compiled for the CPU, and asked with arrays.

The twin of session.py for builds of the engine openvino. openvino is imported here alone and when such a build is
opened: a device whose builds are ONNX Runtime's lacks it. A model that does not load, or whose inputs, outputs and
states are not those that runtime.json calls for, is a CorruptArtifactError. Knows nothing of tokens or texts.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import CorruptArtifactError, InputError, ResourceError

GRAPH, WEIGHTS = "openvino_model.xml", "openvino_model.bin"
Array = npt.NDArray[np.int64] | npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


def openvino() -> Any:
    """The package; InputError with the pip command where it is not installed."""
    try:
        import openvino as package
    except ImportError:
        raise InputError(
            "This build is of the engine openvino, which is not installed: pip install openvino."
        ) from None
    return package


class OpenVinoModel:
    """One model.xml, compiled for the CPU with `threads` (0: all physical cores), its numbers computed in `precision`.

    precision: "f32" or "bf16", for the KV cache too (OpenVINO's own default is 8 bits there). A CPU without bfloat16
    computes what was built for it in float32.
    """

    def __init__(self, path: Path, *, threads: int, precision: str) -> None:
        self.path = path
        core = openvino().Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            precision = "f32"
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            self._model = core.read_model(str(path))
            self._compiled = core.compile_model(self._model, "CPU", options)
        except (RuntimeError, MemoryError) as error:
            raise failure(path, "does not load", error) from error

    @property
    def inputs(self) -> dict[str, str]:
        """The element type of each input by name, such as "i64"."""
        return {value.get_any_name(): value.get_element_type().get_type_name() for value in self._model.inputs}

    @property
    def outputs(self) -> dict[str, list[int | None]]:
        """The shape of each output by name, None for what is not fixed."""
        return {value.get_any_name(): _shape(value.get_partial_shape()) for value in self._model.outputs}

    def check(self, inputs: Mapping[str, str], outputs: Collection[str]) -> None:
        """Refuse a model with other inputs (element type by name) or outputs than these."""
        found = self.inputs
        if found != dict(inputs) or set(self.outputs) != set(outputs):
            raise CorruptArtifactError(
                f"{self.path} has the inputs {', '.join(found)} and the outputs {', '.join(self.outputs)}, which are "
                "not those that runtime.json calls for; build it again."
            )

    def states(self) -> list[list[int | None]]:
        """The shape of each state, in no order."""
        nodes = [node for node in self._model.get_ops() if node.get_type_name() == "ReadValue"]
        return [_shape(node.get_output_partial_shape(0)) for node in nodes]

    def request(self) -> "Request":
        """Inputs, outputs and states of one run at a time; the weights are shared with all others."""
        return Request(self._compiled.create_infer_request(), self.path)


class Request:
    """Runs a compiled model; what is set stays set for the runs to come."""

    def __init__(self, request: Any, path: Path) -> None:
        self._request, self._path = request, path
        self._tensor = openvino().Tensor
        self._held: dict[str, Array] = {}

    def set(self, name: str, array: Array) -> None:
        """Read `name` from the memory of this contiguous array, kept alive: writing to it changes the input."""
        self._held[name] = array
        self._request.set_tensor(name, self._tensor(array, shared_memory=True))

    def run(self) -> None:
        """One run over what is set, behind what the states hold."""
        try:
            self._request.infer(share_outputs=True)
        except (RuntimeError, MemoryError) as error:
            raise failure(self._path, "does not run", error) from error

    def output(self, name: str) -> Floats:
        """What the last run has written, overwritten by the next."""
        array: Floats = self._request.get_tensor(name).data
        return array

    def forget(self) -> None:
        """Empty the states."""
        self._request.reset_state()

    def kept(self) -> dict[str, Any]:
        """A copy of the states by name, to be put back by `restore`."""
        return {state.name: self._tensor(state.state.data.copy()) for state in self._request.query_state()}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Set the states to what they were."""
        for state in self._request.query_state():
            state.state = kept[state.name]


def _shape(shape: Any) -> list[int | None]:
    return [size.get_length() if size.is_static else None for size in shape]


def failure(path: Path, what: str, error: Exception) -> CorruptArtifactError | ResourceError:
    """The sentence for an exception of OpenVINO's."""
    reason = " ".join(str(error).split())[-240:]
    if isinstance(error, MemoryError) or "bad_alloc" in reason or "could not allocate" in reason.lower():
        return ResourceError(f"{path} {what}: there is not enough memory; free some or use a smaller model.")
    return CorruptArtifactError(f"{path} {what}; make or unpack it again (OpenVINO says: {reason}).")
