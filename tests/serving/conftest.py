"""Servers that tests share because they change nothing in them: a decoder's, and one for each kind of encoder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from slmdeploy.runtime.opening import load
from slmdeploy.serving.app import create_app
from slmdeploy.serving.settings import ServerSettings
from tests.graphs import write_manifest, write_tiny_graph
from tests.runtime.encoder_graphs import write_encoder_graph
from tests.serving.live import running

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}:"
)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generates and scores, with a chat template and a context of 512 tokens."""
    folder = write_tiny_graph(tmp_path_factory.mktemp("served") / "tiny", max_length=512)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_manifest(folder)
    return folder


@pytest.fixture(scope="session")
def url(decoder: Path) -> Iterator[str]:
    """The decoder's server."""
    with running(
        create_app(load(decoder), ServerSettings(max_output_tokens=400, budget=("ttft_ms_p99<=5000",)))
    ) as url:
        yield url


@pytest.fixture(scope="session")
def encoder_urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The servers of an embedder, a classifier, a cross-encoder and a tagger, by role."""
    folder = tmp_path_factory.mktemp("encoders")

    def app(role: str) -> FastAPI:
        return create_app(load(write_encoder_graph(folder / role, role)), ServerSettings(max_items=8))

    with (
        running(app("embed")) as embed,
        running(app("classify")) as classify,
        running(app("score")) as score,
        running(app("tokens")) as tokens,
    ):
        yield {"embed": embed, "classify": classify, "score": score, "tokens": tokens}
