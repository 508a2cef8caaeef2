"""Stands in for Triton's module triton_python_backend_utils: as much of it as our models touch, by its public names.

Requests are made by `request`, and `responses` waits for what was sent. `send` refuses what Triton refuses: a response
after the final one.
"""

import queue
from typing import Any

import numpy as np
import numpy.typing as npt

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    def __init__(self, name: str, values: npt.NDArray[Any]) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> npt.NDArray[Any]:
        return self._values


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE = range(5)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def error(self) -> TritonError | None:
        return self._error

    def values(self) -> dict[str, list[Any]]:
        """Of each output its elements, texts decoded. Not Triton's."""
        return {
            one.name(): [value.decode() if isinstance(value, bytes) else value for value in one.as_numpy().tolist()]
            for one in self._tensors
        }


class Sender:
    def __init__(self) -> None:
        self.sent: queue.Queue[tuple[InferenceResponse, int]] = queue.Queue()
        self.gone = False
        self._closed = False

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        if self._closed:
            raise RuntimeError("the response sender is closed")
        self._closed = flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self.sent.put((response, flags))

    def is_cancelled(self) -> bool:
        return self.gone


class Request:
    def __init__(self, inputs: dict[str, npt.NDArray[Any]]) -> None:
        self._inputs, self.sender = inputs, Sender()

    def tensor(self, name: str) -> Tensor | None:
        return Tensor(name, self._inputs[name]) if name in self._inputs else None

    def get_response_sender(self) -> Sender:
        return self.sender

    def responses(self, timeout_s: float = 60.0) -> list[InferenceResponse]:
        """All responses, once the final one is there. Not Triton's."""
        found: list[InferenceResponse] = []
        while True:
            response, flags = self.sender.sent.get(timeout=timeout_s)
            found.append(response)
            if flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL:
                return found


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return request.tensor(name)


def request(**inputs: Any) -> Request:
    """A request with these inputs, of the types that the configuration has for them. Not Triton's."""
    kinds = {"max_tokens": np.int32, "top_k": np.int32, "seed": np.int64, "stream": np.bool_}
    made = {}
    for name, value in inputs.items():
        values = value if isinstance(value, list) else [value]
        if all(isinstance(one, str | bytes) for one in values):
            made[name] = np.array([one.encode() if isinstance(one, str) else one for one in values], np.object_)
        else:
            made[name] = np.array(values, kinds.get(name, np.float32))
    return Request(made)
