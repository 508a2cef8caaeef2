"""Measures builds on another machine over ssh: one connection, a temporary folder there, one .json file back.

The builds and this package's own sources travel as a tar stream on ssh's stdin, `python3 -m slmdeploy profile` runs
there, and what it wrote comes back on stdout. The other machine needs sh, tar, Python and the base dependencies, no
slmdeploy. stdin stays open while it works: when it closes, because of Ctrl-C here or a lost connection, the run there
is ended, and its folder is removed whichever way it ends. Knows nothing of what profile measures.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from slmdeploy.artifacts import open_artifact, scratch
from slmdeploy.errors import CorruptArtifactError, InputError, OutputExistsError, ResourceError, SlmdeployError
from slmdeploy.profiling.candidates import unique_names
from slmdeploy.specs.base import shipped

DEPENDENCIES = ("jinja2", "numpy", "onnxruntime", "pydantic", "rich", "tokenizers", "typer")
"""The base dependencies of pyproject.toml, whose import names are the same."""
OLDEST = (3, 11)

_HOST = re.compile(
    r"(?P<host>(?:[A-Za-z0-9_.][\w.-]*@)?(?:[A-Za-z0-9_.][\w.-]*|\[[0-9A-Fa-f:.]+\]))(?::(?P<port>\d{1,5}))?", re.ASCII
)
_OPTIONS = ("-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15")
_NO_PYTHON, _OLD_PYTHON, _LACKS, _NO_TAR, _NO_CONNECTION = 91, 92, 93, 94, 255
_RAISED = {kind.exit_code: kind for kind in (InputError, CorruptArtifactError, ResourceError)}

_CHECK = f"""
import importlib.util as util, sys
if sys.version_info < {OLDEST}:
    sys.exit({_OLD_PYTHON})
lacking = [name for name in {DEPENDENCIES} if util.find_spec(name) is None]
print(*lacking)
sys.exit({_LACKS} if lacking else 0)
"""

_SCRIPT = """
set -eu
umask 077
command -v {python} >/dev/null || exit {no_python}
command -v tar >/dev/null || exit {no_tar}
{python} -c {check} </dev/null
work=$(mktemp -d "${{TMPDIR:-/tmp}}/slmdeploy.XXXXXXXX")
trap 'cd /; rm -rf "$work"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
cd "$work"
tar xf -
exec 3<&0
TMPDIR="$work" PYTHONDONTWRITEBYTECODE=1 {python} -m slmdeploy {arguments} </dev/null >&2 &
job=$!
( cat <&3; kill "$job" ) >/dev/null 2>&1 &
watch=$!
code=0
wait "$job" || code=$?
kill "$watch" 2>/dev/null || true
test "$code" -ne 0 || cat measurement.json
exit "$code"
"""
"""What runs there. The part in parentheses waits for the end of stdin; sh gives other jobs in the background none."""


@dataclass(frozen=True)
class Host:
    """Where to: `user@host` as ssh takes it, and the port where it is not ssh's own choice."""

    destination: str
    port: int | None = None

    def command(self, script: str) -> list[str]:
        """The ssh call that runs ``script`` there."""
        port = [] if self.port is None else ["-p", str(self.port)]
        return ["ssh", *_OPTIONS, *port, "--", self.destination, script]


def parse_host(text: str) -> Host:
    """Read ``user@host``, ``host``, either with ``:port``; an IPv6 address in brackets. InputError shows the form."""
    found = _HOST.fullmatch(text)
    port = int(found["port"]) if found and found["port"] else None
    if not found or port == 0 or (port or 0) > 65535:
        raise InputError(f"--remote {text!r} is not of the form user@host or user@host:port")
    return Host(found["host"].replace("[", "").replace("]", ""), port)


def profile_options(
    workloads: Sequence[str],
    recipe: Path | None,
    data: Path | None,
    baseline: Path | None,
    watch: Sequence[str],
    precision: float,
    limit: float,
    threads: int | None,
    search: bool,
) -> list[str | Path]:
    """The options of `slmdeploy profile` as they are given there, files and folders of this machine as paths.

    Raises InputError for a recipe, which names files beside it that would have to travel too.
    """
    if recipe is not None:
        raise InputError(f"--recipe {recipe} does not go with --remote: name its workloads with --workload")
    words: list[str | Path] = ["--precision", repr(precision), "--limit", repr(limit)]
    if search:
        words.append("--search")
    for name in workloads:
        words += ["--workload", Path(name) if name.endswith((".toml", ".jsonl")) else name]
    for name in watch:
        words += ["--watch", name]
    for option, value in (("--data", data), ("--baseline", baseline), ("--threads", threads)):
        if value is not None:
            words += [option, value if isinstance(value, Path) else str(value)]
    return words


