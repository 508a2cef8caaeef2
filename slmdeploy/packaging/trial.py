"""Tries a package the way a device would: packed, unpacked elsewhere, run in a fresh process that has no torch.

The process sees the standard library and what the package requires, and nothing else of this environment: `-S` leaves
out site-packages, and a folder of links offers those. So what the package forgot cannot help it. A start is measured
the same way: seconds from the first import to the first answer, and the most memory that the process ever had.
"""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slmdeploy.errors import GateError
from slmdeploy.packaging.archive import pack
from slmdeploy.packaging.edge import requirements
from slmdeploy.packaging.unpacking import unpack
from slmdeploy.runtime.bundle import MANIFEST, SCHEMA, RuntimeConfig, read_runtime, sha256_file
from slmdeploy.runtime.encoder_config import EncoderConfig, is_encoder, read_encoder

_TIMEOUT_S = 300
_NEW_TOKENS = 48
_STARTS = 3
_START = """
import sys, time
began = time.perf_counter()
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
from runtime.opening import load
model = load(sys.argv[1])
match sys.argv[2]:
    case "generate": model.generate("Once upon a time", max_new_tokens=1, ignore_eos=True)
    case "score": model.score("a prefix", ["an item"])
    case "embed": model.embed(["a text"])
    case "classify": (model.classify_tokens if model.labels_tokens else model.classify)(["a text"])
seconds = time.perf_counter() - began
import json, resource
try:
    with open("/proc/self/status") as status:
        peak = 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak_bytes": peak}))
"""
"""Linux's ru_maxrss survives exec and so begins at the size of the parent; VmHWM belongs to the program alone."""


@dataclass(frozen=True)
class Start:
    """A fresh start of a package on the machine that packaged it, its hashes verified: medians of several processes.

    ``first_answer_s`` is the time from the first import to the first token, score, vector or label; ``peak_bytes`` the
    most resident memory until then.
    """

    task: str
    first_answer_s: float
    peak_bytes: int
    starts: int

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return asdict(self)


def measure_start(folder: Path, config: RuntimeConfig | EncoderConfig) -> Start:
    """Start the unfinished package in ``folder`` as a device would, for its first task; its manifest comes later.

    Raises GateError with the end of stderr when it does not start.
    """
    task = config.tasks[0]
    with tempfile.TemporaryDirectory(prefix="slmdeploy-start-") as place:
        device = _Device(folder, _link_requirements(requirements(config), Path(place) / "links"))
        manifest = folder / MANIFEST
        manifest.write_text(json.dumps(_provisional(folder)), encoding="utf-8")
        try:
            runs = [
                json.loads(device.call("its first start", "-c", _START, str(device.folder), task))
                for _ in range(_STARTS)
            ]
        finally:
            manifest.unlink()
    seconds = statistics.median(run["seconds"] for run in runs)
    return Start(task, round(seconds, 3), int(statistics.median(run["peak_bytes"] for run in runs)), _STARTS)


def _provisional(folder: Path) -> dict[str, Any]:
    """As much of a manifest as opening the folder takes, so that hashes are verified as on a device."""
    files = {
        file.relative_to(folder).as_posix(): {"sha256": sha256_file(file), "bytes": file.stat().st_size}
        for file in folder.rglob("*")
        if file.is_file()
    }
    return {"schema": SCHEMA, "kind": "package", "content_key": "trial", "files": files}


def try_package(package: Path, data: Path) -> dict[str, Any]:
    """Run `verify` and every task of ``package`` on test or held-out records of ``data``; what came out.

    Raises GateError with the end of stderr when a command of the unpacked package fails.
    """
    config = read_encoder(package) if is_encoder(package) else read_runtime(package)
    tasks, needed = config.tasks, requirements(config)
    with tempfile.TemporaryDirectory(prefix="slmdeploy-trial-") as place:
        archive, links = Path(place) / "package.tar.gz", Path(place) / "links"
        pack(package, archive)
        device = _Device(unpack(archive, Path(place) / "device"), _link_requirements(needed, links))
        found: dict[str, Any] = {
            "torch_importable": device.can_import("torch"),
            "archive_bytes": archive.stat().st_size,
        }
        device.run("verify")
        if "generate" in tasks:
            record = _first(_split(data, "generate"))
            reply = device.run("generate", "--max-new-tokens", str(_NEW_TOKENS), "--json", "--", record["prompt"])
            found["generated"] = json.loads(reply.splitlines()[-1])["text"]
        if "score" in tasks:
            record = _first(_split(data, "score"))
            reply = device.run("score", "--prefix", record["prefix"], "--json", "--", *record["items"])
            found["scores"] = json.loads(reply.splitlines()[-1])["scores"]
            found["best item"] = record["items"][found["scores"].index(max(found["scores"]))]
        if "embed" in tasks:
            found["embedded"] = _first_text(data)
            device.run("embed", "--json", "--", found["embedded"])
        if "classify" in tasks:
            found["classified"] = _first_text(data)
            reply = device.run("classify", "--json", "--", found["classified"])
            found["label"] = json.loads(reply.splitlines()[-1])["labels"][0]
    found["summary"] = (
        f"unpacked elsewhere, verified, and ran {' and '.join(tasks)} in fresh processes with "
        f"{', '.join(needed)} alone (torch {'can' if found['torch_importable'] else 'cannot'} be imported there)"
    )
    return found


class _Device:
    """An unpacked package and the bare interpreter that runs it."""

    def __init__(self, folder: Path, links: Path) -> None:
        self.folder = folder.resolve()  # its processes run elsewhere
        kept = ("PATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT")
        self.environment = {name: os.environ[name] for name in kept if name in os.environ} | {"PYTHONPATH": str(links)}

    def can_import(self, module: str) -> bool:
        """Whether ``module`` can be found there."""
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        return self._call("-c", code).returncode == 0

    def run(self, *arguments: str) -> str:
        """stdout of the package's own command."""
        return self.call(f"run {arguments[0]}", str(self.folder / "run"), *arguments)

    def call(self, what: str, *arguments: str) -> str:
        """stdout of the interpreter with these arguments; GateError that names ``what`` when it fails."""
        try:
            done = self._call(*arguments)
        except subprocess.TimeoutExpired as error:
            raise GateError(
                f"the package does not work where it was unpacked: {what}: no answer within {_TIMEOUT_S} s"
            ) from error
        if done.returncode != 0:
            tail = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise GateError(f"the package does not work where it was unpacked: {what}: {tail[0]}")
        return done.stdout

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", *arguments],
            cwd=self.folder.parent,
            env=self.environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_TIMEOUT_S,
            check=False,
        )


def _link_requirements(names: Iterable[str], folder: Path) -> Path:
    """A folder with a link to each top-level file and folder that the required distributions installed."""
    folder.mkdir()
    for name in names:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
        for top in sorted(tops):
            link = folder / top
            if not link.exists() and top != "__pycache__":
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def _first_text(data: Path) -> str:
    """Of texts alone, or the first one of a pair."""
    alone = _split(data, "generate")
    return str(_first(alone)["prompt"] if alone.is_file() else _first(_split(data, "score"))["prefix"])


def _split(data: Path, task: str) -> Path:
    """The test split, or the held-out one of a folder that has no other."""
    test = data / f"{task}.test.jsonl"
    return test if test.is_file() else data / f"{task}.valid.jsonl"


def _first(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        record: dict[str, Any] = json.loads(file.readline())
    return record
