"""The portable dialect in each opset: valid by onnx's checker, equal to torch in ONNX Runtime and onnx.reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from slmdeploy.building.build import build
from slmdeploy.checkpoint import Weights
from slmdeploy.errors import InputError
from slmdeploy.exporting.decoder import build_decoder
from slmdeploy.exporting.eager import EagerModel
from slmdeploy.exporting.export import export
from slmdeploy.exporting.portable import PortableDialect
from slmdeploy.exporting.spec import PORTABLE_OPSETS
from slmdeploy.runtime.model import load
from slmdeploy.specs import Profile
from tests.exporting.conftest import Record
from tests.exporting.families import CASES, write_case
from tests.exporting.test_families import LIMIT, difference

LENGTH, PROMPTS = 60, (31, 40)
Floats = NDArray[np.float32]


@dataclass
class Reference:
    """A checkpoint in torch with the answers that its graphs are compared with."""

    name: str
    checkpoint: Path
    model: EagerModel
    rows: list[list[int]]
    whole: Floats
    behind: Floats


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("checkpoint")
    write_case(case, folder)
    model = EagerModel(folder, max_length=case.max_length)
    rows = [np.random.default_rng(length).integers(0, 272, LENGTH).tolist() for length in PROMPTS]
    # a sequence starts shorter than any original context, or transformers would keep the frequencies of the one before
    behind = []
    for row, length in zip(rows, PROMPTS, strict=True):
        model.prefill(row[:length])
        behind.append(model.decode(row[length]).copy())
    return Reference(request.param, folder, model, rows, model.logits(rows[0]), np.stack(behind))


class Graph:
    """A portable graph in an engine that takes and gives arrays."""

    def __init__(self, run: Any, reference: Reference, opset: int) -> None:
        self.spec, self.run_all, self.static = reference.model.spec, run, opset >= 24

    def run(self, ids: Floats, mask: NDArray[np.int64], past: list[Floats] | None = None) -> list[Floats]:
        """Logits [batch, sequence, vocabulary] and the presents; `mask` is left-padded and as wide as past and ids."""
        width = self.spec.max_length if self.static else 0
        heads = [layer.kv_heads for layer in self.spec.layers for _ in range(2)]
        past = past or [np.zeros((len(ids), count, width, self.spec.head_dim), np.float32) for count in heads]
        names = [f"past_key_values.{i}.{part}" for i in range(len(self.spec.layers)) for part in ("key", "value")]
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "position_ids": positions} | dict(zip(names, past, strict=True))
        if self.static:
            feeds["cache_lengths"] = np.full(len(ids), mask.shape[1] - ids.shape[1], np.int64)
        else:
            feeds["attention_mask"] = mask
        outputs: list[Floats] = self.run_all(None, feeds)
        return outputs


def write(reference: Reference, opset: int, folder: Path) -> Path:
    spec = reference.model.spec
    model = build_decoder(spec, Weights(reference.checkpoint), PortableDialect(spec, opset))
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"


@pytest.mark.filterwarnings("ignore:.*original_max_position_embeddings.*")
@pytest.mark.parametrize("opset", PORTABLE_OPSETS)
def test_a_portable_graph_equals_torch(reference: Reference, opset: int, tmp_path: Path, record_check: Record) -> None:
    path = write(reference, opset, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = Graph(session.run, reference, opset)
    whole = graph.run(np.array(reference.rows[:1]), np.ones((1, LENGTH), np.int64))[0][0]
    found = {"prompt": difference(reference.whole, whole)}
    if opset < 24 and not reference.model.spec.scaled_context:
        found["left-padded batch and a step"] = difference(reference.behind, stepped(graph, reference))
    case = CASES[reference.name]
    for check, value in found.items():
        record_check(f"{case.family}|{reference.name}", f"portable {opset}: {check}", value, value <= LIMIT)
    assert max(found.values()) <= LIMIT, found


def stepped(graph: Graph, reference: Reference) -> Floats:
    """The logits behind one token more than the prompts, which are computed as a batch padded on the left."""
    width = max(PROMPTS)
    padded = [[0] * (width - n) + row[:n] for row, n in zip(reference.rows, PROMPTS, strict=True)]
    mask = np.array([[0] * (width - n) + [1] * n for n in PROMPTS])
    _, *presents = graph.run(np.array(padded), mask)
    tokens = np.array([[row[n]] for row, n in zip(reference.rows, PROMPTS, strict=True)])
    logits: Floats = graph.run(tokens, np.concatenate([mask, np.ones_like(tokens)], axis=1), presents)[0][:, 0]
    return logits


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_onnx_reference_agrees(name: str, opset: int, tmp_path: Path) -> None:
    write_case(CASES[name], tmp_path)
    model = EagerModel(tmp_path)
    ids = list(range(20, 29))
    reference = Reference(name, tmp_path, model, [ids], model.logits(ids), np.zeros(0, np.float32))
    evaluator = ReferenceEvaluator(onnx.load(write(reference, opset, tmp_path)))
    logits = Graph(evaluator.run, reference, opset).run(np.array([ids]), np.ones((1, len(ids)), np.int64))[0][0]
    assert 0 < difference(reference.whole, logits) <= LIMIT


@pytest.mark.parametrize("opset", PORTABLE_OPSETS)
def test_a_portable_folder_generates_what_the_other_dialect_does(opset: int, tmp_path: Path) -> None:
    write_case(CASES["llama-gqa"], tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", out=tmp_path / "ort")
    artifact = export(tmp_path / "checkpoint", out=tmp_path / "portable", dialect="portable", opset=opset)
    assert artifact.plan["opset"] == opset
    prompt = list(range(3, 40))
    tokens = [list(load(tmp_path / name).generate_ids(prompt, max_new_tokens=150)) for name in ("ort", "portable")]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) > 20


@pytest.mark.parametrize("opset", PORTABLE_OPSETS)
def test_a_portable_graph_is_quantised_as_the_other(opset: int, tmp_path: Path) -> None:
    write_case(CASES["llama-gqa"], tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", out=tmp_path / "graph", dialect="portable", opset=opset)
    form = {"scheme": "weight-only", "bits": 8, "block_size": 32}
    gate = {"max_kl": 1.0, "min_top1": 0.0, "max_ppl_ratio": 10.0}
    profile = Profile.model_validate(
        {"name": "p", "summary": "s", "engine": "onnxruntime", "weights": form, "gate": gate}
    )
    artifact = build(tmp_path / "graph", profile=profile, out=tmp_path / "build")
    assert artifact.result["parts"]
    assert artifact.result["gates"]["parity"]["passed"]
    expected, found = (load(tmp_path / name).logits(list(range(2, 30))) for name in ("graph", "build"))
    assert 0 < difference(expected, found) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dialect": "portable", "opset": 22}, "opset = 22 is not known: choose from 21, 23, 24"),
        ({"opset": 23}, "opset = 23: only the dialect 'portable' has a choice"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_case(CASES["llama-gqa"], tmp_path / "checkpoint")
    with pytest.raises(InputError, match=message):
        export(tmp_path / "checkpoint", out=tmp_path / "graph", **arguments)
