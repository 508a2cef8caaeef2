"""A headless Chromium for tests and screenshots: Playwright's own where it is installed, else the system's."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator["Browser | None"]:
    """A browser that is closed again, or None where no Chromium is installed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = str(own) if own.exists() else next(filter(None, map(shutil.which, NAMES)), None)
        if found is None:
            yield None
            return
        # Root, as in a container, has no sandbox; the pages are our own files.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: "Browser", file: Path, **settings: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page in a context of its own, and what went wrong on it so far: console messages, errors, requests."""
    context = browser.new_context(**settings)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
    try:
        page.goto(file.resolve().as_uri())
        yield page, wrong
    finally:
        context.close()
