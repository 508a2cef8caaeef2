"""The command line: one sentence and the documented exit code for bad input, JSON for machines, completion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commandline import slm
from tests.runtime.encoder_graphs import write_encoder_graph


def process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as users start it."""
    command = [sys.executable, "-m", "slmdeploy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("run", "missing.toml", "-o", "OUT"), 2, "missing.toml does not exist"),
        (("build", "GRAPH", "-o", "OUT", "--profile", "cpu-int9"), 2, "did you mean"),
        (("build", "nothing", "-o", "OUT", "--profile", "cpu-fp32"), 2, "nothing"),
        (("recompile", "nothing", "-o", "OUT"), 2, "nothing"),
        (("verify", "nothing"), 2, "nothing does not exist"),
        (("generate", "nothing", "hello"), 2, "nothing"),
        (("select", "nothing", "--budget", "fast"), 2, "is not of the form"),
        (("profile", "x", "-o", "OUT", "--workload", "generate-32"), 2, "write one like generate-128-64"),
        (("export", "no-such-folder", "-o", "OUT"), 2, "no-such-folder does not exist"),
        (("prune", "no-such-folder", "-o", "OUT", "--data", "stdlib"), 2, "no-such-folder does not exist"),
        (("verify", "DAMAGED"), 5, "manifest.json"),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_bad_input_is_one_sentence_and_a_code(tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")
    names = {"OUT": str(tmp_path / "out"), "GRAPH": str(damaged), "DAMAGED": str(damaged)}
    done = slm(*(names.get(a, a) for a in arguments))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_process_ends_with_the_sentence_and_the_code(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    done = process("verify", tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "manifest.json" in done.stderr


def test_lists_and_doctor_speak_json() -> None:
    for command, key in (
        (("targets",), "x86-64-avx512-vnni"),
        (("profiles",), "cpu-int8"),
        (("doctor", "--no-bench"), "machine"),
    ):
        done = slm(*command, "--json")
        assert done.returncode == 0, done.stderr
        assert key in json.loads(done.stdout.splitlines()[-1])
        assert slm(*command).stdout


def test_version_and_help() -> None:
    assert process("--version").stdout.strip() == "0.1.0"
    text = slm("--help").stdout
    for verb in ("distill", "prune", "export", "build", "profile", "select", "package", "run", "verify", "doctor"):
        assert verb in text


def test_shell_completion_offers_the_verbs() -> None:
    done = process(_PYTHON_M_SLMDEPLOY_COMPLETE="complete_bash", COMP_WORDS="slmdeploy pro", COMP_CWORD="1")
    script = subprocess.run(
        [str(Path(sys.executable).with_name("slmdeploy"))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "_SLMDEPLOY_COMPLETE": "complete_bash", "COMP_WORDS": "slmdeploy pro", "COMP_CWORD": "1"},
    )
    assert script.stdout.split() == ["profile", "profiles"], (script, done)


def test_encoders_print_vectors_labels_and_scores(tmp_path: Path) -> None:
    folders = {role: write_encoder_graph(tmp_path / role, role) for role in ("embed", "classify", "tokens")}
    vectors = json.loads(slm("embed", folders["embed"], "a b", "c", "--json").stdout.splitlines()[-1])["embeddings"]
    assert [len(vector) for vector in vectors] == [3, 3]
    assert [len(line.split()) for line in slm("embed", folders["embed"], "a b").stdout.splitlines()] == [3]
    assert slm("classify", folders["classify"], "a b").stdout.split()[1] in ("low", "high")
    tokens = json.loads(slm("classify", folders["tokens"], "a b", "--json").stdout.splitlines()[-1])["labels"]
    assert [(token["start"], token["end"]) for token in tokens[0]] == [(0, 1), (2, 3)]
    assert len(slm("score", folders["classify"], "--prefix", "a", "b", "c").stdout.splitlines()) == 2
    refused = slm("generate", folders["embed"], "a")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "is an encoder's" in refused.stderr