def profile_remote(
    host: str,
    builds: Sequence[Path],
    profile_arguments: Sequence[str | Path],
    out: Path,
    *,
    python: str = "python3",
    force: bool = False,
) -> Path:
    """Run `slmdeploy profile` on ``host`` and write its measurement to the .json file ``out``.

    ``profile_arguments`` are options of `profile` but the output; a Path among them is a file or folder of this machine
    and is copied there too. ``python`` is a name or an absolute path there. Raises InputError where the other machine
    cannot be reached or lacks something, and what `profile` there ended with otherwise.
    """
    where = parse_host(host)
    if out.suffix != ".json":
        raise InputError(f"{out} is no .json file: with --remote the measurement is one file, e.g. -o {out.name}.json")
    if out.exists() and not force:
        raise OutputExistsError(f"{out} exists already: choose another output or pass --force to replace it")
    if shutil.which("ssh") is None:
        raise InputError("there is no ssh on the PATH: --remote needs the OpenSSH client")
    names = dict(zip(unique_names(builds), builds, strict=True))
    for build in builds:
        open_artifact(build)  # what is damaged here is not sent
    copies, words = _places(profile_arguments)
    folders = {f"builds/{name}": path for name, path in names.items()}
    words = ["profile", *folders, *words, "-o", "measurement.json"]
    script = _SCRIPT.format(
        python=shlex.quote(python),
        check=shlex.quote(_CHECK),
        arguments=shlex.join(words),
        no_python=_NO_PYTHON,
        no_tar=_NO_TAR,
    )
    report = _converse(where.command(script), folders | copies, where, python)
    _localise(report, names, where)
    with scratch(out, "remote") as folder:
        (folder / out.name).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (folder / out.name).replace(out)
    return out


def _places(arguments: Sequence[str | Path]) -> tuple[dict[str, Path], list[str]]:
    """Where the files among the arguments go there, and the arguments with those places in their stead."""
    copies: dict[str, Path] = {}
    words = []
    for argument in arguments:
        if isinstance(argument, Path):
            place = f"inputs/{len(copies)}/{argument.resolve().name}"
            copies[place] = argument
            words.append(place)
        else:
            words.append(argument)
    return copies, words


def _converse(command: Sequence[str], copies: Mapping[str, Path], host: Host, python: str) -> dict[str, Any]:
    """Send the files, wait, and read the measurement that comes back."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as replied:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=replied, stderr=said)
        assert process.stdin is not None
        try:
            # A run that ends early, because something is missing there, takes no more bytes; its status says why.
            with suppress(BrokenPipeError):
                _send(process.stdin, copies)
                process.stdin.flush()
            code = process.wait()
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
        said.seek(0)
        replied.seek(0)
        reply, words = replied.read(), said.read().decode(errors="replace").strip().splitlines()
    if code:
        raise _failure(code, reply.decode(errors="replace"), words, host, python)
    try:
        report: dict[str, Any] = json.loads(reply)
    except ValueError as error:
        raise ResourceError(f"{host.destination} sent no measurement back but {reply[:60]!r}: try again") from error
    return report


def _send(stream: IO[bytes], copies: Mapping[str, Path]) -> None:
    """The tar stream: sources, targets and profiles of this package, and the copies at their places."""
    package = Path(__file__).parents[1]
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for file in sorted(package.rglob("*.py")):
            tar.add(file, f"slmdeploy/{file.relative_to(package).as_posix()}", filter=_anonymous)
        for kind in ("targets", "profiles"):
            tar.add(shipped(kind), f"slmdeploy/_data/{kind}", filter=_anonymous)
        for place, path in copies.items():
            tar.add(path, place, filter=_anonymous)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The entry without its owner, who is nobody there."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _failure(code: int, reply: str, words: Sequence[str], host: Host, python: str) -> SlmdeployError:
    """The error that the end of a run there stands for."""
    last = words[-1].strip() if words else "no message"
    name, oldest = host.destination, ".".join(map(str, OLDEST))
    install = f"{python} -m pip install {' '.join(DEPENDENCIES)}"
    known = {
        _NO_PYTHON: f"{name} has no {python}: name its Python with --remote-python",
        _OLD_PYTHON: f"{python} on {name} is older than {oldest}: name a newer one with --remote-python",
        _LACKS: f"{python} on {name} lacks {', '.join(reply.split())}: run `{install}` there",
        _NO_TAR: f"{name} has no tar, with which the builds are unpacked: install it there",
        _NO_CONNECTION: f"ssh to {name} failed: {last}",
    }
    if code in known:
        return InputError(known[code])
    said = last.removeprefix("error: ") if words else f"the run ended with status {code}"
    return _RAISED.get(code, ResourceError)(f"on {name}: {said}")


def _localise(report: dict[str, Any], builds: Mapping[str, Path], host: Host) -> None:
    """Put the paths of this machine in the rows, whose own are gone with the folder there."""
    rows = report.get("rows")
    known = {*builds, "baseline"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.get("build") in known for row in rows):
        raise ResourceError(f"{host.destination} sent no measurement of these builds back: try again")
    for row in rows:
        if row["build"] in builds:
            row["path"] = os.fspath(builds[row["build"]])
