"""build.py: every shipped profile end to end on a tiny decoder, parts kept more precise, and all the refusals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmdeploy.artifacts import open_artifact
from slmdeploy.building import build as verb
from slmdeploy.building import phases
from slmdeploy.building.build import build
from slmdeploy.errors import CorruptArtifactError, GateError, InputError, OutputExistsError
from slmdeploy.runtime.model import load
from slmdeploy.specs import Profile, SessionOptions, Target, list_profiles
from tests.building.small import write_graph
from tests.graphs import write_manifest

EVERYTHING = Target.model_validate(
    {
        "name": "able",
        "summary": "s",
        "kind": "cpu",
        "engines": ["onnxruntime"],
        "isa": ["avx2", "avx512f", "avx512_vnni", "asimddp"],
    }
)
SPEED = {"prefill_ratio": 0.5, "decode_ratio": 0.5, "score_ratio": 0.5}
IDS = [0, 5, 9, 33, 100]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(tmp_path_factory.mktemp("build") / "graph")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny decoder is slower quantised, and a timing would be noise: the speed gate has tests of its own."""
    for module in (verb, phases):
        monkeypatch.setattr(
            module, "speed_gate", lambda own, found: (SPEED, {"passed": True, "value": 0.5, "limit": 1.0})
        )
    monkeypatch.setattr("slmdeploy.building.texts._TOKENS", 128)


def profile(weights: dict[str, Any], **tables: Any) -> Profile:
    base = {"name": "mine", "summary": "s", "engine": "onnxruntime", "session": {"threads": 1, "spinning": False}}
    return Profile.model_validate(base | {"weights": weights} | tables)


INT4 = {"scheme": "weight-only", "bits": 4, "block_size": 32}
LENIENT = {"max_kl": 10.0, "min_top1": 0.0, "max_ppl_ratio": 10.0}


OURS = [shipped for shipped in list_profiles() if shipped.engine == "onnxruntime"]  # test_openvino.py has the others


@pytest.mark.parametrize("shipped", OURS, ids=lambda shipped: shipped.name)
def test_a_shipped_profile_gives_a_build_that_runs_and_is_near_its_graph(
    graph: Path, tmp_path: Path, shipped: Profile
) -> None:
    shipped = shipped.model_copy(update={"session": SessionOptions(threads=1, spinning=False)})
    artifact = build(graph, profile=shipped, target=EVERYTHING, out=tmp_path / "out")
    assert artifact.kind == "build"
    assert artifact.plan["target"] == "able"
    judged = {"passed", "gates", "quality", "calibration", "parity", "speed", "parts", "kept"}
    judged |= {"singular", "prepared"}
    settled = {"session", "scoring", "prefill", "batch"}
    assert set(artifact.result) == judged | settled | ({"forms"} if shipped.scoring else set())
    found, reference = load(artifact.path, threads=1), load(graph, threads=1)
    exact, scores = reference.logits(IDS), reference.score_ids(IDS, [[7, 8], [9]])
    size = {"cpu-fp32": 1e-6}.get(shipped.name, 0.3 if "int4" in shipped.name else 0.05)
    limit = size * np.abs(exact).max()
    np.testing.assert_allclose(found.logits(IDS), exact, atol=limit)
    np.testing.assert_allclose(found.score_ids(IDS, [[7, 8], [9]]), scores, atol=limit)
    runtime = json.loads((artifact.path / "runtime.json").read_text())
    assert runtime["session"] == shipped.session.model_dump() | {"parallel_items": False}
    assert runtime["tasks"] == ["generate", "score"]


def test_the_result_says_what_was_done_and_how_good_it_is(graph: Path, tmp_path: Path) -> None:
    result = build(graph, profile=profile(INT4, gate=LENIENT), out=tmp_path / "out").result
    assert result["passed"]
    assert result["parts"]["model.layers.1.mlp.down_proj"] == "int4 block 32"
    assert "lm_head" not in result["parts"]
    assert result["kept"] == []
    assert result["speed"] == SPEED
    assert result["quality"]["sequences"] == "self-generated"
    assert 0 < result["quality"]["kl"] < 0.2
    assert all(rung["passed"] for rung in result["parity"])
    assert any("batch" in rung["name"] for rung in result["parity"])
    assert set(result["gates"]) == {"kl", "top1_agreement", "ppl_ratio", "parity", "speed"}
    assert result["gates"]["kl"] == {"passed": True, "value": result["quality"]["kl"], "limit": 10.0}


