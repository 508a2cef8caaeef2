"""The page as text: self-contained, its policy true, its figures exact, and hostile names that stay names."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slmdeploy.reporting.compare import compare
from slmdeploy.reporting.page import comparison_page, page
from slmdeploy.reporting.reading import read_run
from slmdeploy.reporting.records import Run
from tests.reporting.fixtures import held_rows, make_run

HOSTILE = "<img src=x onerror=alert(1)>"
CLOSING = "</script><script>alert(1)</script>"
PACKAGE = Path(__file__).parents[2] / "slmdeploy" / "reporting"


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element begins."""
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Text; kept where it is not for reading."""
        if self.elements and self.elements[-1][0] in ("script", "style") and data.strip():
            self.raw.append((self.elements[-1][0], data))


def test_nothing_is_fetched(run: Run) -> None:
    for tag, attributes in Elements(page(run)).elements:
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        if "href" in attributes:
            assert str(attributes["href"]).startswith(("#", "data:"))


def test_the_policy_names_the_style_and_the_script_that_are_there(run: Run) -> None:
    found = Elements(page(run))
    (policy,) = [a["content"] for tag, a in found.elements if tag == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag, text in found.raw:
        if not text.startswith("{"):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_data_block_is_the_measurement(run: Run, run_folder: Path) -> None:
    (data,) = [json.loads(text) for _, text in Elements(page(run)).raw if text.startswith("{")]
    assert [row["metrics"] for row in data["rows"]] == [row["metrics"] for row in held_rows(run_folder)]


@pytest.mark.parametrize("name", [HOSTILE, CLOSING, "a\"b' c&d", "{{ 7 * 7 }}"])
def test_hostile_names_stay_names(tmp_path: Path, run_folder: Path, name: str) -> None:
    folder = make_run(tmp_path / "run", names={"cpu-int4": name, "cpu-int8-split": f"{name} chosen"})
    plain, hostile = Elements(page(read_run(run_folder))), Elements(page(read_run(folder)))
    assert [tag for tag, _ in hostile.elements].count("script") == 2
    assert "img" not in {tag for tag, _ in hostile.elements}
    assert {tag for tag, _ in hostile.elements} == {tag for tag, _ in plain.elements}
    said = [attributes.get("aria-label") or "" for _, attributes in hostile.elements]
    assert any(label.startswith(f"{name} (measured)") for label in said)


def test_a_hostile_comparison_stays_text(tmp_path: Path, run_folder: Path) -> None:
    folders = [make_run(tmp_path / str(at), names={"cpu-int8": CLOSING}, slower={"cpu-int8": 1 + at}) for at in (0, 1)]
    text = comparison_page(compare(*folders))
    found = Elements(text)
    assert [tag for tag, _ in found.elements].count("script") == 2
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text


def test_sections_that_need_more_are_left_out_and_said_so(run_folder: Path) -> None:
    text = page(read_run(run_folder / "measurement"))
    ids = {attributes.get("id") for _, attributes in Elements(text).elements}
    assert not {"budget", "pipeline", "sensitivity"} & ids
    assert {"trade-off", "figures", "environment", "commands"} <= ids
    assert "are left out: this is a measurement alone" in text


def test_every_link_leads_somewhere_and_every_id_is_one(run: Run) -> None:
    elements = Elements(page(run)).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    links = [str(attributes["href"])[1:] for tag, attributes in elements if tag == "a"]
    assert len(set(ids)) == len(ids)
    assert set(links) <= set(ids)


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast_in_light_and_dark() -> None:
    css = (PACKAGE / "page.css").read_text(encoding="utf-8")
    themes = re.findall(r"color-scheme: (light|dark);(.*?)\}", css, re.DOTALL)
    assert [name for name, _ in themes] == ["light", "dark", "dark"]
    assert " ".join(themes[1][1].split()) == " ".join(themes[2][1].split())
    for _, body in themes[:2]:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", body))
        paper = luminance(colours["paper"])
        for name in ("ink", "soft", "accent", "bad", "good", "warn", "base", *(f"c{at}" for at in range(7))):
            lighter, darker = sorted((paper, luminance(colours[name])), reverse=True)
            least = 3.0 if name[0] == "c" and name[1:].isdigit() else 4.5
            assert (lighter + 0.05) / (darker + 0.05) >= least, name


def test_the_script_is_small() -> None:
    assert len((PACKAGE / "page.js").read_text(encoding="utf-8").splitlines()) < 200
