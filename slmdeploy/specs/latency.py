"""A limit on the latency of a model that is yet to be shaped: what people write after `prune --latency`.

`ttft_512_ms<=20` is the time from a prompt of 512 tokens to its first new token, `tpot_512_ms<=2` the time per new
token behind such a prompt. It differs from a budget (budgets.py), which judges measured builds under workloads. Knows
nothing of how it is measured.
"""

import re
from typing import Literal

from slmdeploy.errors import InputError
from slmdeploy.specs.base import AboveZero, Positive, Spec

_FORM = re.compile(r"\s*(?P<metric>ttft|tpot)_(?P<tokens>[0-9]{1,9})_ms\s*<=\s*(?P<limit_ms>[0-9.]+)\s*")


class LatencyLimit(Spec):
    """At most ``limit_ms`` milliseconds to the first token of a prompt of ``tokens``, or per token behind it."""

    metric: Literal["ttft", "tpot"]
    tokens: Positive
    limit_ms: AboveZero

    def __str__(self) -> str:
        return f"{self.metric}_{self.tokens}_ms<={self.limit_ms:g}"


def parse_latency(text: str) -> LatencyLimit:
    """Read ``ttft_TOKENS_ms<=NUMBER`` or ``tpot_TOKENS_ms<=NUMBER``; else an InputError that shows the form."""
    if match := _FORM.fullmatch(text):
        try:
            fields = {"metric": match["metric"], "tokens": int(match["tokens"]), "limit_ms": float(match["limit_ms"])}
            return LatencyLimit.model_validate(fields)
        except ValueError:
            pass  # a number such as 1.2.3, or 0
    raise InputError(
        f"latency {text!r} is not of the form ttft_TOKENS_ms<=NUMBER or tpot_TOKENS_ms<=NUMBER with numbers above 0, "
        "e.g. 'ttft_512_ms<=20'"
    )
