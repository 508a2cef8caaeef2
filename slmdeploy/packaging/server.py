"""What a server needs around a package: an image, compose, Kubernetes and Ray Serve files, and Triton's repository.

Everything lies in the folder server/ and is made of templates/; the numbers in it are the package's own: memory that
was measured, keys and values that follow from the model's shape, threads of its session. The server's
code goes along as it is here, so that the image needs no index for it. Knows nothing of HTTP.
"""

import re
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from slmdeploy import runtime
from slmdeploy.errors import MissingExtraError
from slmdeploy.packaging import triton
from slmdeploy.packaging.edge import PINS, pin_lines, requirements, write_text
from slmdeploy.packaging.lock import LOCK, lock_requirements
from slmdeploy.runtime.bundle import RuntimeConfig
from slmdeploy.runtime.encoder_config import EncoderConfig
from slmdeploy.runtime.requests import EngineSettings

FOLDER = "server"
PORT = 8000
USER = 10001
QUEUE_METRIC = "slmdeploy_queued"
"""The gauge of serving/metrics.py that servers are added by; a test holds the two together."""
QUEUE_TARGET = 4
GRACE_S = 60
"""What a server that is told to end gets: twice the time in which it finishes what it has begun."""
SETTLE_S = 5
STARTUP_TRIES = 150
ALLOWANCE = 1.25
"""On what was measured, for what was not: the HTTP side and the activations of longer prompts."""
_TEMPLATES = {
    "Dockerfile.j2": "Dockerfile",
    "compose.yaml.j2": "compose.yaml",
    "deployment.yaml.j2": "kubernetes/deployment.yaml",
    "service.yaml.j2": "kubernetes/service.yaml",
    "autoscaler.yaml.j2": "kubernetes/autoscaler.yaml",
    "disruption.yaml.j2": "kubernetes/disruption.yaml",
    "serve.yaml.j2": "ray/serve.yaml",
    "README.md.j2": "README.md",
}
_CACHE_BYTES = {"float32": 4, "float16": 2}


def pins(config: RuntimeConfig | EncoderConfig) -> dict[str, str]:
    """The distributions that a server of this build needs, with the versions that are installed here.

    Raises MissingExtraError where one of them is not installed.
    """
    found = {}
    for name in dict.fromkeys([*requirements(config), *_declared()]):
        try:
            found[name] = version(name)
        except PackageNotFoundError as error:
            raise MissingExtraError(
                f"a server needs {name}, which is not installed here, so there is no version to pin: "
                "pip install 'slmdeploy[serve]'"
            ) from error
    return found


def _declared() -> list[str]:
    """Base dependencies of slmdeploy and those of its extra serve, by name."""
    serving = _requirements("serve")
    if not serving:
        raise MissingExtraError(
            "slmdeploy's own metadata names no requirements of a server: install this version of it again"
        )
    return [re.split(r"[^\w.-]", line)[0] for line in [*_requirements(None), *serving]]


def _requirements(extra: str | None) -> list[str]:
    """The requirements of slmdeploy that go with an extra, or with none, as its metadata has them."""
    lines = [line.partition(";") for line in requires("slmdeploy") or ()]
    found = [(line.strip(), re.search(r"""extra == ["'](\w+)["']""", marker)) for line, _, marker in lines]
    return [line for line, match in found if (match.group(1) if match else None) == extra]


def write(
    folder: Path,
    config: RuntimeConfig | EncoderConfig,
    pins: Mapping[str, str],
    peak_bytes: int,
    content_key: str,
    *,
    lock: bool,
) -> dict[str, Any]:
    """Write server/ into the package ``folder`` and return what its files ask a machine for.

    ``peak_bytes`` is the most resident memory that was measured; ``content_key`` names the image.
    """
    home = folder / FOLDER
    home.mkdir()
    write_text(home / PINS, pin_lines(pins))
    if lock:
        lock_requirements(pins, home / LOCK)
    ours = Path(runtime.__file__).parent.parent
    shutil.copytree(ours, home / "slmdeploy", ignore=shutil.ignore_patterns("__pycache__"), copy_function=_copy)
    asked = _resources(config, peak_bytes)
    repository = triton.write(folder, home / "triton", config)
    values = asked | {
        "image": f"slm-server:{content_key[:12]}",
        "version": content_key[:12],
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "requirements": LOCK if lock else PINS,
        "locked": lock,
        "port": PORT,
        "user": USER,
        "grace_s": GRACE_S,
        "settle_s": SETTLE_S,
        "startup_tries": STARTUP_TRIES,
        "queue_metric": QUEUE_METRIC,
        "queue_target": QUEUE_TARGET,
        "slots": EngineSettings().slots,
        "waiting": EngineSettings().max_waiting,
        "ray": " ".join(_requirements("scale")),
        "triton": repository.backend if repository else None,
        "models": {name: ", ".join(outputs) for name, outputs in repository.outputs.items()} if repository else {},
    }
    _render(home, values)
    return asked


def _copy(source: str, target: str) -> str:
    shutil.copyfile(source, target)
    return target


def _render(home: Path, values: Mapping[str, Any]) -> None:
    # Imported here: who packages for the edge, or verifies, needs no templates.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(templates), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    for name, target in _TEMPLATES.items():
        file = home / target
        file.parent.mkdir(exist_ok=True)
        write_text(file, environment.get_template(name).render(values))


def _resources(config: RuntimeConfig | EncoderConfig, peak_bytes: int) -> dict[str, Any]:
    """Memory and threads of one server; bytes that are promised, and bytes that are never passed."""
    cache = EngineSettings().prefix_cache_bytes if isinstance(config, RuntimeConfig) else 0
    request = int(peak_bytes * ALLOWANCE) + cache
    limit = request + keys_and_values(config)
    said = (
        f"{peak_bytes} bytes measured, times {ALLOWANCE}, plus {cache} for the prefix cache; "
        f"the limit adds {limit - request} for keys and values of all slots to the end of the context"
    )
    return {"memory": said, "request_bytes": request, "limit_bytes": limit, "threads": config.threads or 1}


def keys_and_values(config: RuntimeConfig | EncoderConfig) -> int:
    """Bytes of the keys and values of all slots of a server, each to the end of the context; 0 without a cache."""
    if isinstance(config, EncoderConfig):
        return 0
    per_token = 2 * sum(config.kv_heads) * config.head_dim * _CACHE_BYTES[config.cache]
    return per_token * config.max_length * EngineSettings().slots
