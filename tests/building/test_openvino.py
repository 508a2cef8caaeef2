"""Builds of the engine openvino: tiny decoders and encoders, their gates, what is refused, and what damage says."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from pydantic import ValidationError

from slmdeploy.building.build import build
from slmdeploy.building.ladder import climb
from slmdeploy.building.openvino_graph import stateful_decoder
from slmdeploy.building.openvino_quantize import compress_weights, parts
from slmdeploy.errors import CorruptArtifactError, InputError, MissingExtraError
from slmdeploy.packaging.package import package
from slmdeploy.profiling.candidates import size_bytes
from slmdeploy.runtime.model import Model, load
from slmdeploy.runtime.openvino_decoding import Floats, Ids
from slmdeploy.runtime.openvino_pages import PagedRuns, PagedSequence
from slmdeploy.runtime.openvino_session import GRAPH, WEIGHTS
from slmdeploy.specs import Profile, SessionOptions, Weights, list_profiles, load_profile
from tests.graphs import write_manifest, write_tiny_graph

IDS = [5, 9, 1, 200, 3, 77, 42, 8]
ITEMS = [[7, 8], [9], [11, 12, 13, 14], [15]]
THEIRS = [shipped for shipped in list_profiles() if shipped.engine == "openvino"]


def one_thread(shipped: Profile) -> Profile:
    return shipped.model_copy(update={"session": SessionOptions(threads=1, spinning=False)})


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers that share heads and one that does not, and a context that is no power of two."""
    return write_tiny_graph(tmp_path_factory.mktemp("graph") / "graph", kv_heads=(2, 4), max_length=72, kind="graph")


@pytest.fixture(scope="module")
def exact(graph: Path) -> Model:
    return load(graph, threads=1)


