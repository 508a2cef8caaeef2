"""The shipped recipe's figures for the headline: what `slmdeploy run` measured, as small JSON.

Ratios are to the teacher in torch, fp32, eager, on the same machine in interleaved rounds, as `slmdeploy profile`
defines them. Compute of training is counted, not timed: 2 operations forward and 4 backward for each weight and token.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.comparison.cells import TEACHER, teacher_share
from slmdeploy.errors import InputError
from slmdeploy.reporting.reading import read_run
from slmdeploy.specs import distill_stage

_METRICS = ("auc", "bits_per_byte", "size_bytes", "ttft_ms_p50", "tpot_ms_p50", "score_ms_p50", "tokens_per_s")
_METRICS += ("items_per_s",)
TEACHER_TOKENS = 3600 * 4096
"""What examples/train_teacher.py trains on."""


def headline(run: Path) -> dict[str, Any]:
    """Ratios of every build of the run ``run`` to the teacher, which build was chosen, and the tokens of training.

    Raises InputError for a run without a choice.
    """
    found = read_run(run)
    if found.selection is None or found.selection.chosen is None:
        raise InputError(f"{run} chose no build, so there is nothing to show: give a run whose budget was met")
    builds = {
        row.build: {name: row.metrics[f"{name}_ratio"] for name in _METRICS if f"{name}_ratio" in row.metrics}
        for row in found.rows
        if row.role == "candidate"
    }
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("distilled-*/manifest.json"))]
    tokens = sum(distill_stage(**manifest["plan"]["stage"]).tokens for manifest in manifests)
    made = json.loads((run / "measurement" / "manifest.json").read_text(encoding="utf-8"))
    return {
        "machine": made["machine"],
        "created": made["created"],
        "chosen": found.selection.chosen,
        "builds": builds,
        "distilled_tokens": tokens,
    }


def saved_against_teacher(tokens: int, student_share: float) -> float:
    """Share of the compute of training the teacher that distilling on ``tokens`` takes less.

    ``student_share`` is the student's multiplied weights over the teacher's.
    """
    assert TEACHER.exists()
    return 1 - teacher_share() * student_share * tokens / TEACHER_TOKENS
