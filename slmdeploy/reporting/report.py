"""The verb `report`: a run or a measurement as a page and as Markdown, and two of them compared.

Files are written whole or not at all, and what this verb did not write is never replaced. Knows the order of reading,
drawing and writing, and nothing of how each is done.
"""

from pathlib import Path

from slmdeploy.artifacts import scratch
from slmdeploy.errors import InputError, OutputExistsError
from slmdeploy.reporting.compare import Comparison
from slmdeploy.reporting.markdown import MARK, comparison_text, run_text
from slmdeploy.reporting.page import comparison_page, page
from slmdeploy.reporting.reading import SUMMARY, read_run

_OURS = (MARK, '<meta name="generator" content="slmdeploy')
"""What a file that this verb wrote has near its beginning."""
_HEAD_BYTES = 2048


def report(run: Path, *, out: Path | None = None, markdown: Path | None = None, force: bool = False) -> Path:
    """Write the page of a run or measurement, and Markdown if a file is named for it; returns the page's path.

    ``out`` is RUN/report.html by default; of a measurement a file beside it, because the folder is an artifact. Raises
    OutputExistsError when a file is there and ``force`` is off or it is not a report, and what `read_run` raises.
    """
    place = out or _default(run)
    outputs = [place, *([markdown] if markdown else [])]
    _refuse(outputs, force)
    found = read_run(run)
    texts = [page(found), *([run_text(found)] if markdown else [])]
    for file, text in zip(outputs, texts, strict=True):
        _write(file, text)
    return place


def write_comparison(
    comparison: Comparison, *, out: Path | None = None, markdown: Path | None = None, force: bool = False
) -> None:
    """Write a comparison as a page and as Markdown, each where a file is named for it; refuses as `report` does."""
    wanted = [(out, comparison_page), (markdown, comparison_text)]
    named = [(file, draw) for file, draw in wanted if file is not None]
    _refuse([file for file, _ in named], force)
    for file, draw in named:
        _write(file, draw(comparison))


def _default(run: Path) -> Path:
    if (run / SUMMARY).is_file():
        return run / "report.html"
    return run.with_name(f"{run.resolve().name.removesuffix('.json')}-report.html")


def _refuse(files: list[Path], force: bool) -> None:
    """Refuse before any work: a folder, a file without --force, and a file that is no report even with it."""
    for file in files:
        if file.is_dir():
            raise InputError(f"{file} is a folder: name the file to write, such as {file / 'report.html'}")
        if file.exists() and not force:
            raise OutputExistsError(f"{file} exists already: choose another output or pass --force to replace it")
        if file.exists() and not _is_ours(file):
            raise OutputExistsError(
                f"{file} is no report of slmdeploy, so --force does not replace it: remove it yourself"
            )


def _is_ours(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES).decode("utf-8", "replace")
    return any(mark in head for mark in _OURS)


def _write(file: Path, text: str) -> None:
    with scratch(file, "report") as folder:
        temporary = folder / file.name
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