@pytest.fixture(scope="module")
def built(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "build"
    shipped = one_thread(load_profile("openvino-int8"))
    return build(graph, profile=shipped, out=out).path


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["result"]
    return result


def test_a_build_is_near_its_graph_in_every_way_it_is_asked(built: Path, exact: Model) -> None:
    found = load(built, threads=1)
    limit = 0.05 * float(np.abs(exact.logits(IDS)).max())
    np.testing.assert_allclose(found.logits(IDS), exact.logits(IDS), atol=limit)
    np.testing.assert_allclose(found.prefill(IDS), exact.prefill(IDS), atol=limit)
    np.testing.assert_allclose(found.decode(6), exact.decode(6), atol=limit)
    np.testing.assert_allclose(found.batch_logits([IDS, [4]]), exact.batch_logits([IDS, [4]]), atol=limit)
    np.testing.assert_allclose(found.score_ids(IDS, ITEMS), exact.score_ids(IDS, ITEMS), atol=limit)


def test_the_result_says_what_was_done_and_what_was_tried(built: Path) -> None:
    result = result_of(built)
    assert result["parts"]["model.layers.1.mlp.down_proj"] == "int8 per channel"
    assert result["parts"]["model.embed_tokens"] == "int8 per channel"
    assert len(result["parts"]) == 2 * 4 + 2, "tables of angles stay as they are"
    assert result["inference_precision"] in result["precisions"]
    assert "f32" in result["precisions"]
    assert result["gates"]["kl"]["passed"]
    assert result["gates"]["parity"]["passed"]
    runtime = json.loads((built / "runtime.json").read_text())
    assert runtime["interface"] == "stateful"
    assert runtime["openvino"] == {"inference_precision": result["inference_precision"]}
    assert {file.name for file in built.iterdir() if "model" in file.name} == {
        "openvino_model.xml",
        "openvino_model.bin",
    }


def test_steps_continue_one_sequence_and_nothing_else_disturbs_it(built: Path) -> None:
    model = load(built, threads=1)
    alone = [model.logits([*IDS, 6, 7])[-2:]]
    model.prefill(IDS)
    first = model.decode(6)
    model.batch_logits([[1, 2, 3]])
    model.score_ids([4, 5], ITEMS)
    np.testing.assert_allclose(np.stack([first, model.decode(7)]), alone[0], atol=0.05 * np.abs(alone[0]).max())


def test_generation_ends_with_the_context_and_a_longer_prompt_is_refused(built: Path) -> None:
    model = load(built, threads=1)
    assert len(list(model.generate_ids(IDS, max_new_tokens=1000, ignore_eos=True))) == 72 - len(IDS)
    with pytest.raises(InputError, match="context of this model holds 72"):
        model.logits([1] * 73)
    with pytest.raises(InputError, match="Item 1 has 70 tokens"):
        model.score_ids(IDS, [[1], [1] * 70])


def test_a_prefix_is_computed_once_while_it_stays_the_same(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    once = PagedRuns.run_pieces

    def counted(runs: PagedRuns, sequence: PagedSequence, ids: Ids, last: Ids, piece: int) -> list[Floats]:
        begun.append(ids.size)
        return once(runs, sequence, ids, last, piece)

    monkeypatch.setattr(PagedRuns, "run_pieces", counted)
    model = load(built, threads=1)
    first = model.score_ids(IDS, ITEMS)
    np.testing.assert_array_equal(model.score_ids(IDS, ITEMS), first)
    assert begun == [len(IDS)]
    model.score_ids(IDS[:2], ITEMS)
    np.testing.assert_array_equal(model.score_ids(IDS, ITEMS), first)
    assert begun == [len(IDS), 2, len(IDS)]


@pytest.mark.parametrize("tokens", [1, 5])
def test_scores_do_not_depend_on_how_items_are_batched(
    built: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    together = load(built, threads=1).score_ids(IDS, ITEMS)
    monkeypatch.setattr("slmdeploy.runtime.openvino_scoring.batches.__defaults__", (tokens,))
    np.testing.assert_allclose(load(built, threads=1).score_ids(IDS, ITEMS), together, rtol=0, atol=0.05)


def test_several_prompts_together_give_what_each_gives_alone(built: Path) -> None:
    model = load(built, threads=1)
    prompts = [IDS, [4], [9, 8, 7, 6, 5] * 8, [3, 2]]
    alone = [list(model.generate_ids(prompt, max_new_tokens=6, ignore_eos=True)) for prompt in prompts]
    assert model.generate_batch_ids(prompts, slots=3, max_new_tokens=6, ignore_eos=True) == alone


def test_pages_come_back_when_nobody_holds_them(built: Path) -> None:
    model = load(built, threads=1)
    model.prefill(IDS)
    pool = model._paged.pool
    held = pool.held
    model.batch_logits([IDS, [4]])
    model.generate_batch_ids([IDS, [1] * 40, [2]], slots=2, max_new_tokens=4)
    assert pool.held == held
    model.score_ids(IDS, ITEMS)
    assert pool.held == held + 1, "the prefix stays for the next request"
    with pytest.raises(InputError, match="holds 72"):
        model.generate_batch_ids([IDS, [1] * 73], max_new_tokens=4)
    assert pool.held == held + 1


def test_long_prompts_run_in_pieces(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [*IDS, *IDS, *IDS]
    whole = load(built, threads=1).logits(ids)
    monkeypatch.setattr("slmdeploy.runtime.openvino_decoding.PIECE", 7)
    model = load(built, threads=1)
    atol = 0.05 * np.abs(whole).max()
    np.testing.assert_allclose(model.logits(ids), whole, atol=atol)
    np.testing.assert_allclose(model.prefill(ids), whole[-1], atol=atol)


def test_attention_is_rewritten_exactly(graph: Path, built: Path, exact: Model, tmp_path: Path) -> None:
    """float32 throughout: what is left is the order of summation."""
    folder = copy_of(built, tmp_path)
    openvino.save_model(stateful_decoder(graph / "model.onnx"), folder / GRAPH, compress_to_fp16=False)
    runtime = json.loads((folder / "runtime.json").read_text()) | {"openvino": {"inference_precision": "f32"}}
    (folder / "runtime.json").write_text(json.dumps(runtime))
    found = load(folder, threads=1, verify=False)
    for rung in climb(exact, found, vocab_size=272, max_length=72, label_ids=(259, 262), batches=True, limit=1e-5):
        assert rung.passed, rung


def test_four_bits_go_in_blocks_and_embedding_and_head_take_eight(graph: Path) -> None:
    model = compress_weights(
        stateful_decoder(graph / "model.onnx"), Weights(scheme="weight-only", bits=4, block_size=32)
    )
    found = parts(model)
    assert found["model.layers.0.mlp.gate_up_proj"] == "int4 block 32"
    assert found["model.embed_tokens"] == "int8 per channel"
    assert len(found) == 10


def test_a_graph_of_another_dialect_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path / "graph", kind="graph")
    runtime = json.loads((folder / "runtime.json").read_text())
    (folder / "runtime.json").write_text(json.dumps(runtime | {"interface": "standard"}))
    write_manifest(folder, kind="graph")
    with pytest.raises(InputError, match="export it with --dialect ort, or use a profile of the engine"):
        build(folder, profile=THEIRS[0], out=tmp_path / "out")


def test_a_missing_extra_is_one_sentence(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmdeploy.extras.find_spec", lambda name: None if name == "nncf" else object())
    with pytest.raises(MissingExtraError, match=r"needs nncf.*pip install 'slmdeploy\[openvino\]'"):
        build(graph, profile=THEIRS[0], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_device_without_openvino_says_what_to_install(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="pip install openvino"):
        load(built).logits(IDS)


@pytest.mark.parametrize("name", ["openvino_model.xml", "openvino_model.bin"])
def test_damage_is_found_by_hash_and_without_hashes_by_the_engine(built: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(built, tmp_path)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptArtifactError, match="bytes where"):
        load(folder)
    with pytest.raises(CorruptArtifactError, match=r"openvino_model.xml does not load; make or unpack it again"):
        load(folder, verify=False).logits(IDS)


def test_a_model_that_is_not_what_runtime_json_says_is_refused(built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path)
    runtime = json.loads((folder / "runtime.json").read_text())
    for change in ({"kv_heads": [2, 2]}, {"vocab_size": 300}, {"head_dim": 8}):
        (folder / "runtime.json").write_text(json.dumps(runtime | change))
        with pytest.raises(CorruptArtifactError, match="other keys, values or logits"):
            load(folder, verify=False).logits(IDS)
    for change in ({"openvino": {"inference_precision": "u8"}}, {"openvino": {}}, {"interface": "shared"}):
        (folder / "runtime.json").write_text(json.dumps(runtime | change))
        with pytest.raises(CorruptArtifactError):
            load(folder, verify=False)


def test_a_manifest_that_leaves_the_folder_or_lacks_the_model_is_refused(built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest["files"]
    entry = files.pop("openvino_model.bin")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtifactError, match=r"does not list openvino_model.bin"):
        load(folder)
    files["../openvino_model.bin"] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtifactError, match="leaves the folder"):
        load(folder)


def test_a_measurement_counts_the_weights(built: Path) -> None:
    assert size_bytes(built) > (built / GRAPH).stat().st_size + (built / WEIGHTS).stat().st_size


def test_a_path_with_signs_that_are_no_ascii_works(built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path / "ein Ordner — ñ 模型")
    assert len(list(load(folder).generate_ids(IDS, max_new_tokens=2, ignore_eos=True))) == 2


def copy_of(source: Path, place: Path) -> Path:
    folder = place / "copy"
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_package_needs_the_engine(built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path)
    write_manifest(folder, result={"passed": True})
    manifest = json.loads((folder / "manifest.json").read_text())
    machine = json.loads((built / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps(machine | {"files": manifest["files"], "result": {"passed": True}})
    )
    made = package(folder, out=tmp_path / "package").path
    assert any(line.startswith("openvino==") for line in (made / "requirements.txt").read_text().splitlines())
    assert load(made).generate("yes", max_new_tokens=2).prompt_tokens == 4


def test_a_decoder_with_activations_of_eight_bits_is_refused(graph: Path, tmp_path: Path) -> None:
    mine = Profile(name="mine", summary="s", engine="openvino", weights=Weights(scheme="w8a8", bits=8))
    with pytest.raises(InputError, match="for encoders alone"):
        build(graph, profile=mine, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"engine": "openvino", "head": {"bits": 8}}, "engine = 'openvino' does not take head"),
        ({"engine": "openvino", "prepacked": True}, "engine = 'openvino' does not take prepacked"),
        ({"engine": "onnxruntime", "encoder": {"scheme": "w8a8", "bits": 8}}, "'onnxruntime' does not take encoder"),
        ({"engine": "openvino", "weights": {"scheme": "weight-only", "bits": 8, "block_size": 32}}, "per channel"),
    ],
)
def test_a_key_that_the_engine_does_not_know_is_refused(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Profile.model_validate({"name": "mine", "summary": "s", "weights": {"scheme": "fp32"}} | keys)
