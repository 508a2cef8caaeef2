"""Limits on the latency of a model to be shaped, as people write them."""

import pytest

from slmdeploy.errors import InputError
from slmdeploy.specs import LatencyLimit, parse_latency


def test_a_limit_is_read_and_written_alike() -> None:
    limit = parse_latency(" ttft_512_ms <= 20.5 ")
    assert limit == LatencyLimit(metric="ttft", tokens=512, limit_ms=20.5)
    assert str(limit) == "ttft_512_ms<=20.5"
    assert parse_latency("tpot_1_ms<=3").metric == "tpot"


@pytest.mark.parametrize(
    "text", ["", "ttft_ms<=20", "ttft_512_ms>=20", "itl_512_ms<=20", "ttft_0_ms<=1", "ttft_9_ms<=0", "ttft_9_ms<=1.2.3"]
)
def test_anything_else_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(InputError, match="is not of the form ttft_TOKENS_ms<=NUMBER"):
        parse_latency(text)
