"""What a compiled plan's runs need of a GPU: memory, copies, a queue of work; and a buffer that grows.

cuda_device.py's Stream is a `Device`; tests put the host's memory behind it. Knows nothing of plans or tokens.
"""

from typing import Any, Protocol

import numpy.typing as npt


class Recorded(Protocol):
    """Work that can be done again at once."""

    def launch(self) -> None: ...


class Device(Protocol):
    """Memory on a GPU and the queue of its work: cuda_device.py's Stream."""

    def allocate(self, size: int) -> int: ...
    def release(self, address: int) -> None: ...
    def upload(self, array: npt.NDArray[Any], address: int) -> None: ...
    def download(self, address: int, array: npt.NDArray[Any]) -> None: ...
    def wait(self) -> None: ...
    def begin_capture(self) -> None: ...
    def end_capture(self) -> Recorded: ...


class Buffer:
    """Memory on the device that grows and never shrinks, so that its address stays while nothing longer comes."""

    def __init__(self, device: Device) -> None:
        self._device, self._size = device, 0
        self.address = 0

    def hold(self, size: int) -> None:
        """Make room for ``size`` bytes; what was there is lost where it had to grow."""
        if size > self._size:
            if self._size:
                self._device.release(self.address)
            self.address, self._size = self._device.allocate(size), size
