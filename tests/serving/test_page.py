"""The page and the reference: files under a strict policy, and in a real browser text, scores, keys and contrast.

The browser's tests are skipped where no Chromium is installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.runtime.opening import load
from slmdeploy.serving.app import create_app
from slmdeploy.serving.page import POLICY
from slmdeploy.serving.settings import ServerSettings
from tests.reporting.browsing import chromium
from tests.serving.live import ScriptedEngine, client, running, wait_for

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js", "/page.json", "/docs"])
def test_every_file_has_the_policy_and_nothing_from_elsewhere(url: str, path: str) -> None:
    with client(url) as asking:
        answer = asking.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == POLICY
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def test_the_facts_are_the_servers(url: str) -> None:
    with client(url) as asking:
        facts = asking.get("/page.json").json()
    assert facts["tasks"] == ["generate", "score"]
    assert facts["chat"] is True
    assert facts["needs_key"] is False
    assert facts["budget"] == [{"metric": "ttft_ms_p99", "limit": 5000}]


def test_the_reference_shows_every_endpoint_with_its_example(url: str) -> None:
    with client(url) as asking:
        text = asking.get("/docs").text
        paths = asking.get("/openapi.json").json()["paths"]
    assert all(path in text for path in paths)
    assert "&#34;model&#34;: &#34;tiny&#34;" in text


def test_a_models_name_is_text_on_the_page(decoder: Path) -> None:
    app = create_app(load(decoder), ServerSettings(model_name=HOSTILE), engine=ScriptedEngine())
    with running(app) as url, client(url) as asking:
        for path in ("/", "/docs"):
            assert HOSTILE not in asking.get(path).text
            assert "&lt;img" in asking.get(path).text


@contextmanager
def visiting(url: str, browser: Any, refused: str = "", **settings: Any) -> Iterator[Any]:
    """The page, open; nothing may be fetched from elsewhere or complained about, but for an answer of this status."""
    context = browser.new_context(**settings)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda asked: None if asked.url.startswith((url, "data:")) else wrong.append(asked.url))
    try:
        page.goto(url)
        page.wait_for_selector("#state.well")
        yield page
        assert [each for each in wrong if not (refused and f"status of {refused}" in each)] == []
    finally:
        context.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api")
    with chromium() as found:
        if found is None:
            pytest.skip("no Chromium is installed: playwright install chromium, or apt-get install chromium")
        yield found


@pytest.mark.slow
def test_text_is_generated_by_keyboard_alone_and_measured(url: str, browser: Any) -> None:
    with visiting(url, browser) as page:
        page.focus("#prompt")
        page.keyboard.type("hello")
        page.keyboard.press("Tab")
        page.keyboard.press("Control+a")
        page.keyboard.type("12")
        page.keyboard.press("Enter")
        assert wait_for(lambda: "tokens behind" in page.text_content("#generate-note"))
        with client(url) as asking:
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 12,
                "temperature": 0,
            }
            alone = asking.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert page.text_content("#answer") == alone
        assert "First token" in page.text_content("#latency")
        assert "within ttft_ms_p99 ≤ 5000" in page.text_content("#latency")
        assert page.evaluate("document.activeElement.id") == "max-tokens"


@pytest.mark.slow
def test_items_are_scored_best_first_and_as_text(url: str, browser: Any) -> None:
    with visiting(url, browser) as page:
        page.fill("#prefix", "a prefix")
        page.fill("#items", f"one\n{HOSTILE}\nthree")
        page.click("#score-form button")
        page.wait_for_selector("#scores:not([hidden])")
        scores = [float(text) for text in page.locator("#scores td.number").all_text_contents()]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 3
        assert HOSTILE in page.text_content("#scores")
        assert page.locator("#scores img").count() == 0


@pytest.mark.slow
def test_a_refusal_is_shown(url: str, browser: Any) -> None:
    with visiting(url, browser, refused="400") as page:
        page.fill("#prompt", "x" * 700)
        page.click("#go")
        page.wait_for_selector("#generate-note.bad")
        assert "at most 511" in page.text_content("#generate-note")


@pytest.mark.slow
def test_stop_ends_a_stream_and_the_work_behind_it(decoder: Path, browser: Any) -> None:
    engine = ScriptedEngine()
    settings = ServerSettings(api_keys=("a-key-of-the-test",))
    with running(create_app(load(decoder), settings, engine=engine)) as url, visiting(url, browser) as page:
        page.fill("#key", "a-key-of-the-test")
        page.fill("#prompt", "hello")
        page.click("#go")
        engine.say(engine.one(), "one ", "two")
        assert wait_for(lambda: page.text_content("#answer") == "one two")
        page.click("#stop")
        assert wait_for(lambda: page.text_content("#generate-note") == "Stopped.")
        assert wait_for(lambda: len(engine.cancelled) == 1)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["embed", "classify", "tokens"])
def test_texts_go_through_an_encoder(encoder_urls: dict[str, str], browser: Any, role: str) -> None:
    with visiting(encoder_urls[role], browser) as page:
        assert not page.is_visible("#generate")
        page.fill("#text", "a b\nc")
        page.click("#texts-form button")
        page.wait_for_selector("#found:not([hidden])")
        shown = page.text_content("#found").splitlines()
        assert len(shown) == 2
        assert ("3 dimensions" in shown[0]) is (role == "embed")


CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = (css) => css.match(/[\\d.]+/g).map(Number);
  const light = (css) => {
    const [r, g, b] = parse(css).map(channel); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = (node) => { for (; node; node = node.parentElement) {
    const css = getComputedStyle(node).backgroundColor; const parts = parse(css);
    if (parts.length < 4 || parts[3] > 0) return css; } return "rgb(255, 255, 255)"; };
  const texts = "h1, h2, p, label, a, button:enabled, th, td, .kicker";
  return [...document.querySelectorAll(texts)].filter((n) => n.offsetParent)
    .map((n) => { const [a, b] = [light(getComputedStyle(n).color), light(behind(n))].sort((x, y) => y - x);
      return [n.tagName + ":" + n.textContent.trim().slice(0, 20), (a + .05) / (b + .05)]; });
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_and_labelled_on_a_phone_too(url: str, browser: Any, scheme: str) -> None:
    size = {"width": 360, "height": 740}
    with visiting(url, browser, color_scheme=scheme, reduced_motion="reduce", viewport=size) as page:
        assert [each for each in page.evaluate(CONTRAST) if each[1] < 4.5] == []
        unlabelled = (
            "[...document.querySelectorAll('input, textarea')].filter((e) => !e.labels.length).map((e) => e.id)"
        )
        assert page.evaluate(unlabelled) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.eval_on_selector("#answer", "node => node.classList.add('busy')")
        assert page.evaluate("getComputedStyle(document.querySelector('#answer'), '::after').animationName") == "none"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
