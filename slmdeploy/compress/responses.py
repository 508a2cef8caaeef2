"""What a model writes after prompts: sampled in batches with a KV cache, packed into rows, kept as a file of tokens.

On-policy distillation has the student write while it trains; sequence-level distillation (Kim and Rush 2016, arXiv
1606.07947) has the teacher write once, before. Knows nothing of losses, and of a stage only how responses are sampled.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from slmdeploy.progress import Progress
from slmdeploy.specs import DistillStage

PROMPTS_AT_ONCE = 32

Pair = tuple[list[int], list[int]]


@torch.no_grad()
def sample(model: Any, prompts: list[list[int]], stage: DistillStage) -> list[list[int]]:
    """A response to each prompt, sampled at the stage's temperature, with its end-of-text token when there is one."""
    longest = max(len(prompt) for prompt in prompts)
    ends = model.config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    padding = min(stop, default=0)
    ids = torch.tensor([[padding] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=stage.response_tokens,
        do_sample=True,
        temperature=stage.sample_temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=padding,
        eos_token_id=sorted(stop) or None,
    )
    written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
    return [_until(answer, stop) for answer in written]


def _until(answer: list[int], stop: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(answer) if token in stop), len(answer))
    return answer[: end + 1]


def pack(pairs: list[Pair], length: int) -> dict[str, Tensor]:
    """One row of ``length`` tokens of prompts and their responses, of which the responses count."""
    ids = [token for prompt, answer in pairs for token in prompt + answer]
    counts = [flag for prompt, answer in pairs for flag in [0.0] * len(prompt) + [1.0] * len(answer)]
    positions = [i for prompt, answer in pairs for i in range(len(prompt) + len(answer))]
    room = length - len(ids)
    weights = torch.tensor(counts + [0.0] * room)
    return {
        "input_ids": torch.tensor(ids + [0] * room),
        "position_ids": torch.tensor(positions + list(range(room))),
        "weights": weights / weights.sum().clamp(min=1.0),
    }


def choose_prompts(
    prompts: list[list[int]], rows: int, stage: DistillStage, chance: random.Random
) -> list[list[list[int]]]:
    """For each row as many prompts as fit with their responses."""
    filled: list[list[list[int]]] = []
    for _ in range(rows):
        room, row = stage.length, []
        while len(prompt := chance.choice(prompts)) + stage.response_tokens <= room:
            row.append(prompt)
            room -= len(prompt) + stage.response_tokens
        filled.append(row)
    return filled


def written_by(model: Any, prompts: list[list[int]], stage: DistillStage, file: Path, progress: Progress) -> list[Pair]:
    """Prompts and what ``model`` answers to them, from ``file`` as far as it goes; a killed call goes on there.

    ``file`` has a JSON line [prompt ids, response ids] per prompt, in their order.
    """
    pairs = read_pairs(file)
    if len(pairs) == len(prompts):
        return pairs
    # Whole batches alone repeat their draws, so what a kill has left of one is written again.
    pairs = pairs[: len(pairs) - len(pairs) % PROMPTS_AT_ONCE]
    progress.start("teacher writes", len(prompts), "texts")
    progress.advance(len(pairs))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(pair) + "\n" for pair in pairs)
        for start in range(len(pairs), len(prompts), PROMPTS_AT_ONCE):
            batch = prompts[start : start + PROMPTS_AT_ONCE]
            with torch.random.fork_rng():
                torch.manual_seed(random.Random(f"{stage.seed}:{start}").getrandbits(63))
                fresh = list(zip(batch, sample(model, batch, stage), strict=True))
            stream.writelines(json.dumps(pair) + "\n" for pair in fresh)
            stream.flush()
            pairs += fresh
            progress.advance(len(batch))
    progress.finish()
    return pairs


def read_pairs(file: Path) -> list[Pair]:
    """The whole lines of a file that `written_by` wrote, or none."""
    pairs: list[Pair] = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                prompt, answer = json.loads(line)
            except ValueError:  # the line at which a writer was killed
                break
            pairs.append((prompt, answer))
    return pairs
