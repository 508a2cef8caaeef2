"""The NVIDIA GPUs of this machine, as nvidia-smi tells them; none where there is no such program or no driver.

Asks the program and imports no GPU package, so it works without any extra. The CUDA version is the newest that the
driver runs, which is what decides whether a package fits; toolkits that are installed beside it do not count.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass

_QUERY = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits"]
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Gpu:
    """One GPU; ``cuda`` is the newest CUDA version that its driver runs, None where it is not told."""

    name: str
    compute_capability: str
    memory_bytes: int
    driver: str | None = None
    cuda: str | None = None


def nvidia_gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; none where it is not installed, hangs or finds no driver."""
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = _output(_QUERY)
    return read_gpus(listed, read_cuda(_output(["nvidia-smi"]))) if listed else ()


def _output(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout if run.returncode == 0 else ""


def read_gpus(listed: str, cuda: str | None = None) -> tuple[Gpu, ...]:
    """Parse nvidia-smi's lines `name, compute capability, MiB, driver version`."""
    rows = re.findall(r"^(.+), (\d+\.\d+), (\d+), ([\d.]+)$", listed, re.MULTILINE)
    return tuple(Gpu(name.strip(), capability, int(mib) << 20, driver, cuda) for name, capability, mib, driver in rows)


def read_cuda(banner: str) -> str | None:
    """The CUDA version in the table that plain `nvidia-smi` prints."""
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", banner)
    return found.group(1) if found else None
