"""Keys are read strictly, asked for where something is computed, and compared whole."""

from pathlib import Path

import pytest

from slmdeploy.errors import InputError
from slmdeploy.runtime.model import load
from slmdeploy.serving.app import create_app
from slmdeploy.serving.auth import VARIABLE, read_keys
from slmdeploy.serving.settings import ServerSettings
from tests.serving.live import ScriptedEngine, client, running

FIRST, SECOND = "first-key-0123456789", "second-key-0123456789"


def test_keys_come_from_a_file_or_else_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{FIRST}\n\n  {SECOND}\n")
    assert read_keys(file, {VARIABLE: "x"}) == (FIRST, SECOND)
    assert read_keys(None, {VARIABLE: f"{FIRST}, {SECOND}"}) == (FIRST, SECOND)
    assert read_keys(None, {}) == ()


@pytest.mark.parametrize(
    ("text", "why"), [("", "no API key"), ("# none\n", "no API key"), ("short\n", "Key 1"), ("é" * 20, "Key 1")]
)
def test_a_file_without_sound_keys_is_refused(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=why) as caught:
        read_keys(file, {})
    assert text.strip() == "" or text.strip() not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "none", {})
    (tmp_path / "keys").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "keys", {})


def test_what_computes_asks_for_a_key_and_probes_do_not(decoder: Path) -> None:
    app = create_app(load(decoder), ServerSettings(api_keys=(FIRST, SECOND)), engine=ScriptedEngine())
    with running(app) as url, client(url) as asking:
        for path in ("/", "/health", "/ready", "/metrics", "/docs", "/page.json"):
            assert asking.get(path).status_code == 200, path
        refused = asking.get("/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
        for wrong in (FIRST, f"Basic {FIRST}", f"Bearer {FIRST[:-1]}", "Bearer", "Bearer \xe9"):
            headers = {"Authorization": wrong.encode("latin-1")}
            assert asking.get("/v1/models", headers=headers).status_code == 401, wrong
        for right in (f"Bearer {FIRST}", f"bearer {SECOND}"):
            assert asking.get("/v1/models", headers={"Authorization": right}).status_code == 200
        assert asking.get("/page.json").json()["needs_key"] is True
