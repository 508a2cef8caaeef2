"""The verb `package`: the same bytes twice, refusals before and after, budgets, figures, hashes and signatures."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from slmdeploy.artifacts import open_artifact, writing
from slmdeploy.cli import app
from slmdeploy.errors import CorruptArtifactError, GateError, InputError, OutputExistsError
from slmdeploy.packaging import package as package_module
from slmdeploy.packaging.archive import pack
from slmdeploy.packaging.package import package
from slmdeploy.packaging.sbom import lineage
from slmdeploy.packaging.signature import SIGNATURE
from slmdeploy.packaging.trial import Start
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.opening import load
from slmdeploy.specs.recipes import PackagePlan
from slmdeploy.verification import verify
from tests.graphs import write_tiny_graph
from tests.packaging.packages import write_build, write_keys

RESULT: dict[str, Any] = {"passed": True, "gates": {}, "quality": {"kl": 0.01}, "speed": {"prefill_ratio": 0.5}}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_build(tmp_path_factory.mktemp("verb") / "build", RESULT)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst", ".zip"])
def test_the_same_build_gives_the_same_bytes(build: Path, tmp_path: Path, suffix: str) -> None:
    made = [package(build, out=tmp_path / name).path for name in ("one", "two")]
    first, second = (pack(folder, tmp_path / f"{folder.name}{suffix}").read_bytes() for folder in made)
    assert first == second
    stamped = open_artifact(made[0]).manifest
    assert stamped["created"] == open_artifact(build).manifest["created"]


def test_the_lineage_of_a_package_goes_back_to_what_was_there_first(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"weights")
    with writing(tmp_path / "graph", kind="graph", plan={}, inputs={"checkpoint": tmp_path / "teacher"}) as draft:
        (draft.path / "x").write_text("x")
    with writing(tmp_path / "b", kind="build", plan={}, inputs={"graph": tmp_path / "graph"}) as draft:
        write_tiny_graph(draft.path)
        (draft.path / "manifest.json").unlink()
    made = package(tmp_path / "b", out=tmp_path / "p")
    found = dict(lineage(made.inputs))
    assert list(found) == ["build", "build/graph", "build/graph/checkpoint"]
    assert found["build/graph"]["content_key"] == open_artifact(tmp_path / "graph").content_key
    assert list(verify(made.path)["inputs"]) == list(found)
    assert all(len(entry["digest"]) == 64 for entry in found.values())


def test_a_package_over_its_budget_is_refused_with_what_it_is_over(build: Path, tmp_path: Path) -> None:
    whole = sum(entry["bytes"] for entry in package(build, out=tmp_path / "p").manifest["files"].values())
    assert package(build, out=tmp_path / "fits", max_bytes=whole).path.is_dir()
    with pytest.raises(InputError, match=rf"has {whole} bytes, 1 over its budget of {whole - 1} \("):
        package(build, out=tmp_path / "over", max_bytes=whole - 1)
    assert not (tmp_path / "over").exists()


def test_a_trial_puts_the_figures_of_a_start_into_manifest_and_readme(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # as users name folders; the processes that try a package run elsewhere
    made = package(build, out=Path("p"), trial=True)
    start = made.result["start"]
    assert start["task"] == "generate"
    assert start["starts"] == 3
    assert 0.01 < start["first_answer_s"] < 300
    assert 20 << 20 < start["peak_bytes"] < 4 << 30
    readme = (made.path / "README.md").read_text()
    assert f"| peak_bytes | {start['peak_bytes']} |" in readme
    assert "start" not in package(build, out=tmp_path / "untried").result
    assert verify(made.path)["start"] == start


def test_a_package_that_does_not_start_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = write_build(tmp_path / "b", {}, tasks=("generate",))
    with writing(tmp_path / "broken", kind="build", plan={}, inputs={}) as draft:
        for file in build.iterdir():
            if file.name != "manifest.json":
                (draft.path / file.name).write_bytes(file.read_bytes())
        (draft.path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(GateError, match=r"its first start: .*model\.onnx"):
        package(tmp_path / "broken", out=tmp_path / "p", trial=True)
    monkeypatch.setattr("slmdeploy.packaging.trial._TIMEOUT_S", 0)
    with pytest.raises(GateError, match="its first start: no answer within 0 s"):
        package(build, out=tmp_path / "p", trial=True)
    assert not (tmp_path / "p").exists()


def test_a_signed_package_is_signed_and_a_bad_key_ends_it_before_any_work(build: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    made = package(build, out=tmp_path / "p", key=private)
    assert (made.path / SIGNATURE).is_file()
    assert verify(made.path, key=public)["signature"].startswith("valid, by ed25519")
    with pytest.raises(InputError, match="is no private key"):
        package(build, out=tmp_path / "q", key=public)
    assert not (tmp_path / "q").exists()


def test_a_file_beside_those_of_the_manifest_is_refused(build: Path, tmp_path: Path) -> None:
    made = package(build, out=tmp_path / "p")
    (made.path / "numpy.py").write_text("evil")
    with pytest.raises(CorruptArtifactError, match=r"numpy\.py is not listed in manifest\.json"):
        verify(made.path)


def test_figures_given_twice_give_the_same_server(build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_module, "measure_start", lambda *_: Start("generate", 0.5, 100 << 20, 3))
    first, second = (package(build, out=tmp_path / name, kind="server").path for name in ("a", "b"))
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()] == []


def test_a_build_outside_its_gate_is_not_shipped(tmp_path: Path) -> None:
    failed = {"passed": False, "gates": {"kl": {"passed": True}, "speed": {"passed": False}}}
    build = write_build(tmp_path / "b", failed)
    with pytest.raises(GateError, match=r"b did not pass its gate \(speed\)"):
        package(build, out=tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_outputs_inputs_and_kinds_are_checked(build: Path, tmp_path: Path) -> None:
    packaged = package(build, out=tmp_path / "first").path
    with pytest.raises(OutputExistsError):
        package(build, out=packaged)
    with pytest.raises(InputError, match="is a package, but a build is needed"):
        package(packaged, out=tmp_path / "p")
    with pytest.raises(InputError, match="--kind cloud is not a kind of package: use edge or server"):
        package(build, out=tmp_path / "p", kind="cloud")
    with pytest.raises(InputError, match="does not exist"):
        package(tmp_path / "none", out=tmp_path / "p")


def test_a_build_without_a_tokenizer_is_not_shipped(tmp_path: Path) -> None:
    with writing(tmp_path / "b", kind="build", plan={}, inputs={}) as draft:
        write_tiny_graph(draft.path)
        (draft.path / "manifest.json").unlink()
        (draft.path / "tokenizer.json").unlink()
    with pytest.raises(CorruptArtifactError, match=r"does not list tokenizer\.json"):
        package(tmp_path / "b", out=tmp_path / "p")


@pytest.mark.parametrize("key", ["slmdeploy", "created", "machine"])
def test_a_build_that_does_not_say_who_made_it_is_not_shipped(tmp_path: Path, key: str) -> None:
    manifest = write_build(tmp_path / "b", {}) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {key: 7}))
    with pytest.raises(CorruptArtifactError, match=f"does not say '{key}', as every build does"):
        package(tmp_path / "b", out=tmp_path / "p")


def write_measurement(file: Path, build: Path, **changes: Any) -> Path:
    """A measurement with one row, of this build."""
    row = {
        "build": "build",
        "path": str(build),
        "role": "candidate",
        "content_key": open_artifact(build).content_key,
        "passed": True,
        "metrics": {"size_bytes": 1e6, "chat:ttft_ms_p50": 12.5, "chat:ttft_ms_p90": 19.0},
        "intervals": {"chat:ttft_ms_p50": [12.0, 13.0]},
        "search": None,
    }
    file.write_text(json.dumps({"schema": 2, "rows": [row | changes]}))
    return file


def test_figures_of_a_measurement_go_into_manifest_and_readme(build: Path, tmp_path: Path) -> None:
    made = package(build, out=tmp_path / "p", measurement=write_measurement(tmp_path / "m.json", build))
    (measured,) = made.result["measured"]
    assert measured["metrics"]["chat:ttft_ms_p90"] == 19.0
    assert set(made.inputs) == {"build", "measurement"}
    readme = (made.path / "README.md").read_text()
    assert "| chat:ttft_ms_p50 | 12.5 | 12 to 13 |" in readme
    assert "| size_bytes | 1000000 |  |" in readme
    assert "ttft_ms_p90" not in readme
    assert "session" not in made.plan
    large = write_measurement(tmp_path / "large.json", build, metrics={"size_bytes": 1.0, "rss_peak_bytes": 8e9})
    served = package(build, out=tmp_path / "s", kind="server", measurement=large)
    assert served.result["server"]["request_bytes"] > 8e9 > served.result["start"]["peak_bytes"]
    other = write_measurement(tmp_path / "other.json", build, content_key="f" * 64)
    with pytest.raises(InputError, match=r"other\.json has no figures of .*build: measure it"):
        package(build, out=tmp_path / "q", measurement=other)


def test_session_options_that_a_search_found_are_those_that_the_package_runs_with(build: Path, tmp_path: Path) -> None:
    options = {"threads": 1, "spinning": False, "prefill_chunk": 64}
    found = {"options": options, "compared": []}
    made = package(build, out=tmp_path / "p", measurement=write_measurement(tmp_path / "m.json", build, search=found))
    config = read_runtime(made.path)
    assert {name: getattr(config, name) for name in options} == options
    assert made.plan["session"] == options
    partly = {"options": {"threads": None, "spinning": False, "prefill_chunk": None}, "compared": []}
    file = write_measurement(tmp_path / "partly.json", build, search=partly)
    kept = package(build, out=tmp_path / "kept", measurement=file)
    assert read_runtime(kept.path).threads == read_runtime(build).threads
    assert not read_runtime(kept.path).spinning


def test_a_recipe_says_the_kind_and_the_budget() -> None:
    assert PackagePlan() == PackagePlan(kind="edge", max_bytes=None)
    assert PackagePlan(kind="server", max_bytes=5).max_bytes == 5
    with pytest.raises(ValidationError, match="max_bytes"):
        PackagePlan(max_bytes=0)


def test_the_command_packages_signs_packs_and_checks(build: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")

    def call(*words: object) -> str:
        outcome = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert outcome.exit_code == 0, outcome.output
        return outcome.stdout

    out, archive = tmp_path / "p", tmp_path / "p.tar.zst"
    made = call("package", build, "-o", out, "--max-bytes", 10**8, "--sign", private, "--archive", archive, "--json")
    assert json.loads(made.splitlines()[-1])["path"] == str(out)
    told = json.loads(call("verify", archive, "--key", public, "--json").splitlines()[-1])
    assert told["signature"].startswith("valid, by ed25519")
    assert call("unpack", archive, "-o", tmp_path / "device", "--key", public).strip() == str(tmp_path / "device")
    assert verify(tmp_path / "device")["content_key"] == told["content_key"]
    with pytest.raises(InputError, match="slmdeploy unpack makes a folder of it"):
        load(archive)
