"""provider.json: what ONNX Runtime's TensorRT providers compile a graph with when it is opened, and as which options.

    workspace, level and shapes of each phase -> the options of one session for each phase

Prompts and steps have a session each, as a plan has an optimisation profile for each. No option says a precision: with
none of them the provider takes the types that the graph has, FP8 behind QuantizeLinear among them. What was compiled is
kept in the user's cache folder, in a place named by the content of the graph: the provider's own names know a graph's
form and not its weights. Names are those of ONNX Runtime's documentation and of the header that NVIDIA ships. Knows
nothing of sessions.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import CorruptArtifactError, ResourceError
from .strictjson import read_object
from .tensorrt_plan import Phase, Shapes, optional_integer, read_phases

FILE = "provider.json"
FORMAT = 1
PROMPTS, STEPS = "prefill", "decode"


@dataclass(frozen=True)
class ProviderOptions:
    """provider.json, checked. ``level`` 0 to 5 trades time to compile for speed; None leaves it to the compiler."""

    workspace_bytes: int
    level: int | None
    phases: tuple[Phase, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of provider.json."""
        return {"format": FORMAT} | asdict(self)

    def of(self, phase: str, provider: str, cache: Path) -> dict[str, str]:
        """The options of the session of a phase, for ``tensorrt`` or ``tensorrt_rtx``."""
        shapes = next(one.shapes for one in self.phases if one.name == phase)
        if provider == "tensorrt":
            return self._tensorrt(shapes, cache)
        return {
            "nv_max_workspace_size": str(self.workspace_bytes),
            "nv_runtime_cache_path": str(cache),
            "enable_cuda_graph": "0",  # recorded work has fixed shapes, and each step sees a longer past
            **_profiles("nv", shapes),
        }

    def _tensorrt(self, shapes: Shapes, cache: Path) -> dict[str, str]:
        level = {} if self.level is None else {"trt_builder_optimization_level": str(self.level)}
        return {
            "trt_max_workspace_size": str(self.workspace_bytes),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(cache),
            **level,
            **_profiles("trt", shapes),
        }


def _profiles(prefix: str, shapes: Shapes) -> dict[str, str]:
    """The least, likeliest and largest shapes as ``input:1x8,other:1x8``."""
    found = {}
    for index, kind in enumerate(("min", "opt", "max")):
        parts = [f"{name}:{'x'.join(map(str, triple[index]))}" for name, triple in shapes.items()]
        found[f"{prefix}_profile_{kind}_shapes"] = ",".join(parts)
    return found


def read_options(folder: Path) -> ProviderOptions:
    """Parse ``folder``/provider.json; anything that is not as it should be is a CorruptArtifactError."""
    fields = read_object(folder / FILE)
    fields.integer("format", FORMAT, FORMAT)
    options = ProviderOptions(
        workspace_bytes=fields.integer("workspace_bytes", 1, 1 << 44),
        level=optional_integer(fields, "level", 5),
        phases=read_phases(fields),
    )
    fields.finish()
    if [phase.name for phase in options.phases] != [PROMPTS, STEPS]:
        fields.refuse("phases", f"the phases {PROMPTS} and {STEPS}")
    names = [name for phase in options.phases for name in phase.shapes]
    if odd := next((name for name in names if not name or set(name) & set(":,;")), None):
        raise CorruptArtifactError(f"{folder / FILE}: an input cannot be named {odd[:80]!r}; build the folder again.")
    return options


def write_options(folder: Path, options: ProviderOptions) -> None:
    """Write ``folder``/provider.json."""
    (folder / FILE).write_text(json.dumps(options.to_json(), indent=1) + "\n", encoding="utf-8")


def cache_folder(home: Mapping[str, str] | None = None) -> Path:
    """Where this user's compiled engines are: $SLMDEPLOY_CACHE, else $XDG_CACHE_HOME/slmdeploy, else ~/.cache/…"""
    environment = os.environ if home is None else home
    if own := environment.get("SLMDEPLOY_CACHE"):
        return Path(own) / "engines"
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "slmdeploy" / "engines"


def engine_place(content: Mapping[str, str], about: Mapping[str, object]) -> Path:
    """The folder for engines of these files (sha256 by name) under these conditions, made where it is not there.

    For this user alone: an engine is native code. Raises ResourceError where it cannot be made.
    """
    key = json.dumps([dict(content), dict(about)], sort_keys=True)
    place = cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{place} cannot be made ({error.strerror}): set SLMDEPLOY_CACHE to another place."
        ) from None
    return place
