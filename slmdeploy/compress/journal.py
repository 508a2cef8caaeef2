"""What a pruning has finished, layer by layer, in a hidden folder beside the output: a killed one goes on from there.

Whatever a step found is written under its name, to a temporary file and then renamed, so that what is there is whole. A
journal of another plan or other inputs is thrown away. It goes when the pruning ends, or fails for a reason that would
be found again. Knows nothing of what is in it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from slmdeploy.errors import SlmdeployError

KEY = "key"


class Journal:
    """The entries of one pruning: each a JSON value and tensors by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, value: Any, tensors: dict[str, Tensor] | None = None) -> None:
        """Keep an entry."""
        file, temporary = self._file(name), self.folder / "writing"
        whole = {key: one.contiguous() for key, one in (tensors or {}).items()}
        save_file(whole, temporary, {"value": json.dumps(value)})
        os.replace(temporary, file)

    def read(self, name: str) -> tuple[Any, dict[str, Tensor]] | None:
        """An entry, or None where there is none."""
        if not (file := self._file(name)).is_file():
            return None
        with safe_open(file, "pt") as stored:
            names = list(stored.keys())
            return json.loads(stored.metadata()["value"]), {name: stored.get_tensor(name) for name in names}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def journal(out: Path, key: str) -> Iterator[Journal]:
    """The journal of the pruning with content key ``key`` that writes ``out``."""
    folder = out.parent / f".{out.name}.pruning"
    if not (folder / KEY).is_file() or (folder / KEY).read_text(encoding="utf-8") != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / KEY).write_text(key, encoding="utf-8")
    try:
        yield Journal(folder)
    except SlmdeployError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