def test_a_split_build_generates_with_one_form_and_scores_with_the_other(graph: Path, tmp_path: Path) -> None:
    w8a8 = {"scheme": "w8a8", "bits": 8}
    forms = {"int4": profile(INT4, gate=LENIENT), "w8a8": profile(w8a8, gate=LENIENT)}
    alone = {name: load(build(graph, profile=form, out=tmp_path / name).path) for name, form in forms.items()}
    artifact = build(graph, profile=profile(INT4, scoring=w8a8, gate=LENIENT), out=tmp_path / "split")
    split = load(artifact.path)
    np.testing.assert_array_equal(split.logits(IDS), alone["int4"].logits(IDS))
    np.testing.assert_array_equal(split.score_ids(IDS, [[7], [8, 9]]), alone["w8a8"].score_ids(IDS, [[7], [8, 9]]))
    assert split.runtime.precision == "int4+w8a8"
    assert artifact.result["gates"]["split"] == {"passed": True, "value": 0.0, "limit": 0.0}
    assert {"kl", "steps kl", "scoring kl", "steps parity", "scoring parity"} <= set(artifact.result["gates"])
    assert "faster prompts" not in artifact.result["gates"]
    assert artifact.result["forms"]["scoring"]["parts"]["model.layers.0.mlp.down_proj"] == "w8a8"
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*.data")) for name in ("int4", "w8a8")]
    data = sorted(artifact.path.glob("*.data"))
    assert [file.name for file in data] == ["model.onnx.data"]
    assert data[0].stat().st_size < sum(sizes), "embedding and norms are stored once"


def test_a_failed_gate_of_the_scoring_form_fails_the_split_build(graph: Path, tmp_path: Path) -> None:
    strict = profile({"scheme": "fp32"}, scoring=INT4, gate={"max_kl": 1e-9, "min_top1": 1.0, "max_ppl_ratio": 1.0})
    result = build(graph, profile=strict, out=tmp_path / "out").result
    assert not result["passed"]
    assert result["gates"]["kl"]["passed"]
    assert result["gates"]["steps kl"]["passed"]
    assert not result["gates"]["scoring kl"]["passed"]


W8A8 = {"scheme": "w8a8", "bits": 8}


def test_a_phase_split_runs_prompts_in_one_form_and_steps_in_the_other(graph: Path, tmp_path: Path) -> None:
    alone = {
        name: load(build(graph, profile=profile(form, gate=LENIENT), out=tmp_path / name).path)
        for name, form in (("steps", INT4), ("prompts", W8A8))
    }
    both = profile(INT4, prefill=W8A8, scoring=W8A8, gate=LENIENT)
    artifact = build(graph, profile=both, out=tmp_path / "split")
    split = load(artifact.path)
    np.testing.assert_array_equal(split.prefill(IDS), alone["prompts"].prefill(IDS))
    np.testing.assert_array_equal(split.score_ids(IDS, [[7]]), alone["prompts"].score_ids(IDS, [[7]]))
    split.prefill([9])
    alone["steps"].prefill([9])
    exact = load(graph).logits([9, 4, 5])
    for step, token in enumerate((4, 5), 1):
        found = split.decode(token)
        assert np.abs(found - exact[step]).max() < 0.3 * np.abs(exact).max()
        assert not np.array_equal(found, alone["prompts"].logits([9, 4, 5])[step]), "steps are in their own form"
    assert artifact.result["gates"]["faster prompts"] == {"passed": True, "value": 0.5, "limit": 1.0}
    assert {"steps kl", "prefill kl"} <= set(artifact.result["gates"])
    assert "scoring kl" not in artifact.result["gates"], "a form that two phases share is judged once"
    assert {phase: form["parts"]["model.layers.0.attn.o_proj"] for phase, form in artifact.result["forms"].items()} == {
        "steps": "int4 block 32",
        "prefill": "w8a8",
        "scoring": "w8a8",
    }
    stored = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("steps", "prompts", "split")]
    assert max(stored[:2]) < stored[2] < sum(stored[:2]), "what the graphs share is stored once"


