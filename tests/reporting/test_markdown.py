"""Markdown: the answer and the figures for a pull request, and hostile names that stay names."""

from pathlib import Path

import pytest

from slmdeploy.reporting.compare import compare
from slmdeploy.reporting.markdown import MARK, code, comparison_text, prose, run_text
from slmdeploy.reporting.reading import read_run
from slmdeploy.reporting.records import Run
from tests.reporting.fixtures import make_run

HOSTILE = "<img src=x onerror=alert(1)>|`**x**` # y"


def test_a_run_in_markdown(run: Run) -> None:
    text = run_text(run)
    assert text.startswith(f"{MARK}\n## cpu-int8-split on x86-64-avx512-vnni (measured)\n")
    assert "| `size_bytes <= 2e+07` | ✗ missed 24.6 MB |" in text
    assert "`cpu-int8-split@x86-64-amx` (estimated)" in text
    assert "`cpu-int8` (noisy)" in text
    assert "slmdeploy select RUN/measurement RUN/estimates" in text


def test_tables_have_as_many_cells_in_each_row_as_columns(run: Run) -> None:
    widths: list[int] = []
    for line in run_text(run).splitlines():
        if line.startswith("|"):
            widths.append(line.replace("\\|", "").count("|"))
        elif widths:
            assert len(set(widths)) == 1
            widths = []


def test_hostile_names_are_shown_and_not_read(tmp_path: Path) -> None:
    text = run_text(read_run(make_run(tmp_path / "run", names={"cpu-int4": HOSTILE})))
    outside = "".join(part for at, part in enumerate(text.split("`")) if at % 2 == 0)
    assert "<img" not in outside
    assert "**x**" not in outside


@pytest.mark.parametrize(
    ("text", "escaped"), [("a_b*c", "a\\_b\\*c"), ("<b>&", "&lt;b&gt;&amp;"), ("a\n# b", "a \\# b"), ("|", "\\|")]
)
def test_prose_is_escaped(text: str, escaped: str) -> None:
    assert prose(text) == escaped


def test_code_cannot_be_left() -> None:
    assert code("a`b|c\nd") == "`a'b\\|c d`"


def test_a_comparison_in_markdown(run_folder: Path, tmp_path: Path) -> None:
    slower = make_run(tmp_path / "b", slower={"cpu-int8": 1.2}, seed=50)
    text = comparison_text(compare(run_folder, slower))
    assert text.startswith(f"{MARK}\n## 9 regressions, no improvements in ")
    assert "| `cpu-int8@x86-64-avx512-vnni` | `continue:tpot_ms_p50` | 0.3" in text
    assert text.count("| **regression** |") == 9
    assert "significant and above 5 %" in text
