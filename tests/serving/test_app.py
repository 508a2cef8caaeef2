"""Which endpoints a model has, and what the others say; the document lists what there is."""

import subprocess
import sys

import openai
import pytest

from slmdeploy.serving.app import ENDPOINTS
from tests.serving.live import client


@pytest.mark.parametrize(
    ("role", "tasks"), [("embed", {"embed"}), ("classify", {"classify", "score"}), ("score", {"score"})]
)
def test_a_model_has_the_endpoints_of_its_tasks(encoder_urls: dict[str, str], role: str, tasks: set[str]) -> None:
    with client(encoder_urls[role]) as asking:
        listed = asking.get("/openapi.json").json()["paths"]
        for path, task in ENDPOINTS.items():
            answer = asking.post(path, json={})
            assert answer.status_code == (400 if task in tasks else 404), path
            assert (path in listed) is (task in tasks)
            if task not in tasks:
                assert f"needs a model made for {task}" in answer.json()["error"]["message"]


def test_the_openai_client_is_told_why_an_embedder_does_not_chat(encoder_urls: dict[str, str]) -> None:
    with (
        openai.OpenAI(base_url=f"{encoder_urls['embed']}/v1", api_key="none", max_retries=0) as api,
        pytest.raises(openai.NotFoundError, match="embed was made for embed"),
    ):
        api.chat.completions.create(model="embed", messages=[{"role": "user", "content": "x"}])


def test_a_server_needs_neither_torch_nor_a_graph_library() -> None:
    heavy = ("torch", "transformers", "datasets", "onnx", "onnx_ir")
    probe = f"import sys, slmdeploy.serving.app; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