def test_quality_of_a_phase_split_is_that_of_prompts_and_steps_together(graph: Path, tmp_path: Path) -> None:
    split = load(build(graph, profile=profile(INT4, prefill=W8A8, gate=LENIENT), out=tmp_path / "split").path)
    prompts = load(build(graph, profile=profile(W8A8, gate=LENIENT), out=tmp_path / "prompts").path)
    found, by_prompt = split.logits(IDS), prompts.logits(IDS)
    np.testing.assert_array_equal(found[:3], by_prompt[:3])
    split.prefill(IDS[:3])
    for position in (3, 4):
        np.testing.assert_allclose(found[position], split.decode(IDS[position]), atol=0.02 * np.abs(found).max())
        assert not np.array_equal(found[position], by_prompt[position])


def test_slower_prompts_fail_the_phase_split(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SPEED | {"prefill_ratio": 1.2}
    monkeypatch.setattr(phases, "speed_gate", lambda own, found: (slow, {"passed": True, "value": 0.5, "limit": 1.0}))
    result = build(graph, profile=profile(INT4, prefill=W8A8, gate=LENIENT), out=tmp_path / "out").result
    assert not result["passed"]
    assert [name for name, gate in result["gates"].items() if not gate["passed"]] == ["faster prompts"]


def test_a_phase_that_the_graph_does_not_have_is_left_out(tmp_path: Path) -> None:
    both = profile(INT4, prefill=W8A8, scoring=W8A8, gate=LENIENT)
    generating = build(write_graph(tmp_path / "g", tasks=("generate",)), profile=both, out=tmp_path / "generates")
    assert set(generating.result["forms"]) == {"steps", "prefill"}
    scoring = build(write_graph(tmp_path / "s", tasks=("score",)), profile=both, out=tmp_path / "scores")
    assert "forms" not in scoring.result
    assert scoring.result["parts"]["model.layers.0.attn.o_proj"] == "w8a8"
    assert not (scoring.path / "prefill.onnx").exists()


def test_the_graph_as_it_is_needs_no_measurement(graph: Path, tmp_path: Path) -> None:
    result = build(graph, profile=profile({"scheme": "fp32"}), out=tmp_path / "out").result
    assert result["passed"]
    assert result["parts"] == {}
    assert result["speed"] is None
    assert result["quality"]["kl"] == 0


def test_data_is_used_and_is_part_of_the_content_key(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        (tmp_path / "data" / f"generate.{split}.jsonl").write_text('{"prompt": "abc", "completion": "def"}\n')
    wanted = profile(INT4, gate=LENIENT)
    with_data = build(graph, profile=wanted, out=tmp_path / "with", data=tmp_path / "data")
    without = build(graph, profile=wanted, out=tmp_path / "without")
    assert with_data.result["quality"]["sequences"] == "validation split"
    assert with_data.result["calibration"] == "training split"
    assert without.result["calibration"] == "self-generated"
    assert with_data.content_key != without.content_key


def test_a_table_that_spends_too_much_by_itself_is_kept_and_named(graph: Path, tmp_path: Path) -> None:
    coarse = {"bits": 4, "block_size": 128}
    wanted = profile({"scheme": "w8a8", "bits": 8}, embedding=coarse, head=coarse, gate=LENIENT | {"max_kl": 1e-3})
    result = build(graph, profile=wanted, out=tmp_path / "out").result
    kept = {entry["part"]: entry for entry in result["kept"]}
    assert {"model.embed_tokens", "lm_head"} <= set(kept)
    assert kept["lm_head"]["wanted"] == "int4 block 128"
    assert kept["lm_head"]["form"] == "int8 block 128"
    assert kept["lm_head"]["kl_alone"] > 0.5e-3
    assert "alone is beyond 0.0005" in kept["lm_head"]["reason"]
    assert result["parts"]["lm_head"] == "int8 block 128"


def test_sensitive_layers_are_raised_in_order_until_a_quarter_and_the_build_is_reported(
    graph: Path, tmp_path: Path
) -> None:
    result = build(graph, profile=profile(INT4, gate=LENIENT | {"max_kl": 1e-9}), out=tmp_path / "out").result
    assert not result["passed"]
    assert not result["gates"]["kl"]["passed"]
    assert [entry["form"] for entry in result["kept"]] == ["int8 block 128"] * 2  # a quarter of eight layers
    alone = [entry["kl_alone"] for entry in result["kept"]]
    assert alone == sorted(alone, reverse=True)
    assert open_artifact(tmp_path / "out", "build").result["passed"] is False


def test_raising_layers_stops_as_soon_as_the_gate_passes(graph: Path, tmp_path: Path) -> None:
    free = build(graph, profile=profile(INT4, gate=LENIENT), out=tmp_path / "free").result["quality"]["kl"]
    limits = LENIENT | {"max_kl": free * 0.999}
    result = build(graph, profile=profile(INT4, gate=limits), out=tmp_path / "out").result
    assert result["passed"]
    assert len(result["kept"]) == 1
    assert result["quality"]["kl"] < free


def test_a_missing_instruction_set_is_refused_before_any_work(graph: Path, tmp_path: Path) -> None:
    poor = EVERYTHING.model_copy(update={"isa": ("avx2",)})
    needy = profile({"scheme": "fp32"}, requires={"isa": ["avx512_vnni"]})
    with pytest.raises(InputError, match="avx512_vnni"):
        build(graph, profile=needy, target=poor, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError):
        build(graph, profile=profile({"scheme": "fp32"}), out=tmp_path)


def test_only_a_graph_can_be_built(graph: Path, tmp_path: Path) -> None:
    fp32 = profile({"scheme": "fp32"})
    made = build(graph, profile=fp32, out=tmp_path / "out")
    with pytest.raises(InputError, match="is a build, but a graph is needed"):
        build(made.path, profile=fp32, out=tmp_path / "again")
    with pytest.raises(InputError, match="does not exist"):
        build(tmp_path / "nowhere", profile=fp32, out=tmp_path / "again")


@pytest.mark.parametrize("rehash", [False, True], ids=["changed", "never whole"])
def test_a_corrupt_graph_is_refused_and_leaves_nothing(tmp_path: Path, rehash: bool) -> None:
    broken = write_graph(tmp_path / "graph", layers=1)
    (broken / "model.onnx").write_bytes((broken / "model.onnx").read_bytes()[:-40])
    if rehash:
        write_manifest(broken, kind="graph")
    with pytest.raises(CorruptArtifactError, match=r"model\.onnx"):
        build(broken, profile=profile(INT4), out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


def test_an_invalid_result_is_never_shipped(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: Any, *_: Any) -> None:
        next(node for node in model.graph if node.name == "lm_head").op_type = "NoSuchOperator"

    monkeypatch.setattr(verb, "quantize", spoil)
    with pytest.raises(GateError, match="gives no valid graph, so nothing is written"):
        build(graph, profile=profile(INT4), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_its_extra_building_is_one_sentence() -> None:
    code = "import sys; sys.modules['onnx_ir'] = None; import slmdeploy.building.build"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtraError: this step needs onnx_ir" in run.stderr


def test_a_scorer_carries_only_its_label_rows_of_the_head(tmp_path: Path) -> None:
    both, alone = (write_graph(tmp_path / name, tasks=tasks) for name, tasks in TASKS.items())
    builds = {}
    for graph in (both, alone):
        builds[graph.name] = tmp_path / f"{graph.name}-build"
        build(graph, profile=profile(INT4, gate=LENIENT), target=EVERYTHING, out=builds[graph.name])
    files = {path.name for path in builds["alone"].iterdir()}
    assert "score.onnx" in files
    assert files.isdisjoint({"model.onnx", "standard.onnx", "genai_config.json"})
    sizes = {name: (folder / "model.onnx.data").stat().st_size for name, folder in builds.items()}
    config = load(builds["both"]).runtime
    assert sizes["both"] - sizes["alone"] >= config.vocab_size * 64 * 4, "the fp32 head, hidden 64, is not there"
    expected, found = (load(folder).score("is it", [" so", " not so"]) for folder in builds.values())
    assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="was made for score, not for generate"):
        load(builds["alone"]).generate("x")


TASKS = {"both": ("generate", "score"), "alone": ("score",)}
