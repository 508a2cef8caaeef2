"""OpenVINO, ONNX Runtime and ONNX's own reference implementation read the portable graph and agree with one another."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from slmdeploy.exporting.export import export
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.session import kv_names
from tests.ecosystem.environments import Environment, environment
from tests.exporting.families import CASES, write_case

pytestmark = pytest.mark.slow
Floats = NDArray[np.float32]
ONE_EACH = list({case.family: name for name, case in CASES.items()}.values())
"""A case of each family."""
# A left-padded batch of two, of which the first is longer than the windows of the families, and a step behind it.
ROWS = [[5, 6, 7, 200, 31] * 6, [9, 40, 77]]
BLANK = len(ROWS[0]) - len(ROWS[1])
MASK = [[1] * 30, [0] * BLANK + [1] * 3]
RUNS: list[dict[str, list[list[int]]]] = [
    {
        "input_ids": [ROWS[0], [0] * BLANK + ROWS[1]],
        "attention_mask": MASK,
        "position_ids": [list(range(30)), [0] * BLANK + [0, 1, 2]],
    },
    {"input_ids": [[8], [9]], "attention_mask": [[*row, 1] for row in MASK], "position_ids": [[30], [3]]},
]


@pytest.fixture(scope="module")
def openvino(request: pytest.FixtureRequest) -> Environment:
    return environment("openvino", request.config.cache)


def empty_past(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each past of two rows that hold nothing."""
    config = read_runtime(folder)
    heads = [count for count in config.kv_heads for _ in range(2)]
    return {name: (2, count, 0, config.head_dim) for name, count in zip(kv_names(config.layers)[0], heads, strict=True)}


def drive(session: Any, past: dict[str, tuple[int, ...]]) -> list[Floats]:
    """The logits of RUNS by something with the `run` of ONNX Runtime."""
    kept = {name: np.zeros(shape, np.float32) for name, shape in past.items()}
    found = []
    for run in RUNS:
        inputs = {name: np.array(values, np.int64) for name, values in run.items()}
        logits, *presents = session.run(None, inputs | kept)
        kept = dict(zip(kept, presents, strict=True))
        found.append(logits)
    return found


def seen(logits: list[Any]) -> Floats:
    """Logits of all tokens that are no padding, [tokens, vocabulary]."""
    prompts, step = (np.asarray(run, np.float32) for run in logits)
    return np.concatenate([*(prompts[i, -len(row) :] for i, row in enumerate(ROWS)), step[:, 0]])


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("name", ONE_EACH)
def test_three_engines_agree_on_a_portable_graph(openvino: Environment, tmp_path: Path, name: str, opset: int) -> None:
    write_case(CASES[name], tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", out=tmp_path / "graph", dialect="portable", opset=opset)
    graph, past = tmp_path / "graph" / "model.onnx", empty_past(tmp_path / "graph")
    expected = seen(drive(onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]), past))
    scale = max(1.0, float(np.abs(expected).max()))
    reference = seen(drive(ReferenceEvaluator(str(graph)), past))
    assert np.abs(reference - expected).max() / scale < 1e-4
    answer = openvino.run("openvino_run.py", {"graph": str(graph), "runs": RUNS, "past": past})
    assert np.abs(seen(answer["logits"]) - expected).max() / scale < 1e-4
