"""Every family's graph as a stateful OpenVINO model: equal to ONNX Runtime on every rung, or refused by a sentence."""

import json
from pathlib import Path

import openvino
import pytest

from slmdeploy.building.ladder import climb
from slmdeploy.building.onnxruntime import copy_companions
from slmdeploy.building.openvino_graph import stateful_decoder
from slmdeploy.errors import InputError
from slmdeploy.exporting.export import export
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import Model, load
from slmdeploy.runtime.openvino_session import GRAPH
from slmdeploy.runtime.text import load_tokenizer
from tests.exporting.families import CASES, write_case

REFUSED = {
    "gemma2": "GroupQueryAttention",
    **dict.fromkeys(
        ("llama-head-dim-24", "phi3-longrope", "stablelm", "stablelm-parallel", "gpt-neox", "gpt-neox-serial"),
        "RotaryEmbedding",
    ),
}
"""OpenVINO 2026.4 reads no soft cap, and no rotary embedding outside of attention."""
QUICK = ("llama-gqa", "qwen2")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_family_is_equal_or_refused(tmp_path: Path, name: str) -> None:
    write_case(CASES[name], tmp_path / "checkpoint")
    graph, folder = tmp_path / "graph", tmp_path / "build"
    export(tmp_path / "checkpoint", out=graph, parity=False)
    folder.mkdir()
    if name in REFUSED:
        with pytest.raises(InputError, match=f"OpenVINO cannot read com.microsoft.{REFUSED[name]} as this graph uses"):
            stateful_decoder(graph / "model.onnx")
        return
    openvino.save_model(stateful_decoder(graph / "model.onnx"), folder / GRAPH, compress_to_fp16=False)
    copy_companions(graph, folder)
    runtime = json.loads((graph / "runtime.json").read_text())
    runtime |= {"interface": "stateful", "openvino": {"inference_precision": "f32"}}
    (folder / "runtime.json").write_text(json.dumps(runtime))
    config = read_runtime(folder)
    found = Model(folder, config, load_tokenizer(folder), 1)
    for rung in climb(
        load(graph, threads=1),
        found,
        vocab_size=config.vocab_size,
        max_length=config.max_length,
        batches=True,
        limit=1e-5,
    ):
        assert rung.passed, rung
