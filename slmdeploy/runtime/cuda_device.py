"""NVIDIA's GPU as the runtime needs it: is there one, what can it compute, and memory, copies and graphs on it.

Through cuda-bindings, NVIDIA's own package, which is imported when it is asked for. Each call returns an error number
that becomes one sentence here. Written to the API and checked against its names; **not run on a GPU yet**. Knows
nothing of models.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError, ResourceError

NAMES = (
    "cudaGetDeviceCount",
    "cudaDeviceGetAttribute",
    "cudaDriverGetVersion",
    "cudaDeviceAttr",
    "cudaMalloc",
    "cudaFree",
    "cudaMemcpyAsync",
    "cudaMemcpyKind",
    "cudaStreamCreate",
    "cudaStreamDestroy",
    "cudaStreamSynchronize",
    "cudaStreamBeginCapture",
    "cudaStreamEndCapture",
    "cudaStreamCaptureMode",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
    "cudaGraphExecDestroy",
    "cudaGraphDestroy",
)
"""What is used of cuda.bindings.runtime."""
_COMMAND = "pip install cuda-bindings"
_NO_MEMORY = "cudaErrorMemoryAllocation"


@dataclass(frozen=True)
class Gpu:
    """The first GPU: compute capability such as ``8.9``, and the newest CUDA of its driver, 13000 for 13.0."""

    compute_capability: str
    driver: int


def runtime() -> Any:
    """The module cuda.bindings.runtime; InputError where it is not installed."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError:
        raise InputError(f"cuda-bindings is not installed, which a plan of TensorRT runs with: {_COMMAND}") from None


def find_gpu(api: Any | None = None) -> Gpu | None:
    """The first GPU of this machine, None where there is none or no driver."""
    api = api or runtime()
    error, count = api.cudaGetDeviceCount()
    if int(error) != 0 or count < 1:
        return None
    attributes = api.cudaDeviceAttr
    major, minor = (
        checked(api, api.cudaDeviceGetAttribute(attribute, 0))
        for attribute in (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
    )
    return Gpu(f"{major}.{minor}", int(checked(api, api.cudaDriverGetVersion())))


def checked(api: Any, answer: tuple[Any, ...]) -> Any:
    """What a call returned beside its error number; ResourceError when that is one."""
    error, *rest = answer
    if int(error) != 0:
        name = getattr(error, "name", str(error))
        if name == _NO_MEMORY:
            raise ResourceError("The GPU has not enough free memory: free some or use a smaller model.")
        raise ResourceError(f"The GPU refused a call ({name}): look at nvidia-smi, and start again.")
    return rest[0] if len(rest) == 1 else tuple(rest)


class Stream:
    """One queue of work on the GPU, and memory that belongs to it; `close` gives both back."""

    def __init__(self) -> None:
        self.api = runtime()
        self.handle = checked(self.api, self.api.cudaStreamCreate())
        self._memory: list[int] = []

    @property
    def number(self) -> int:
        """The handle as TensorRT takes it."""
        return int(self.handle)

    def allocate(self, size: int) -> int:
        """Memory of ``size`` bytes, at least one; its address."""
        address = int(checked(self.api, self.api.cudaMalloc(max(size, 1))))
        self._memory.append(address)
        return address

    def release(self, address: int) -> None:
        """Give back memory of `allocate`."""
        self._memory.remove(address)
        checked(self.api, self.api.cudaFree(address))

    def upload(self, array: npt.NDArray[np.generic], address: int) -> None:
        """Copy a contiguous array to the GPU; it must stay as it is until `wait`."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, address: int, array: npt.NDArray[np.generic]) -> None:
        """Copy from the GPU into a contiguous array, which is filled after `wait`."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        if size:
            kinds = self.api.cudaMemcpyKind
            checked(self.api, self.api.cudaMemcpyAsync(to, source, size, getattr(kinds, kind), self.handle))

    def wait(self) -> None:
        """Until all work so far is done."""
        checked(self.api, self.api.cudaStreamSynchronize(self.handle))

    def begin_capture(self) -> None:
        """Record the work to come instead of doing it."""
        mode = self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        checked(self.api, self.api.cudaStreamBeginCapture(self.handle, mode))

    def end_capture(self) -> "Recording":
        """What was recorded."""
        graph = checked(self.api, self.api.cudaStreamEndCapture(self.handle))
        return Recording(self, graph)

    def close(self) -> None:
        """Give back the memory and the queue."""
        for address in list(self._memory):
            self.release(address)
        checked(self.api, self.api.cudaStreamDestroy(self.handle))


class Recording:
    """Work that was recorded once and is launched as a whole (a CUDA graph)."""

    def __init__(self, stream: Stream, graph: Any) -> None:
        self._stream, self._graph = stream, graph
        self._ready = checked(stream.api, stream.api.cudaGraphInstantiate(graph, 0))

    def launch(self) -> None:
        """Do the recorded work again."""
        checked(self._stream.api, self._stream.api.cudaGraphLaunch(self._ready, self._stream.handle))

    def close(self) -> None:
        """Forget it."""
        checked(self._stream.api, self._stream.api.cudaGraphExecDestroy(self._ready))
        checked(self._stream.api, self._stream.api.cudaGraphDestroy(self._graph))
