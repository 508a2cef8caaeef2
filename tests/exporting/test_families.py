"""Every decoder family against transformers eager in float32: what the table in docs/families.md is made of."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from slmdeploy.artifacts import Artifact
from slmdeploy.building.chunks import may_be_cut
from slmdeploy.exporting.eager import EagerModel
from slmdeploy.exporting.export import export
from slmdeploy.exporting.families import FAMILIES
from slmdeploy.runtime.model import Model, load
from tests.exporting.conftest import Record
from tests.exporting.families import CASES, Case, write_case

LIMIT = 1e-4
PROMPT, STEPS = 29, 128
CHUNKS = (13, 1, 30, 20)
Floats = NDArray[np.float32]


def difference(expected: Floats, found: Floats) -> float:
    """Largest absolute difference, relative to the scale of the logits where that is above 1."""
    return float(np.abs(expected - found).max()) / max(1.0, float(np.abs(expected).max()))


def steps(model: EagerModel | Model, ids: list[int]) -> Floats:
    rows = [model.prefill(ids[:PROMPT]).copy()]
    return np.stack(rows + [model.decode(token).copy() for token in ids[PROMPT:]])


def chunked(folder: Path, model: Model, ids: list[int]) -> Floats:
    """Logits at all positions from a prefill in several runs, each behind the cache of those before it."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    config = model.runtime
    past = [np.zeros((1, heads, 0, config.head_dim), np.float32) for heads in config.kv_heads for _ in range(2)]
    names = [value.name for value in session.get_inputs() if value.name.startswith("past")]
    rows, done = [], 0
    for size in CHUNKS:
        feeds = {
            "input_ids": np.array([ids[done : done + size]]),
            "attention_mask": np.ones((1, done + size), np.int64),
            "logits_positions": np.arange(size),
        }
        logits, *past = session.run(None, feeds | dict(zip(names, past, strict=True)))
        rows.append(logits)
        done += size
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def _runtime_schema() -> Iterator[None]:
    """ONNX Runtime has SimplifiedLayerNormalization in the standard domain, where onnx.checker has no schema of it."""
    schema = onnx.defs.OpSchema(
        "SimplifiedLayerNormalization",
        "",
        1,
        inputs=[onnx.defs.OpSchema.FormalParameter(name, "T") for name in ("X", "scale")],
        outputs=[onnx.defs.OpSchema.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            onnx.defs.OpSchema.Attribute("axis", onnx.defs.OpSchema.AttrType.INT, "", required=False),
            onnx.defs.OpSchema.Attribute("epsilon", onnx.defs.OpSchema.AttrType.FLOAT, "", required=False),
        ],
    )
    onnx.defs.register_schema(schema)
    yield
    onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)


def checkpoint_and_graph(case: Case, folder: Path) -> Artifact:
    write_case(case, folder / "checkpoint")
    tasks = (
        ("generate",) if "longrope" in str(case.changes) or "dynamic" in str(case.changes) else ("generate", "score")
    )
    return export(folder / "checkpoint", out=folder / "graph", tasks=tasks, max_length=case.max_length)


@pytest.mark.filterwarnings("ignore:.*original_max_position_embeddings.*")
@pytest.mark.usefixtures("_runtime_schema")
@pytest.mark.parametrize("name", CASES)
def test_a_family_equals_torch(name: str, tmp_path: Path, record_check: Record) -> None:
    case = CASES[name]
    artifact = checkpoint_and_graph(case, tmp_path)
    onnx.checker.check_model(tmp_path / "graph" / "model.onnx", full_check=True)
    reference = EagerModel(tmp_path / "checkpoint", max_length=case.max_length)
    model = load(tmp_path / "graph")
    ids = [int(token) for token in np.random.default_rng(3).integers(0, 272, PROMPT + STEPS)]
    found = {rung["name"]: rung["difference"] for rung in artifact.result["parity"]}
    found[f"{STEPS} decode steps"] = difference(steps(reference, ids), steps(model, ids))
    whole = reference.logits(ids[: sum(CHUNKS)])
    assert may_be_cut(tmp_path / "graph") is not reference.spec.scaled_context
    if not reference.spec.scaled_context:
        # where frequencies grow with the sequence, chunks are rotated by less than a whole prompt, in torch as well
        found["chunked prefill"] = difference(whole, chunked(tmp_path / "graph", model, ids))
    found[f"prompt of {len(ids)}"] = difference(reference.logits(ids), model.logits(ids))
    for check, value in found.items():
        record_check(f"{case.family}|{name}", check, value, value <= LIMIT)
    assert max(found.values()) <= LIMIT, found
    assert max(found.values()) > 0, "the two sides are the same object"


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_rows_of_a_batch_turn_by_their_own_lengths(name: str, tmp_path: Path) -> None:
    """Where frequencies depend on the length, a neighbour beyond the original context changes nothing for a row."""
    checkpoint_and_graph(CASES[name], tmp_path)
    model = load(tmp_path / "graph")
    ids = [int(token) for token in np.random.default_rng(4).integers(0, 272, 80)]
    prompts, tokens = [ids[:70], ids[:10], ids[3:49]], [ids[70:74], ids[10:16], ids[49:52]]
    for prompt, forced, found in zip(prompts, tokens, model.batch_decode(prompts, tokens), strict=True):
        alone = [model.prefill(prompt), *(model.decode(token) for token in forced)]
        assert difference(np.stack(alone), found) <= LIMIT


def test_every_row_of_the_table_has_a_case() -> None:
    covered = {Path(case.config).stem.removesuffix("Config").removesuffix("Text") for case in CASES.values()}
    named = {name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for name in FAMILIES}
    assert covered == named
