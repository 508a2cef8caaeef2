"""What the tests of this folder give to other runtimes: a tiny checkpoint as graph and INT4 build, and our answers."""

import json
from pathlib import Path
from typing import Any

from slmdeploy.building.build import build
from slmdeploy.exporting.export import export
from slmdeploy.runtime.model import load
from slmdeploy.specs import load_profile
from tests.exporting.checkpoints import write_checkpoint

PROMPTS = [[5, 6, 7, 200, 31], [9, 40], [100, 3, 260, 17, 8, 121, 33]]
NEW_TOKENS = 40
END, PADDING = 1, 2
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}


def write_graphs(folder: Path, **config: Any) -> dict[str, Path]:
    """Graph and INT4 build, by precision, of a random Llama."""
    checkpoint = folder / "checkpoint"
    write_checkpoint(checkpoint, **SIZES, pad_token_id=PADDING, **config)
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    export(checkpoint, out=folder / "fp32")
    profile = load_profile("cpu-int4")
    # Random weights lose more by 4 bits than the profile lets a model lose; what counts here is that it is the same.
    build(folder / "fp32", profile=profile, out=folder / "int4")
    return {"fp32": folder / "fp32", "int4": folder / "int4"}


def our_tokens(folder: Path, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """What our own runtime generates behind each prompt, greedily."""
    model = load(folder)
    return [[int(token) for token in model.generate_ids(prompt, max_new_tokens=NEW_TOKENS)] for prompt in prompts]


def until_end(rows: list[list[int]]) -> list[list[int]]:
    """Each row up to its end token, which our runtime does not give out."""
    return [row[: row.index(END)] if END in row else row for row in rows]
