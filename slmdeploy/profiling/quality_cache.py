"""What was found out about a candidate's quality, kept by content: the same build on the same records is asked once.

A file per candidate and task under the user's cache folder ($SLMDEPLOY_CACHE, else $XDG_CACHE_HOME/slmdeploy, else
~/.cache/slmdeploy). A file that is damaged or of another form counts as not there. Knows nothing of what the metrics
mean; the key says on what they stand.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from slmdeploy.profiling.statistics import Floats


@dataclass
class Quality:
    """Metrics of one candidate with the draws of their intervals, and how many records they stand on."""

    metrics: dict[str, float] = field(default_factory=dict)
    drawn: dict[str, Floats] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, value: float, drawn: Floats) -> None:
        """Add one metric."""
        self.metrics[name], self.drawn[name] = value, drawn


def cache_folder() -> Path:
    """Where it is kept on this machine."""
    own = os.environ.get("SLMDEPLOY_CACHE")
    if own:
        return Path(own) / "quality"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "slmdeploy" / "quality"


class Cache:
    """Qualities by key; ``folder`` None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, key: str | None) -> Quality | None:
        """What is kept under a key, None where nothing is."""
        if self._folder is None or key is None:
            return None
        try:
            kept = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
            drawn = {name: np.array(values, np.float64) for name, values in kept["drawn"].items()}
            return Quality(dict(kept["metrics"]), drawn, dict(kept["counts"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, key: str | None, quality: Quality) -> None:
        """Keep a quality; a place that cannot be written is only a cache that is missing."""
        if self._folder is None or key is None:
            return
        drawn = {name: [float(f"{value:.7g}") for value in values] for name, values in quality.drawn.items()}
        text = json.dumps({"metrics": quality.metrics, "drawn": drawn, "counts": quality.counts}, allow_nan=True)
        temporary = self._folder / f".{key}.{os.getpid()}.tmp"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self._folder / f"{key}.json")
        except OSError:
            return
