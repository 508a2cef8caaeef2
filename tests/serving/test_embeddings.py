"""The OpenAI client gets the runtime's vectors, whichever way they travel."""

from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from slmdeploy.runtime.encoder_model import load_encoder
from tests.runtime.encoder_graphs import write_encoder_graph
from tests.serving.live import client


def test_vectors_are_the_runtimes_as_base64_and_as_numbers(encoder_urls: dict[str, str], tmp_path: Path) -> None:
    alone = load_encoder(write_encoder_graph(tmp_path / "embed")).embed(["a b", "c"])
    with openai.OpenAI(base_url=f"{encoder_urls['embed']}/v1", api_key="none", max_retries=0) as api:
        unsaid = api.embeddings.create(model="embed", input=["a b", "c"])  # the client asks for base64
        numbers = api.embeddings.create(model="embed", input=["a b", "c"], encoding_format="float")
    for answer in (unsaid, numbers):
        assert np.allclose([each.embedding for each in answer.data], alone, rtol=1e-6)
        assert [each.index for each in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == 7


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"input": [1, 2]}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"dimensions": 2}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"prompt": "query"}, None),
        ({"model": "other"}, "model"),
    ],
)
def test_what_cannot_be_used_is_refused(encoder_urls: dict[str, str], extra: dict[str, Any], param: str | None) -> None:
    with client(encoder_urls["embed"]) as asking:
        answer = asking.post("/v1/embeddings", json={"model": "embed", "input": "a"} | extra)
    assert answer.status_code == (404 if "model" in extra else 400)
    assert param is None or answer.json()["error"]["param"].startswith(param)
