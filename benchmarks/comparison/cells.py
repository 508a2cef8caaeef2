"""What is compared: each cell is the steps from the teacher to one student, under one seed, as plain data.

Every cell of a group gets the same tokens, so that its members differ in one thing. A step is a dict with a ``verb``
and the settings of that verb; a cell's key is the hash of its steps, the scale and the teacher, so a result is used
again exactly as long as nothing that it depends on has changed. Knows nothing of how steps are done.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slmdeploy.compress.rounds import rounds
from slmdeploy.specs import PrunePlan, distill_stage

TEACHER = Path(__file__).parents[2] / "examples" / "teacher"
METHODS = ("osscar", "minitron", "magnitude", "random")
RATIOS = (0.25, 0.5, 0.65)
SHAPE: dict[str, Any] = {"ratio": 0.5, "layer_ratio": 0.33, "attention_ratio": 0.0}
"""What the shipped recipe cuts: the student of all groups but the first two."""
LOSSES: dict[str, dict[str, Any]] = {
    "forward KL": {},
    "reverse KL": {"loss": "reverse_kl"},
    "JSD, beta 0.5": {"loss": "jsd", "beta": 0.5},
    "total variation": {"loss": "tvd"},
    "skew KL": {"loss": "skew_kl"},
    "reverse skew KL": {"loss": "reverse_skew_kl"},
    "forward KL, half cross-entropy": {"loss": "forward_kl", "ce_share": 0.5},
}
Step = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How large the comparison is: training steps of a cell, rows and tokens of each, what quality is measured on."""

    name: str
    steps: int
    batch_rows: int
    length: int
    calibration_tokens: int
    test_tokens: int
    score_tokens: int
    scratch: tuple[int, ...]
    """How many times the compute of the distilled student a student from nothing gets."""

    @property
    def tokens(self) -> int:
        """Training tokens of a cell."""
        return self.steps * self.batch_rows * self.length


QUICK = Scale("quick", 40, 4, 256, 4096, 8192, 8192, (1, 4))
FULL = Scale("full", 1200, 8, 512, 16384, 65536, 65536, (1, 4, 8))
SCALES = {scale.name: scale for scale in (QUICK, FULL)}


@dataclass(frozen=True)
class Cell:
    """One student: its group, its name in it, and how it is made."""

    group: str
    name: str
    seed: int
    steps: tuple[Step, ...]

    def key(self, scale: Scale, upto: int | None = None) -> str:
        """What the checkpoint behind the first ``upto`` steps is known by; all steps: what the cell is known by."""
        content = [teacher_hash(), asdict(scale), self.seed, self.steps[:upto]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@cache
def teacher_hash() -> str:
    """Of the teacher's weights, which every key needs and nothing here changes."""
    return hashlib.sha256((TEACHER / "model.safetensors").read_bytes()).hexdigest()


def every_cell(scale: Scale, seeds: int) -> list[Cell]:
    """All cells in the order in which they are worth running: a whole seed before the next one."""
    return [cell for seed in range(seeds) for cell in _of_seed(scale, seed)]


def _of_seed(scale: Scale, seed: int) -> Iterator[Cell]:
    cut = _prune(**SHAPE)

    def trained(group: str, name: str, *stages: Step) -> Cell:
        return Cell(group, name, seed, (cut, *stages))

    whole, half, third = (_distill(scale, share) for share in (1.0, 0.5, 1 / 3))
    yield trained("objective", "distilled, forward KL", whole)
    yield trained("objective", "fine-tuned on the data, no teacher", whole | {"ce_share": 1.0})
    for ratio in RATIOS:
        for method in METHODS:
            yield Cell(
                "pruned", f"{method}, {ratio:.0%}", seed, (_prune(method=method, ratio=ratio, attention_ratio=0.0),)
            )
    yield Cell("schedule", "in two rounds", seed, tuple(_in_rounds(half)))
    yield trained("schedule", "at once", whole)
    second = third | {"loss": "jsd", "beta": 0.5, "on_policy": 0.5, "response_tokens": 32, "learning_rate": 2e-4}
    yield trained("stages", "one stage", whole)
    yield trained("stages", "two, the second half on-policy", _distill(scale, 2 / 3), second)
    yield trained("stages", "two, both on the data", _distill(scale, 2 / 3), third | {"learning_rate": 2e-4})
    for name, loss in LOSSES.items():
        yield trained("loss", name, whole | loss)
    for method in METHODS:
        yield Cell("recovered", f"{method}, 50%", seed, (_prune(method=method, ratio=0.5), whole))
    for times in scale.scratch if seed == 0 else scale.scratch[:1]:
        yield Cell("scratch", f"from nothing, {times} x the compute", seed, _scratch(scale, cut, times))


def _prune(**settings: Any) -> Step:
    return {"verb": "prune"} | settings


def _distill(scale: Scale, share: float) -> Step:
    """A stage with this share of a cell's steps."""
    return {
        "verb": "distill",
        "steps": max(1, round(scale.steps * share)),
        "batch_rows": scale.batch_rows,
        "length": scale.length,
        "learning_rate": 5e-4,
        "score_share": 0.5,
        "eval_rows": 0,
    }


def _scratch(scale: Scale, cut: Step, times: int) -> tuple[Step, ...]:
    """The pruned student's shape with random weights, trained on the data for ``times`` its compute."""
    steps = {"steps": round(scale.steps * times * teacher_share()), "ce_share": 1.0, "learning_rate": 2e-3}
    return cut, {"verb": "forget"}, _distill(scale, 1.0) | steps


def _in_rounds(between: Step) -> Iterator[Step]:
    """The same shape in two rounds of pruning with half of the training behind each."""
    stage = distill_stage(**{name: value for name, value in between.items() if name != "verb"})
    plan = PrunePlan(**SHAPE, rounds=2, between=stage)
    for one in rounds(TEACHER, plan):
        shares = one.model_dump(include={"ratio", "attention_ratio", "layer_ratio", "hidden_ratio"})
        yield _prune(**shares)
        yield between


def teacher_share() -> float:
    """Compute of a distilled token over that of a token without a teacher, (2 T + 6 S) / 6 S.

    T and S are the numbers of parameters of teacher and student that a token is multiplied with; 2 operations each
    forward, 4 backward (Kaplan et al., arXiv 2001.08361).
    """
    config = json.loads((TEACHER / "config.json").read_text(encoding="utf-8"))
    hidden, heads, groups, dim = (
        config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    attention, head = hidden * dim * (2 * heads + 2 * groups), hidden * config["vocab_size"]
    layers, neurons = config["num_hidden_layers"], config["intermediate_size"]
    kept = round(layers * (1 - SHAPE["layer_ratio"]))
    teacher = layers * (attention + 3 * hidden * neurons) + head
    student = kept * (attention + 3 * hidden * neurons * (1 - SHAPE["ratio"])) + head
    return (2 * teacher + 6 * student) / (6 * student)
