"""Opens a folder of either kind for whoever does not know which it is: a decoder's Model, an encoder's EncoderModel.

Both have `tasks` and `score`. Knows nothing else.
"""

from pathlib import Path

from .bundle import read_runnable
from .encoder_config import is_encoder
from .encoder_model import EncoderModel, load_encoder
from .errors import InputError
from .model import Model
from .model import load as load_decoder


def load(
    path: Path | str,
    *,
    threads: int | None = None,
    spinning: bool | None = None,
    prefill_chunk: int | None = None,
    draft: Path | str | None = None,
    prompt_lookup: bool = False,
    verify: bool = True,
) -> Model | EncoderModel:
    """Open a graph, build or package; `verify` checks every hash.

    `threads` (0: all cores), `spinning` and, of decoders, `prefill_chunk` override runtime.json; `draft` and
    `prompt_lookup` are decoders' too (model.py). Raises InputError if there is no such folder or it cannot be drafted
    for, CorruptArtifactError if it is not sound.
    """
    read_runnable(path, verify=False)
    if is_encoder(Path(path)):
        if draft is not None or prompt_lookup:
            raise InputError(f"{path} is an encoder, which makes no tokens: leave out draft and prompt lookup.")
        return load_encoder(path, threads=threads, spinning=spinning, verify=verify)
    return load_decoder(
        path,
        threads=threads,
        spinning=spinning,
        prefill_chunk=prefill_chunk,
        draft=draft,
        prompt_lookup=prompt_lookup,
        verify=verify,
    )
