"""build.py on encoders, end to end on tiny random BERTs: each profile, parts kept more precise, and the refusals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from slmdeploy.building import encoder_build
from slmdeploy.building.build import build
from slmdeploy.cli import app
from slmdeploy.errors import InputError
from slmdeploy.exporting.export import export
from slmdeploy.runtime.encoder_model import load_encoder
from slmdeploy.specs import Profile, Target, load_profile
from tests.exporting.encoders import FAMILIES, ROLES, write_encoder

TEXTS = ["The cat sat.", "where", "where is the cat on? the cat sat on the, on, on."]
EVERYTHING = Target.model_validate(
    {"name": "able", "summary": "s", "kind": "cpu", "engines": ["onnxruntime"], "isa": ["avx512_vnni"]}
)
SPEED = {"single_ratio": 0.5, "batch_ratio": 0.5}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An embedder and a classifier of three labels, as export writes them."""
    folder = tmp_path_factory.mktemp("encoders")
    for role in ("embed", "classify"):
        write_encoder(folder / f"{role} checkpoint", role=role, max_position_embeddings=128)
        export(folder / f"{role} checkpoint", out=folder / role)
    return {role: folder / role for role in ("embed", "classify")}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timing of something so small would be noise: the speed gate has tests of its own."""
    passed = {"passed": True, "value": 0.5, "limit": 1.0}
    monkeypatch.setattr(encoder_build, "speed_gate", lambda own, found, config: (SPEED, passed))


def profile(weights: dict[str, Any], **more: Any) -> Profile:
    base = {"name": "mine", "summary": "s", "engine": "onnxruntime", "session": {"threads": 1, "spinning": False}}
    return Profile.model_validate(base | {"weights": weights} | more)


@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-int8", "cpu-int8-static", "cpu-int8-weight"])
def test_a_shipped_profile_gives_a_build_near_its_graph(graphs: dict[str, Path], tmp_path: Path, name: str) -> None:
    limit = {"cpu-fp32": 1e-5, "cpu-int8-static": 0.1}.get(name, 0.05)
    for role, graph in graphs.items():
        made = build(graph, profile=load_profile(name), target=EVERYTHING, out=tmp_path / role)
        assert made.result["passed"], made.result["gates"]
        assert set(made.result) == {"passed", "gates", "quality", "parity", "speed", "fused", "parts", "kept"}
        assert made.result["fused"]["used"]
        assert ("speed" in made.result["gates"]) == bool(made.result["parts"]) == (name != "cpu-fp32")
        own, found = load_encoder(graph, threads=1), load_encoder(made.path, threads=1)
        if role == "embed":
            np.testing.assert_allclose(
                found.embed(TEXTS), own.embed(TEXTS), atol=limit * np.abs(own.embed(TEXTS)).max()
            )
            assert made.result["quality"]["min_cosine"] > 0.98
        else:
            expected = [label.scores for label in own.classify(TEXTS)]
            np.testing.assert_allclose([label.scores for label in found.classify(TEXTS)], expected, atol=limit)
            assert made.result["quality"]["logit_difference"] < limit


def test_the_folder_is_an_encoder_under_the_profile(graphs: dict[str, Path], tmp_path: Path) -> None:
    shipped = load_profile("cpu-int8-weight")
    made = build(graphs["embed"], profile=shipped, out=tmp_path / "out")
    before, after = (json.loads((path / "runtime.json").read_text()) for path in (graphs["embed"], made.path))
    assert after == before | {"precision": "int8", "session": shipped.session.model_dump()}
    assert (made.path / "tokenizer.json").read_bytes() == (graphs["embed"] / "tokenizer.json").read_bytes()
    forms = made.result["parts"]
    assert forms["model.embeddings.word_embeddings"] == "int8 block 128"
    assert sum(file.stat().st_size for file in made.path.glob("model.onnx*")) < sum(
        file.stat().st_size for file in graphs["embed"].glob("model.onnx*")
    )


def test_the_most_sensitive_parts_are_kept_until_the_gate_passes(graphs: dict[str, Path], tmp_path: Path) -> None:
    int4 = {"scheme": "weight-only", "bits": 4, "block_size": 32}
    plain = build(graphs["embed"], profile=profile(int4, gate={"min_cosine": 0.0}), out=tmp_path / "plain").result
    assert plain["kept"] == []
    strict = profile(int4, gate={"min_cosine": plain["quality"]["min_cosine"] + 1e-6})
    raised = build(graphs["embed"], profile=strict, out=tmp_path / "raised").result
    assert raised["kept"][0]["wanted"] == "int4 block 32"
    assert raised["kept"][0]["form"] == "int8 block 128"
    assert len(raised["kept"]) <= len(raised["parts"]) / 4
    assert raised["quality"]["mean_cosine"] > plain["quality"]["mean_cosine"]


def test_a_build_outside_its_gate_is_written_and_says_so(graphs: dict[str, Path], tmp_path: Path) -> None:
    strict = profile({"scheme": "w8a8", "bits": 8}, gate={"max_logit_difference": 0.0})
    made = build(graphs["classify"], profile=strict, target=EVERYTHING, out=tmp_path / "out")
    assert not made.result["passed"]
    assert not made.result["gates"]["logit_difference"]["passed"]


def test_a_profile_of_two_forms_is_refused(graphs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an encoder has one graph"):
        build(graphs["embed"], profile=load_profile("cpu-int8-split"), target=EVERYTHING, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_texts_of_a_data_folder_are_compared_on(graphs: dict[str, Path], tmp_path: Path) -> None:
    records = [{"prefix": "where is", "items": ["the cat", "a"], "labels": [1, 0]}]
    data = tmp_path / "data"
    data.mkdir()
    (data / "score.valid.jsonl").write_text("\n".join(map(json.dumps, records)))
    for role, rows in (("embed", 2), ("classify", 2)):
        fp32 = profile({"scheme": "fp32"})
        quality = build(graphs[role], profile=fp32, data=data, out=tmp_path / role).result["quality"]
        assert (quality["texts"], quality["rows"]) == ("validation split", rows)
    (data / "score.valid.jsonl").write_text("")
    with pytest.raises(InputError, match="no record with text"):
        build(graphs["embed"], profile=profile({"scheme": "fp32"}), data=data, out=tmp_path / "none")


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, f"{arguments}: {done.output} {done.exception}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_an_encoder_goes_from_graph_to_package_on_the_command_line(graphs: dict[str, Path], tmp_path: Path) -> None:
    builds = [str(tmp_path / name) for name in ("cpu-fp32", "cpu-int8")]
    for made in builds:
        target = ("--target", "x86-64-avx512-vnni")
        run("build", str(graphs["embed"]), "-o", made, "--profile", Path(made).name, *target)
    workloads = ("--workload", "embed-128", "--workload", "embed-8x128-offline")
    measured = run("profile", *builds, "-o", str(tmp_path / "measured"), "--limit", "0.1", *workloads)
    for row in measured["rows"]:
        assert {"encode_ms_p50", "encode_ms_p99", "texts_per_s", "load_s", "size_bytes"} <= set(row["metrics"])
        assert row["passed"]
    # Which of two so small is faster is noise; that the faster one is chosen is tested in test_encoders.py.
    choice = run("select", str(tmp_path / "measured"), "--budget", "encode_ms_p50<=10000")
    assert choice["chosen_path"] in builds
    run("package", choice["chosen_path"], "-o", str(tmp_path / "package"))
    command = [sys.executable, str(tmp_path / "package" / "run"), "embed", *TEXTS, "--json"]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    np.testing.assert_allclose(printed["embeddings"], load_encoder(choice["chosen_path"]).embed(TEXTS), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_role_is_fused_and_quantised(family: str, role: str, tmp_path: Path) -> None:
    write_encoder(tmp_path / "checkpoint", family, role)
    task = {"embed": "embed", "tokens": "classify"}.get(role, role)
    export(tmp_path / "checkpoint", out=tmp_path / "graph", tasks=(task,))
    result = build(tmp_path / "graph", profile=load_profile("cpu-int8"), target=EVERYTHING, out=tmp_path / "out").result
    assert result["fused"]["used"], result["fused"]
    assert bool(result["fused"]["attention"]) == (not family.startswith("DeBERTa"))
    # Labels of random models are close calls, so agreement on them says nothing here.
    assert all(gate["passed"] for name, gate in result["gates"].items() if name != "label_agreement"), result["gates"]
