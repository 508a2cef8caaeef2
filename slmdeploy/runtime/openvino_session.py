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
WINDOW = ".window"
"""What stands in the name of an attention in front of how many keys a query sees at most, 0 for all."""
_WINDOW_INPUT = 10
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
            self.prepare(self._model)
            self._compiled = core.compile_model(self._model, "CPU", options)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise failure(path, "does not load", error) from error

    def prepare(self, model: Any) -> None:
        """What is checked and changed between reading and compiling; here nothing."""

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
        return [_shape(node.get_output_partial_shape(0)) for node in _nodes(self._model, "ReadValue")]

    def caches(self) -> dict[str, tuple[str, list[int | None]]]:
        """Element type and shape of each input that holds keys or values in pages, as they were compiled, by name."""
        return {
            value.get_any_name(): (value.get_element_type().get_type_name(), _shape(value.get_partial_shape()))
            for value in self._compiled.inputs
            if value.get_any_name().startswith(("key_cache.", "value_cache."))
        }

    def request(self) -> "Request":
        """Inputs and outputs of one run at a time; the weights are shared with all others."""
        return Request(self._compiled.create_infer_request(), self.path)


def page_attention(model: Any) -> None:
    """Put paged attention in the place of states and ScaledDotProductAttention, in place.

    The transformation of OpenVINO's that its GenAI uses too; it drops masks, so windows are given to the new operators.
    """
    from openvino import opset13
    from openvino._offline_transformations import paged_attention_transformation

    windows = [_window(node.get_friendly_name()) for node in _nodes(model, "ScaledDotProductAttention")]
    paged_attention_transformation(model)
    for node, window in zip(_nodes(model, "PagedAttentionExtension"), windows, strict=True):
        if window:
            node.input(_WINDOW_INPUT).replace_source_output(opset13.constant(np.int32(window)).output(0))


def _window(name: str) -> int:
    keys = name.rpartition(WINDOW)[2]
    return int(keys) if keys.isdecimal() else 0


def _nodes(model: Any, kind: str) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == kind]


class Request:
    """Runs a compiled model; what is set stays set for the runs to come."""

    def __init__(self, request: Any, path: Path) -> None:
        self._request, self._path = request, path
        self._tensor = openvino().Tensor
        self._held: dict[str, npt.NDArray[Any]] = {}

    def set(self, name: str, array: Array) -> None:
        """Give an input its value for the runs to come. One of the same shape as before is written over it: a step
        changes a few numbers, and handing over tensors would take longer than the rest of what Python does for it."""
        held = self._held.get(name)
        if held is not None and held.shape == array.shape and held.dtype == array.dtype:
            held[...] = array
            return
        self._held[name] = own = np.array(array, order="C")
        self._request.set_tensor(name, self._tensor(own, shared_memory=True))

    def set_as(self, name: str, array: npt.NDArray[Any], element: str) -> None:
        """Read and write `name` in the memory of this array, as numbers of a type that numpy may lack, such as bf16."""
        kind = getattr(openvino().Type, element)
        self._request.set_tensor(name, self._tensor(array, array.shape, kind))
        self._held[name] = array

    def run(self) -> None:
        """One run over what is set."""
        try:
            self._request.infer(share_outputs=True)
        except (RuntimeError, MemoryError) as error:
            raise failure(self._path, "does not run", error) from error

    def output(self, name: str) -> Floats:
        """What the last run has written, overwritten by the next."""
        array: Floats = self._request.get_tensor(name).data
        return array


def _shape(shape: Any) -> list[int | None]:
    return [size.get_length() if size.is_static else None for size in shape]


def failure(path: Path, what: str, error: Exception) -> CorruptArtifactError | ResourceError:
    """The sentence for an exception of OpenVINO's."""
    reason = " ".join(str(error).split())[-240:]
    if isinstance(error, MemoryError) or "bad_alloc" in reason or "could not allocate" in reason.lower():
        return ResourceError(f"{path} {what}: there is not enough memory; free some or use a smaller model.")
    return CorruptArtifactError(f"{path} {what}; make or unpack it again (OpenVINO says: {reason}).")
