"""A decoder's tasks as models of Triton's python backend: `generate`, whose answers stream, and `score`.

The repository in a package of the kind server (packaging/triton.py) has a model.py for each task, which makes a class
of these. Triton hands over requests and takes responses; who waits, what runs together and what is cached is the
engine's. Responses leave from a thread of their own, since the engine's must not wait for Triton. Triton's module
`triton_python_backend_utils` exists in its processes alone and is handed in as `utils`. Knows no HTTP.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from slmdeploy.runtime.engine import Engine
from slmdeploy.runtime.errors import EngineStoppedError, InputError, QueueFullError, SlmdeployError
from slmdeploy.runtime.generation import Settings
from slmdeploy.runtime.model import load
from slmdeploy.runtime.requests import ChoiceDone, Event, Failed, GenerateRequest, Ticket, TokenEvent

_SETTINGS = {"max_tokens": "max_new_tokens", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
             "seed": "seed"}  # fmt: skip
"""Inputs by Triton's names (packaging/triton.py has their types), and settings by ours."""
_DRAIN_S = 30.0


@dataclass
class _Answer:
    """A request to generate that is under way: where its responses go, and of one that does not stream, its text."""

    sender: Any
    stream: bool
    ticket: Ticket | None = None
    text: list[str] = field(default_factory=list)


class Generating:
    """The model `generate`. A response has the text that is new, and in the last one of a request why it ended.

    A client that is gone frees its row with the next token. package: folder that is opened and verified.
    """

    package: Path
    utils: Any

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model and begin to take requests. Raises what opening it raises, and Triton shows that."""
        self._engine = Engine(load(self.package))
        self._engine.start()
        self._events: SimpleQueue[tuple[_Answer, Event] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, name="slmdeploy-triton", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand requests to the engine; their responses come later."""
        for request in requests:
            answer = _Answer(request.get_response_sender(), bool(_scalar(self.utils, request, "stream", False)))
            try:
                wanted = GenerateRequest(self._prompt(request), self._settings(request))
                answer.ticket = self._engine.submit(wanted, partial(self._pass_on, answer))
            except SlmdeployError as error:
                self._events.put((answer, Failed(error)))

    def finalize(self) -> None:
        """Finish what was accepted, within half a minute, and end."""
        self._engine.drain(_DRAIN_S)
        self._engine.close()
        self._events.put(None)
        self._thread.join()

    def _pass_on(self, answer: _Answer, event: Event) -> None:
        self._events.put((answer, event))

    def _prompt(self, request: Any) -> tuple[int, ...]:
        return tuple(self._engine.model.codec.prompt(_text(self.utils, request, "text_input"), "text_input"))

    def _settings(self, request: Any) -> Settings:
        given = {ours: _scalar(self.utils, request, name, None) for name, ours in _SETTINGS.items()}
        return Settings(
            **{name: value for name, value in given.items() if value is not None},
            stop=_texts(self.utils, request, "stop"),
        )

    def _send_all(self) -> None:
        while (item := self._events.get()) is not None:
            self._send(*item)

    def _send(self, answer: _Answer, event: Event) -> None:
        """Turn an event into what Triton is sent, perhaps nothing."""
        match event:
            case TokenEvent(text=text):
                if answer.sender.is_cancelled() and answer.ticket is not None:
                    self._engine.cancel(answer.ticket)
                elif answer.stream and text:
                    answer.sender.send(self._response(text, ""))
                elif text:
                    answer.text.append(text)
            case ChoiceDone(finish_reason=reason, text=text):
                final = self.utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                answer.sender.send(self._response("".join([*answer.text, text]), reason), flags=final)
            case Failed(error=error):
                final = self.utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                answer.sender.send(failed(self.utils, error), flags=final)

    def _response(self, text: str, reason: str) -> Any:
        values = {"text_output": text, "finish_reason": reason}
        tensors = [self.utils.Tensor(name, np.array([value.encode()], np.object_)) for name, value in values.items()]
        return self.utils.InferenceResponse(output_tensors=tensors)


class Scoring:
    """The model `score`: of each item behind a prefix logit(label 1) - logit(label 0), one request after the other."""

    package: Path
    utils: Any

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model. Raises what opening it raises, and Triton shows that."""
        self._model = load(self.package)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response to each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            scores = self._model.score(_text(self.utils, request, "prefix"), _texts(self.utils, request, "items"))
        except SlmdeployError as error:
            return failed(self.utils, error)
        tensor = self.utils.Tensor("scores", np.array(scores, np.float32))
        return self.utils.InferenceResponse(output_tensors=[tensor])


def failed(utils: Any, error: SlmdeployError) -> Any:
    """The response for an error: whose fault it is, as Triton's codes have it, and our sentence."""
    code = utils.TritonError.INTERNAL
    if isinstance(error, InputError):
        code = utils.TritonError.INVALID_ARG
    elif isinstance(error, QueueFullError | EngineStoppedError):
        code = utils.TritonError.UNAVAILABLE
    return utils.InferenceResponse(output_tensors=[], error=utils.TritonError(str(error), code))


def _scalar(utils: Any, request: Any, name: str, default: Any) -> Any:
    """The one element of an input as a Python value; `default` where it was left out."""
    tensor = utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().reshape(-1)[0].item()


def _texts(utils: Any, request: Any, name: str) -> tuple[str, ...]:
    """The texts of an input, none where it was left out. Raises InputError for bytes that are no UTF-8."""
    tensor = utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return ()
    try:
        return tuple(bytes(value).decode() for value in tensor.as_numpy().reshape(-1))
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no text in UTF-8 ({error.reason}): send Unicode text.") from error


def _text(utils: Any, request: Any, name: str) -> str:
    texts = _texts(utils, request, name)
    if len(texts) != 1:
        raise InputError(f"{name} has {len(texts)} texts: give one.")
    return texts[0]
