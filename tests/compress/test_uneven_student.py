"""A student with layers of unequal sizes, from pruning through distillation to a graph that says what torch says."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from slmdeploy.compress.distill import distill
from slmdeploy.compress.loading import load_model
from slmdeploy.compress.prune import prune
from slmdeploy.exporting.export import export
from slmdeploy.runtime.model import load
from slmdeploy.specs import DistillStage


def test_an_uneven_student_learns_and_is_deployed(tmp_path: Path, checkpoint: Callable[..., Path], data: Path) -> None:
    teacher = checkpoint(num_hidden_layers=4, hidden_size=32)
    pruned = prune(
        teacher, out=tmp_path / "pruned", data=data, ratio=0.5, allocation="global", tile=8, calibration_tokens=512
    )
    shapes = json.loads((pruned.path / "config.json").read_text())["layer_shapes"]
    assert len({tuple(one.values()) for one in shapes}) > 1
    stage = DistillStage(steps=20, batch_rows=4, length=32, learning_rate=3e-3, dtype="fp32", eval_rows=4)
    student = distill(teacher, pruned.path, out=tmp_path / "student", data=data, stage=stage)
    valid = student.result["valid"]
    assert valid["after"]["kd"] < valid["before"]["kd"]
    assert json.loads((student.path / "config.json").read_text())["layer_shapes"] == shapes
    graph = export(student.path, out=tmp_path / "graph")
    ids = list(range(2, 30))
    with torch.no_grad():
        expected = load_model(student.path, torch.float32).eval()(torch.tensor([ids])).logits[0]
    assert np.allclose(load(graph.path).logits(ids), expected.numpy(), atol=2e-3)
