"""The command line of the runtime: output, exit codes, one-sentence errors."""

import io
import json
from pathlib import Path

import pytest

from slmdeploy.runtime.__main__ import main
from slmdeploy.runtime.model import Model


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_generate_streams_what_the_model_generates(
    tiny: Path, model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate("añb", max_new_tokens=9).text
    assert main([str(tiny), "generate", "añb", "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    stdin(monkeypatch, "añb".encode())
    assert main([str(tiny), "generate", "--max-new-tokens", "9", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == expected
    assert (answer["finish_reason"], answer["prompt_tokens"], len(answer["token_ids"])) == ("length", 5, 9)


def test_score_takes_items_from_arguments_or_lines(
    tiny: Path, model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.score("p", ["one", "two"])
    assert main([str(tiny), "score", "--prefix", "p", "one", "two", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == pytest.approx(expected)
    stdin(monkeypatch, b"one\ntwo\n")
    assert main([str(tiny), "score", "--prefix", "p"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{expected[0]:+.4f}\tone", f"{expected[1]:+.4f}\ttwo"]


def test_verify_says_what_it_checked(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny), "verify"]) == 0
    assert "build, 6 files" in capsys.readouterr().out
    assert main(["verify", "--json"], folder=tiny) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


@pytest.mark.parametrize(
    ("arguments", "given", "code", "said"),
    [
        (["generate", ""], b"", 2, "The prompt is empty"),
        (["generate"], b"", 2, "The prompt is empty"),
        (["generate"], b"\xff\xfe", 2, "not UTF-8"),
        (["generate", "x" * 100], b"", 2, "The prompt has 101 tokens"),
        (["generate", "x", "--top-p", "2"], b"", 2, "top_p must be"),
        (["score", "--prefix", "p"], b"", 2, "The item 0 is empty"),
        (["--threads", "-2", "generate", "x"], b"", 2, "threads must be 0 or more"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    given: bytes,
    code: int,
    said: str,
) -> None:
    stdin(monkeypatch, given)
    assert main(arguments, folder=tiny, program="run") == code
    error = capsys.readouterr().err
    assert error.startswith("run: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_corrupt_folder_is_exit_code_5_and_none_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "verify"]) == 2
    assert main([str(tmp_path), "generate", "x"]) == 5
    assert "has no manifest.json" in capsys.readouterr().err


def test_an_unknown_verb_is_exit_code_2(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tiny), "fly"])
    assert ended.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_an_interrupt_is_exit_code_130(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slmdeploy.runtime.__main__.load", interrupted)
    assert main([str(tiny), "generate", "x"]) == 130
