"""The dependency rule of docs/architecture.md, checked on the syntax tree of every module in slmdeploy/.

An import points down the house or stays in its own room; only the torch side imports torch; the ground floor imports
three packages and nothing else of slmdeploy; whatever is imported is declared in pyproject.toml. Imports inside
functions count like all others: laziness is no way round the rule. Knows nothing of what the modules do.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "slmdeploy"

HOUSE = (
    ("cli", "__main__"),
    ("commands",),
    ("console", "console_evaluation", "console_report", "console_selection"),
    ("pipeline", "elsewhere", "encoder_pipeline", "__init__"),
    ("verification", "latency"),
    ("exporting", "compress"),
    ("profiling", "evaluation"),
    ("building",),
    ("scaling",),
    ("serving",),
    ("packaging",),
    ("reporting",),
    ("selection",),
    ("artifacts", "corpus", "checkpoint"),
    ("specs", "metrics", "progress", "extras"),
    ("errors", "version"),
    ("runtime",),
)
"""Top to bottom. A name is a module or a room."""

ROOMS = {
    "commands",
    "exporting",
    "compress",
    "profiling",
    "evaluation",
    "building",
    "scaling",
    "serving",
    "packaging",
    "reporting",
    "selection",
    "runtime",
}
"""The folders. Two rooms on one floor do not import each other; modules on one floor may."""

TORCH = {"torch", "transformers", "accelerate", "datasets", "optimum"}
TORCH_SIDE = {"exporting", "compress"}
TORCH_FREE = {"compress.plan"}
"""Modules of the torch side that the command line reads before it is known whether torch is there."""

BUILD_EXTRA = TORCH_SIDE | {"building", "checkpoint"}
"""Places that may use what the ``build`` extra installs; torch and its company stay on the torch side even so."""

GROUND = {"numpy", "onnxruntime", "tokenizers"}
GROUND_BESIDES = {"runtime.chat": {"jinja2"}, "runtime.openvino_session": {"openvino"}}
"""What one module of the ground floor may use besides, imported when it is called: a device without chats, or without
builds of that engine, lacks it."""


def floor(place: str) -> int | None:
    """The floor of a module or room, 0 at the top; None if the house has no such place."""
    return next((number for number, places in enumerate(HOUSE) if place in places), None)


def module_name(file: Path, package: Path) -> str:
    """Dotted name below the package: ``building.quantize``, ``runtime.__init__``, ``__init__``."""
    return ".".join(file.relative_to(package).with_suffix("").parts)


def imported(tree: ast.Module, module: str, package: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, absolute dotted name, whether it was written as a relative import) for each import of a module."""
    home = ["slmdeploy", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name != "slmdeploy":
                yield node.lineno, name, bool(node.level)
                continue
            for alias in node.names:  # `from slmdeploy import specs` is the module, anything else is the API
                inside = (package / f"{alias.name}.py").exists() or (package / alias.name).is_dir()
                yield node.lineno, f"slmdeploy.{alias.name}" if inside else "slmdeploy", bool(node.level)


OWN_EXTRAS = {
    "evaluation": ("eval",),
    "packaging": ("package",),
    "scaling": ("scale", "serve"),
    "serving": ("serve",),
}
"""Rooms that may use extras which no other place may."""


@cache
def declared() -> tuple[set[str], set[str], dict[str, set[str]]]:
    """Import names of base dependencies, of what building and of what each room alone may use, as in pyproject.toml."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in requirements}

    extras = project["optional-dependencies"]
    own = {room: {name for one in used for name in names(extras[one])} for room, used in OWN_EXTRAS.items()}
    return names(project["dependencies"]), names([*extras["build"], *extras["openvino"]]), own


def refusal(module: str, target: str, relative: bool) -> str | None:
    """Why ``module`` may not import ``target``, as the end of a sentence, or None if it may."""
    here = module.split(".")[0]
    if target.split(".")[0] == "slmdeploy":
        return _inside(here, [*target.split("."), "__init__"][1], relative)
    return _outside(module, here, target.split(".")[0])


def _inside(here: str, there: str, relative: bool) -> str | None:
    own, other = floor(here), floor(there)
    if own is None or other is None:
        return f"but {here if own is None else there} has no place in the house"
    if here == "runtime" and not relative:
        return "but the ground floor is copied into packages and uses relative imports"
    if own > other:
        return "which points up"
    if own == other and here != there and ROOMS.intersection((here, there)):
        return "but rooms on one floor do not import each other"
    return None


def _outside(module: str, here: str, package: str) -> str | None:
    if package in sys.stdlib_module_names:
        return None
    base, extra, own = declared()
    if here == "runtime" and package not in GROUND | GROUND_BESIDES.get(module, set()):
        return f"but the ground floor imports only {', '.join(sorted(GROUND))}"
    if package in TORCH and (here not in TORCH_SIDE or module in TORCH_FREE):
        return "but only the torch side may"
    besides = GROUND_BESIDES.get(module, set())
    if package in base | besides or (package in extra and here in BUILD_EXTRA):
        return None
    if package in own.get(here, set()):
        return None
    return "which pyproject.toml does not declare for this place"


def violations(package: Path) -> list[str]:
    """Every import below ``package`` that breaks the rule, each as ``file:line imports name, why``."""
    found = []
    for file in sorted(package.rglob("*.py")):
        module = module_name(file, package)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if floor(module.split(".")[0]) is None:
            found.append(f"slmdeploy/{file.relative_to(package)} has no place in the house")
            continue
        for line, target, relative in imported(tree, module, package):
            why = refusal(module, target, relative)
            if why:
                found.append(f"slmdeploy/{file.relative_to(package)}:{line} imports {target}, {why}")
    return found


def test_every_import_follows_the_rule() -> None:
    assert violations(PACKAGE) == []


def test_the_walk_sees_the_package() -> None:
    imports = {
        (module_name(file, PACKAGE), target)
        for file in PACKAGE.rglob("*.py")
        for _, target, _ in imported(ast.parse(file.read_text(encoding="utf-8")), module_name(file, PACKAGE), PACKAGE)
    }
    assert ("errors", "slmdeploy.runtime.errors") in imports
    assert ("runtime.bundle", "slmdeploy.runtime.errors") in imports


PLANTED = [
    ("specs.py", "from slmdeploy.pipeline import run", "points up"),
    ("specs.py", "from slmdeploy import pipeline", "points up"),
    ("specs.py", "import slmdeploy.pipeline", "points up"),
    ("specs.py", "from . import pipeline", "points up"),
    ("specs.py", "def late():\n    from slmdeploy.cli import main", "points up"),
    ("errors.py", "from slmdeploy import __version__", "points up"),
    ("exporting/export.py", "from slmdeploy.compress import prune", "rooms on one floor"),
    ("runtime/kv.py", "from slmdeploy.runtime import errors", "relative imports"),
    ("runtime/kv.py", "from ..specs import Target", "points up"),
    ("runtime/kv.py", "import pydantic", "ground floor imports only"),
    ("runtime/kv.py", "import jinja2", "ground floor imports only"),
    ("runtime/openvino_decoding.py", "import openvino", "ground floor imports only"),
    ("profiling/worker.py", "import openvino", "does not declare"),
    ("profiling/worker.py", "import torch", "only the torch side"),
    ("profiling/worker.py", "import lm_eval", "does not declare"),
    ("profiling/worker.py", "from slmdeploy.evaluation import harness", "rooms on one floor"),
    ("evaluation/harness.py", "import torch", "only the torch side"),
    ("packaging/server.py", "import fastapi", "does not declare"),
    ("serving/app.py", "import ray", "does not declare"),
    ("serving/app.py", "from slmdeploy.scaling import ray_serve", "points up"),
    ("serving/app.py", "import lm_eval", "does not declare"),
    ("specs.py", "from torch import nn", "only the torch side"),
    ("packaging/edge.py", "import onnx_ir", "does not declare"),
    ("building/build.py", "import scipy.optimize", "does not declare"),
    ("cellar.py", "import json", "no place in the house"),
    ("specs.py", "from slmdeploy.cellar import wine", "no place in the house"),
]


@pytest.mark.parametrize(("name", "source", "why"), PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, name: str, source: str, why: str) -> None:
    package = tmp_path / "slmdeploy"
    (package / name).parent.mkdir(parents=True)
    (package / "pipeline.py").touch()
    (package / name).write_text(source, encoding="utf-8")
    (found,) = violations(package)
    assert found.startswith(f"slmdeploy/{name}")
    assert why in found


ALLOWED = [
    ("pipeline.py", "def run():\n    from slmdeploy.exporting.export import export"),
    ("pipeline.py", "from slmdeploy import specs"),
    ("exporting/eager.py", "import torch\nfrom slmdeploy.profiling.worker import serve"),
    ("exporting/export.py", "from slmdeploy.exporting import parity\nfrom . import decoder"),
    ("artifacts.py", "from slmdeploy.corpus import write"),
    ("building/build.py", "import onnx_ir as ir\nimport numpy as np"),
    ("evaluation/harness.py", "from lm_eval.api.model import TemplateLM"),
    ("serving/app.py", "from fastapi import FastAPI\nfrom slmdeploy.runtime.engine import Engine"),
    ("runtime/kv.py", "import os.path\nimport numpy as np\nfrom .errors import InputError\nfrom . import session"),
]


@pytest.mark.parametrize(("name", "source"), ALLOWED)
def test_what_the_rule_allows_is_not_reported(tmp_path: Path, name: str, source: str) -> None:
    package = tmp_path / "slmdeploy"
    (package / name).parent.mkdir(parents=True)
    (package / "specs.py").touch()
    (package / name).write_text(source, encoding="utf-8")
    assert violations(package) == []
