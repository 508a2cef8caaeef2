"""The embedded default data: the running Python's own standard library, read at run time and split by module.

Two tasks over one text. *generate*: continue documentation and code. *score*: a query (the first sentence of a
docstring) against a symbol's qualified name and signature; every record holds one relevant item and hard negatives
from the same package. Writes the same JSON lines that a user's own data has (docs/data.md), so nothing downstream knows
that it came from here. Knows nothing of tokenizers, models or torch. Nothing of the library is copied into the repo;
another Python version gives slightly other text, which is why the manifest records the version and the hashes.
"""

import ast
import hashlib
import json
import platform
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slmdeploy.artifacts import Artifact, open_artifact, writing

SPLITS = ("train", "valid", "test")
SCORE_LABELS = (" no", " yes")
"""Label words in the order of the label values: a record's label 0 means " no", 1 means " yes"."""

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "turtledemo"}
_TABLES = re.compile(r"encodings/(cp|mac_|iso|koi|ptcp|hp_|kz|tis|palmos|charmap)|_sysconfigdata|/config-3")
_CHUNK_CHARS = 1700
_ITEMS = 10
_SEED = 2502


@dataclass(frozen=True)
class Symbol:
    """A documented function, method or class of one module."""

    module: str
    signature: str
    summary: str


def library_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def sources(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (dotted module name, source text) in a fixed order; generated tables and tests are left out."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT.intersection(relative.parts) or _TABLES.search(str(relative)):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of modules declare another encoding; they are test data in all but name
        yield ".".join(relative.with_suffix("").parts).removesuffix(".__init__"), text


def split_of(module: str) -> str:
    """The split of a module: a hash of its dotted name, so that a module is whole on one side on every machine."""
    bucket = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100
    return "test" if bucket < 12 else "valid" if bucket < 16 else "train"


def chunks(text: str) -> Iterator[dict[str, str]]:
    """Cut a source into generate records of about 1,700 characters at line ends; a quarter of each is the prompt."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= _CHUNK_CHARS:
            yield _record(lines)
            lines = []
    if sum(map(len, lines)) >= _CHUNK_CHARS // 4:
        yield _record(lines)


def _record(lines: list[str]) -> dict[str, str]:
    cut = max(1, len(lines) // 4)
    return {"prompt": "".join(lines[:cut]), "completion": "".join(lines[cut:])}


def symbols(module: str, text: str) -> Iterator[Symbol]:
    """Yield the documented symbols of a module, with qualified name and signature, in source order."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return  # templates such as lib2to3's fixers' data are not valid modules
    yield from _walk(tree, module, module)


def _walk(node: ast.AST, module: str, prefix: str) -> Iterator[Symbol]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{prefix}.{child.name}"
        summary = _first_sentence(ast.get_docstring(child) or "")
        if len(summary.split()) >= 3:
            arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
            yield Symbol(module, f"{name}{arguments}"[:120], summary)
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, module, name)


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph)[0][:200]


def score_records(found: list[Symbol]) -> list[dict[str, object]]:
    """One record per documented symbol with at least four hard negatives, nearest first: same module, then package."""
    packages: dict[str, list[Symbol]] = defaultdict(list)
    for symbol in found:
        packages[symbol.module.split(".")[0]].append(symbol)
    picker = random.Random(_SEED)
    records = []
    for members in packages.values():
        for symbol in members:
            negatives = _negatives(symbol, members, picker)
            if len(negatives) >= 4:
                records.append(_score_record(symbol, negatives, picker))
    return records


def _negatives(symbol: Symbol, members: list[Symbol], picker: random.Random) -> list[str]:
    others = {m.signature: m for m in members if m.summary != symbol.summary and m.signature != symbol.signature}
    near = [s for s, m in others.items() if m.module == symbol.module]
    far = [s for s, m in others.items() if m.module != symbol.module]
    picker.shuffle(near)
    picker.shuffle(far)
    return (near + far)[: _ITEMS - 1]


def _score_record(symbol: Symbol, negatives: list[str], picker: random.Random) -> dict[str, object]:
    candidates = [symbol.signature, *negatives]
    picker.shuffle(candidates)
    return {
        "prefix": f"query: {symbol.summary}\n",
        "items": [f"symbol: {signature}\nrelevant:" for signature in candidates],
        "labels": [int(signature == symbol.signature) for signature in candidates],
    }


def write(folder: Path) -> dict[str, object]:
    """Write {generate,score}.{train,valid,test}.jsonl into ``folder`` and return what was written, for a manifest."""
    modules: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for module, text in sources(library_root()):
        modules[split_of(module)].append((module, text))
    counts: dict[str, object] = {}
    for split, members in modules.items():
        texts = [record for _, text in members for record in chunks(text)]
        pairs = score_records([symbol for module, text in members for symbol in symbols(module, text)])
        random.Random(_SEED).shuffle(texts)
        random.Random(_SEED).shuffle(pairs)
        for task, records in (("generate", texts), ("score", pairs)):
            _write_lines(folder / f"{task}.{split}.jsonl", records)
            counts[f"{task}.{split}"] = len(records)
    return {
        "source": "python standard library",
        "python": platform.python_version(),
        "records": counts,
        "score_labels": list(SCORE_LABELS),
    }


def prepare(out: Path, force: bool = False) -> Artifact:
    """The data artifact at ``out``, made from the running Python's library."""
    plan = {
        "source": "python standard library",
        "python": platform.python_version(),
        "splits": "sha256 of the module name",
    }
    with writing(out, kind="data", plan=plan, inputs={}, force=force) as draft:
        draft.result = write(draft.path)
    return open_artifact(out, "data")


def _write_lines(path: Path, records: list[dict[str, str]] | list[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
