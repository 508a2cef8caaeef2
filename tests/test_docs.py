"""README.md and docs/ say what is true: their commands parse, their links and the files that they name exist.

A command is parsed by the real command line and not run: an unknown verb or option, a missing argument or a value of
the wrong type fails here. Knows nothing of the prose.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from slmdeploy.cli import app
from slmdeploy.specs import load_profile, load_recipe

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
REPOSITORY_FILE = re.compile(r"(?<![\w/.-])(?:examples|targets|profiles|benchmarks|docs|tests|slmdeploy)/[\w./-]*\w")
SEPARATORS = {"|", "||", "&&", ";", ">", "2>"}


def shell_blocks(text: str) -> Iterator[str]:
    """The text of each fenced block whose language is ``sh``, with continued lines joined."""
    for language, body in FENCE.findall(text):
        if language == "sh":
            yield body.replace("\\\n", " ")


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every ``slmdeploy`` call in the shell blocks of a page."""
    for block in shell_blocks(text):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            for position, word in enumerate(words):
                if word.rsplit("/", 1)[-1] == "slmdeploy" and (position == 0 or words[position - 1] in SEPARATORS):
                    rest = words[position + 1 :]
                    end = next((at for at, after in enumerate(rest) if after in SEPARATORS), len(rest))
                    yield rest[:end]


def parse(arguments: list[str]) -> None:
    """Parse a call as the command line does, without running it; raises the parser's error."""
    group = typer.main.get_command(app)
    verb, rest = arguments[0], arguments[1:]
    try:
        if verb.startswith("-"):
            group.make_context("slmdeploy", arguments).close()
        else:
            assert verb in group.commands, f"there is no verb {verb!r}"
            group.commands[verb].make_context(verb, rest).close()
    except typer.Exit:
        pass  # --help and --version end the parse


def anchors(text: str) -> set[str]:
    """The fragment of each heading, as the usual Markdown renderers make it."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page whose file or heading does not exist."""
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = page.parent / name if name else page
        lost = fragment and target.suffix == ".md" and fragment not in anchors(target.read_text(encoding="utf-8"))
        if not target.exists() or lost:
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page: Path) -> None:
    for arguments in commands(page.read_text(encoding="utf-8")):
        parse(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = set(REPOSITORY_FILE.findall(page.read_text(encoding="utf-8")))
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    assert broken_links(page) == []


def test_the_example_of_a_recipe_is_a_recipe(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "recipe.md").read_text(encoding="utf-8")
    (example,) = (body for language, body in FENCE.findall(page) if language == "toml")
    file = tmp_path / "recipe.toml"
    file.write_text(example, encoding="utf-8")
    recipe = load_recipe(file)
    assert [load_profile(name).name for name in recipe.candidates.profiles] == list(recipe.candidates.profiles)


def test_the_architecture_page_names_every_module() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = {file.name for file in (REPOSITORY / "slmdeploy").rglob("*.py")}
    assert {name for name in modules if f"`{name}`" not in page} == set()


def test_every_page_and_benchmark_that_the_code_names_exists() -> None:
    sources = sorted((REPOSITORY / "slmdeploy").rglob("*.py"))
    code = "\n".join(file.read_text(encoding="utf-8") for file in sources)
    named = set(re.findall(r"\b(?:docs|benchmarks)/[\w./-]*\w", code))
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()


def test_the_readme_shows_the_main_command() -> None:
    assert any(arguments[0] == "run" for arguments in commands(PAGES[0].read_text(encoding="utf-8")))


def test_commands_are_found_and_cut_at_the_right_places() -> None:
    block = "cd x && .venv/bin/slmdeploy run a.toml \\\n  -o b | tail  # then\nls slmdeploy\n"
    text = f"```sh\n{block}```\n```text\nslmdeploy no\n```\n"
    assert list(commands(text)) == [["run", "a.toml", "-o", "b"]]


@pytest.mark.parametrize("call", ["fly away", "export checkpoint -o graph --no-such-option", "run recipe.toml"])
def test_a_command_that_the_parser_refuses_is_found(call: str) -> None:
    with pytest.raises(Exception, match=r"no verb|No such option|Missing parameter"):
        parse(call.split())


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    links = "[a](page.md) [b](#a-heading) [c](lost.md) [d](#lost) [e](https://x.y/z)"
    page.write_text(f"# A heading\n{links}\n", encoding="utf-8")
    assert broken_links(page) == ["lost.md", "#lost"]
