"""How much a server takes on, and whom it answers: every number that can refuse a request stands here.

Knows neither HTTP nor models.
"""

from dataclasses import dataclass, field

from slmdeploy.errors import InputError
from slmdeploy.runtime.requests import EngineSettings
from slmdeploy.specs import parse_constraint

ARRIVING = 16
"""Requests beyond slots and queue whose bodies may arrive meanwhile; each may take max_body_bytes of memory."""


@dataclass(frozen=True)
class ServerSettings:
    """The limits of a server. Times are seconds.

    model_name: the id that /v1/models gives; None for the folder's name. api_keys: any one of them opens /v1 and the
    other endpoints that compute; none for everyone. max_prompt_tokens: None for the model's context.
    max_output_tokens: the most that one choice may ask for, and what it gets where a chat asks for nothing.
    deadline_s: from arrival to the last token. max_queued: requests that wait for a slot, of encoders texts too.
    stall_s: how long a reader of a stream may take nothing; stream_events: tokens kept for one that is slow.
    body_s: how long a body may take to arrive. budget: limits such as "ttft_ms_p99<=300" that the page holds its
    latencies against.
    """

    model_name: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    engine: EngineSettings = field(default_factory=EngineSettings)
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_output_tokens: int = 1024
    max_choices: int = 8
    max_items: int = 1024
    deadline_s: float = 300.0
    drain_s: float = 30.0
    stall_s: float = 20.0
    body_s: float = 30.0
    stream_events: int = 512
    budget: tuple[str, ...] = ()

    @property
    def max_in_flight(self) -> int:
        """Requests that may be on their way at once, bodies that are still arriving among them."""
        return self.engine.slots + self.engine.max_waiting + ARRIVING

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_output_tokens", "max_choices", "max_items", "stream_events"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}.")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise InputError(f"max_prompt_tokens must be 1 or more, not {self.max_prompt_tokens}.")
        for name in ("deadline_s", "stall_s", "body_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be more than 0, not {getattr(self, name)}.")
        for text in self.budget:
            parse_constraint(text)
        if not self.drain_s >= 0:
            raise InputError(f"drain_s must be 0 or more, not {self.drain_s}.")
