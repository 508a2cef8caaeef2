"""The parity ladder of encoders: torch against the graph that was traced from the same module, output by output.

Batches of random tokens in every shape in which a graph can go wrong: one token, an odd number, unequal lengths with
padding, the longest input, one row and several; with random token types where the model has them. Torch runs with the
eager attention, which the graph was not traced from, and on the padded batch as it is; what stands at padding is not
compared. The graph runs through runtime/encoding.py, as a device will run it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from slmdeploy.building.ladder import Rung
from slmdeploy.errors import GateError, UnsupportedModelError
from slmdeploy.exporting.tracing import quietly
from slmdeploy.runtime.encoder_config import EncoderConfig
from slmdeploy.runtime.encoding import Encoder, Row

LIMIT = 1e-4
"""Largest difference of an output, as a share of the output's largest magnitude where that is above 1."""
MEASURE = "largest absolute difference of an output, divided by its largest magnitude in torch where that is above 1"
LONGEST = 512
"""A longer input is checked up to here: attention of 8192 tokens takes torch gigabytes."""
_ODD = 21
_UNEQUAL = (5, 1, 17, 12)
Floats = NDArray[np.float32]
Outputs = dict[str, Floats]


@dataclass(frozen=True)
class Check:
    """A batch, and what torch makes of it: outputs by name."""

    name: str
    rows: list[Row]
    expected: Outputs


def shapes(max_length: int) -> dict[str, tuple[int, ...]]:
    """The lengths of the rows of each batch by the name of the check; lengths shrink to a shorter model."""
    longest = min(max_length, LONGEST)
    wanted = {
        "one token": (1,),
        "one row of odd length": (_ODD,),
        "three rows of one length": (8, 8, 8),
        "padded batch of unequal lengths": _UNEQUAL,
        f"longest input, {longest}" if longest == max_length else f"{longest} of at most {max_length}": (longest,),
        f"{longest} beside 3 in one batch": (3, longest),
    }
    return {name: tuple(min(length, max_length) for length in lengths) for name, lengths in wanted.items()}


@torch.inference_mode()
def expectations(
    source: Path, module: nn.Module, model: PreTrainedModel, config: EncoderConfig, seed: int = 0
) -> list[Check]:
    """Every check with torch's answer. `model` is what `module` wraps; its attention is eager in here alone.

    Raises UnsupportedModelError for a model of `source` that torch itself cannot run on one of them.
    """
    random = np.random.default_rng(seed)
    fused = model.config._attn_implementation
    with quietly():  # a family without a choice of attention says so in a warning
        model.set_attn_implementation("eager")
        checks = []
        for name, lengths in shapes(config.max_length).items():
            rows = [_row(random, length, config) for length in lengths]
            try:
                outputs = module(**tensors(rows, config))
            except (RuntimeError, ValueError, IndexError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UnsupportedModelError(f"{source} cannot run on every input ({name}): {reason}") from error
            checks.append(Check(name, rows, {key: value.numpy() for key, value in outputs.items()}))
        model.set_attn_implementation(fused)
    return checks


def _row(random: np.random.Generator, length: int, config: EncoderConfig) -> Row:
    """Random tokens other than padding, which RoBERTa counts its positions by; types 0 and 1 if there are any."""
    ids = random.integers(0, config.vocab_size - 1, length)
    ids += ids >= config.pad_token_id
    types = random.integers(0, 2, length) if "token_type_ids" in config.inputs else np.zeros(length, np.int64)
    return Row(tuple(map(int, ids)), tuple(map(int, types)))


def tensors(rows: Sequence[Row], config: EncoderConfig) -> dict[str, torch.Tensor]:
    """The inputs of one batch by name, padded on the right."""
    width = max(len(row.ids) for row in rows)

    def padded(values: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in values])

    inputs = {
        "input_ids": padded([row.ids for row in rows], config.pad_token_id),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        "token_type_ids": padded([row.types for row in rows], 0),
    }
    return {name: inputs[name] for name in config.inputs}


def measure(folder: Path, config: EncoderConfig, checks: Sequence[Check]) -> list[Rung]:
    """Every output of every check between torch's answers and the graph in `folder`."""
    encoder = Encoder(folder, config, config.threads)
    rungs = []
    for check in checks:
        found = encoder.run(check.rows, list(check.expected))
        for (name, expected), got in zip(check.expected.items(), found, strict=True):
            rungs.append(_compare(f"{check.name}: {name}", check.rows, expected, got))
    return rungs


def _compare(name: str, rows: Sequence[Row], expected: Floats, found: Floats) -> Rung:
    if expected.shape != found.shape:
        return Rung(name, math.inf, math.inf, LIMIT, False)
    if expected.ndim == 3:  # one vector per token: without those of padding
        lengths = [len(row.ids) for row in rows]
        expected, found = (np.concatenate([a[i, :n] for i, n in enumerate(lengths)]) for a in (expected, found))
    if not np.isfinite(found).all():
        return Rung(name, math.inf, math.inf, LIMIT, False)
    largest = float(np.abs(expected - found).max())
    difference = largest / max(1.0, float(np.abs(expected).max()))
    return Rung(name, largest, difference, LIMIT, difference <= LIMIT)


def passed(rungs: Sequence[Rung]) -> bool:
    """Whether every rung is within the limit."""
    return all(rung.passed for rung in rungs)


def worst(rungs: Sequence[Rung]) -> Rung:
    """The rung of the largest difference."""
    return max(rungs, key=lambda rung: rung.difference)


def require_passed(rungs: Sequence[Rung], checkpoint: Path) -> None:
    """Raise GateError naming the worst rung when one is outside its limit."""
    if not passed(rungs):
        rung = worst(rungs)
        raise GateError(
            f"the graph of {checkpoint} differs from torch by {rung.difference:.2g} in {rung.name!r}, more than "
            f"{rung.limit:g}; nothing was written, please report this model"
        )
