"""Opens a folder of either kind for whoever does not know which it is: a decoder's Model, an encoder's EncoderModel.

Both have `tasks` and `score`. Knows nothing else.
"""

from pathlib import Path

from .bundle import read_runnable
from .encoder_config import is_encoder
from .encoder_model import EncoderModel, load_encoder
from .model import Model
from .model import load as load_decoder


def load(path: Path | str, *, threads: int | None = None, verify: bool = True) -> Model | EncoderModel:
    """Open a graph, build or package; `verify` checks every hash, `threads` overrides runtime.json (0: all cores).

    Raises InputError if there is no such folder, CorruptArtifactError if it is not sound.
    """
    read_runnable(path, verify=False)
    opener = load_encoder if is_encoder(Path(path)) else load_decoder
    return opener(path, threads=threads, verify=verify)
