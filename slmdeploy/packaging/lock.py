"""Writes requirements.lock: every distribution that a package needs, of what it needs, with sha256 of its wheel.

The resolver is pip's own, asked what it would install (`pip install --dry-run --report`) within the versions that are
installed here; so the lock names wheels for this machine's Python and system, and says which. The index has to be
reachable, whichever pip is set up with: what is installed does not tell them. Knows nothing of models.
"""

import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmdeploy.errors import InputError

LOCK = "requirements.lock"
_TIMEOUT_S = 600


def lock_requirements(pins: Mapping[str, str], file: Path) -> None:
    """Write the lock of ``pins`` to ``file``, for `pip install --require-hashes -r FILE`.

    Raises InputError where pip is missing, cannot reach its index or offers no wheel with a hash.
    """
    report = _ask_pip(pins)
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", ")
    lines = [f"# Wheels for {platform.python_implementation()} {platform.python_version()} on {system}."]
    for entry in sorted(report["install"], key=lambda entry: str(entry["metadata"]["name"]).lower()):
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        sha256 = entry["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if sha256 is None:
            raise InputError(f"pip tells no sha256 of {name} {version}, so it cannot be locked: package without --lock")
        lines.append(f"{name}=={version} \\\n    --hash=sha256:{sha256}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _ask_pip(pins: Mapping[str, str]) -> dict[str, Any]:
    """pip's installation report for ``pins`` and all that they need, as for an empty environment."""
    with tempfile.TemporaryDirectory(prefix="slmdeploy-lock-") as place:
        constraints, report = Path(place) / "constraints.txt", Path(place) / "report.json"
        installed = {one.name: one.version for one in importlib.metadata.distributions()}
        # A local version such as 2.13.0+cpu is on no index; what needs it is not a device's.
        constraints.write_text("".join(f"{n}=={v}\n" for n, v in sorted(installed.items()) if "+" not in v))
        options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
        wanted = [f"{name}=={version}" for name, version in pins.items()]
        command = [sys.executable, "-m", "pip", "install", *options, "--report", str(report), "-c", str(constraints)]
        try:
            done = subprocess.run(
                [*command, *wanted], capture_output=True, text=True, encoding="utf-8", timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(f"pip gave no answer within {_TIMEOUT_S} s: package without --lock") from error
        if done.returncode != 0:
            reason = next((line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line), "")
            raise InputError(f"the requirements cannot be locked ({reason.strip()}): package without --lock")
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found
