"""The command line of compression: encoders by --text, limits by --latency, and which options go together."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from slmdeploy.cli import app
from slmdeploy.errors import InputError, SpecError
from tests.exporting.encoders import write_encoder


def slm(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lines = [json.dumps({"q": f"the cat {i}", "mood": "good" if i % 2 else "bad"}) for i in range(60)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "t.jsonl"


def test_an_encoder_is_tuned_pruned_and_distilled(tmp_path: Path, table: Path) -> None:
    write_encoder(tmp_path / "base", intermediate_size=64)
    steps = ("--steps", 2, "--batch-rows", 4, "--length", 16, "--json")
    tuned = slm(
        "finetune", tmp_path / "base", "-o", tmp_path / "t", "--data", table, "--text", "q", "--label", "mood", *steps
    )
    assert json.loads(tuned.stdout.splitlines()[-1])["result"]["steps"] == 2, tuned.output
    pruned = slm(
        "prune", tmp_path / "t", "-o", tmp_path / "p", "--data", table, "--text", "q", "--calibration-tokens", 512
    )
    assert pruned.exit_code == 0, pruned.output
    taught = slm(
        "distill",
        *(tmp_path / "t", tmp_path / "p", "-o", tmp_path / "s", "--data", table, "--text", "q", "--loss", "mse"),
        *steps,
    )
    assert taught.exit_code == 0, taught.output
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["plan"]["stage"]["loss"] == "mse"
    assert manifest["plan"]["stage"]["learning_rate"] == 5e-5, "what is not given is an encoder's default"


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("prune", "x", "--latency", "ttft_8_ms<=1"), InputError, "--latency and --profile go together"),
        (("prune", "x", "--profile", "cpu-int8"), InputError, "--latency and --profile go together"),
        (("prune", "x", "--latency", "fast", "--profile", "cpu-int8"), InputError, "is not of the form"),
        (("prune", "x", "--latency", "ttft_8_ms<=1", "--profile", "cpu-int9"), InputError, "did you mean"),
        (("prune", "x", "--pair", "p"), InputError, "--pair is of encoders"),
        (("distill", "x", "y", "--steps", "1", "--label", "l"), InputError, "are of encoders: give --text too"),
        (("distill", "x", "y", "--steps", "1", "--text", "t", "--on-policy", "0.5"), SpecError, "not take on_policy"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, table: Path, arguments: tuple[str, ...], error: type[Exception], said: str
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{}")
    done = slm(*arguments, "-o", tmp_path / "out", "--data", table)
    assert isinstance(done.exception, error)
    assert said in str(done.exception)
    assert not (tmp_path / "out").exists()
