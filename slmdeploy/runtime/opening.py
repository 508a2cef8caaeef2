"""Opens a folder of either kind for whoever does not know which it is: a decoder's Model, an encoder's EncoderModel.

Both have `tasks` and `score`. Knows nothing else.
"""

from pathlib import Path

from .bundle import read_runnable
from .encoder_config import is_encoder
from .encoder_model import EncoderModel, load_encoder
from .model import Model
from .model import load as load_decoder


def load(
    path: Path | str,
    *,
    threads: int | None = None,
    spinning: bool | None = None,
    prefill_chunk: int | None = None,
    verify: bool = True,
) -> Model | EncoderModel:
    """Open a graph, build or package; `verify` checks every hash.

    `threads` (0: all cores), `spinning` and, of decoders, `prefill_chunk` override runtime.json. Raises InputError if
    there is no such folder, CorruptArtifactError if it is not sound.
    """
    read_runnable(path, verify=False)
    if is_encoder(Path(path)):
        return load_encoder(path, threads=threads, spinning=spinning, verify=verify)
    return load_decoder(path, threads=threads, spinning=spinning, prefill_chunk=prefill_chunk, verify=verify)
