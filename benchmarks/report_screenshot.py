"""Takes the pictures of docs/report.md: the top of a report in light and in dark, and on a phone.

    .venv/bin/python -m benchmarks.report_screenshot [RUN]

Of a run's folder, or without one of the synthetic run that the tests draw, which docs/report.md then says. Needs
playwright and a Chromium (tests/reporting/browsing.py finds one).
"""

import sys
import tempfile
from pathlib import Path

from slmdeploy.reporting.report import report
from tests.reporting.browsing import chromium, opened
from tests.reporting.fixtures import make_run

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WIDE = {"width": 1040, "height": 1080}
PHONE = {"width": 390, "height": 844}
PICTURES = (
    ("report-light.png", WIDE, "light", "#answer"),
    ("report-dark.png", WIDE, "dark", "#trade-off"),
    ("report-phone.png", PHONE, "dark", "#latency"),
)


def take(page: Path) -> list[Path]:
    """The pictures of a page, written to docs/images/."""
    IMAGES.mkdir(exist_ok=True)
    with chromium() as browser:
        if browser is None:
            sys.exit("no Chromium is installed: playwright install chromium, or apt-get install chromium")
        for name, size, scheme, where in PICTURES:
            with opened(browser, page, viewport=size, color_scheme=scheme, reduced_motion="reduce") as (shown, wrong):
                if where != "#answer":
                    shown.eval_on_selector(where, "part => part.scrollIntoView()")
                shown.screenshot(path=IMAGES / name)
                assert not wrong, wrong
    return [IMAGES / name for name, *_ in PICTURES]


def main() -> None:
    """Draw the report of the run that is named, or of the synthetic one, and take its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(sys.argv[1]) if len(sys.argv) > 1 else make_run(Path(folder) / "tiny")
        for picture in take(report(run, out=Path(folder) / "report.html")):
            print(f"{picture}  {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
