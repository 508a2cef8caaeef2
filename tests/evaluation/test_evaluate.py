"""The verb on tasks of all three kinds: its figures are those computed by hand from the logits; refusals."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from slmdeploy import extras
from slmdeploy.artifacts import open_artifact
from slmdeploy.cli import app
from slmdeploy.errors import InputError, MissingExtraError, OutputExistsError
from slmdeploy.evaluation.evaluate import evaluate
from slmdeploy.runtime.model import Model
from tests.runtime.encoder_graphs import write_encoder_graph
from tests.worlds import TEXT, WORDS

HEAD = """
task: tiny_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: {name}
metadata: {{version: 2.0}}
"""
BODIES = {
    "multiple_choice": """
doc_to_text: "{{q}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
""",
    "loglikelihood_rolling": """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "generate_until": """
doc_to_text: "{{q}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
CHOICES = [" a list", " items and returns", " one value for each key in order of time"]
QUESTIONS = [f"{first} {second} opens" for first, second in zip(WORDS[:6], WORDS[4:10], strict=True)]


def likelihood(model: Model, context: list[int], continuation: list[int]) -> float:
    ids = [*context, *continuation]
    logits = model.logits(ids)[:-1].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(sum(logits[i, ids[i + 1]] for i in range(len(context) - 1, len(ids) - 1)))


def encoded(model: Model, text: str) -> list[int]:
    return model.tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def folder(own_tasks_only: None, tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    """Tasks of the three kinds with their documents; half of the generations are right, half have no chance to be."""
    folder = tmp_path_factory.mktemp("tasks")
    answers = [model.generate(question, max_new_tokens=8).text for question in QUESTIONS]
    documents = {
        "multiple_choice": [{"q": q, "choices": CHOICES, "gold": i % 3} for i, q in enumerate(QUESTIONS)],
        "loglikelihood_rolling": [{"text": TEXT[i:]} for i in range(4)],
        "generate_until": [{"q": q, "answer": answers[i] + "!" * (i % 2)} for i, q in enumerate(QUESTIONS)],
    }
    for name, records in documents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, folder=folder) + BODIES[name])
    return folder


@pytest.fixture(scope="module")
def report(graph: Path, folder: Path) -> dict[str, Any]:
    """What the command wrote and printed."""
    out = folder / "results.json"
    call = ["evaluate", str(graph), "--tasks", "tiny_*", "--include-path", str(folder), "-o", str(out), "--json"]
    done = CliRunner().invoke(app, call, catch_exceptions=False)
    assert done.exit_code == 0
    written = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == {"path": str(out), **written}
    return written


def figure(report: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    (found,) = (row for row in report["results"][task]["metrics"] if row["metric"] == metric)
    return found


def test_choices_are_right_as_often_as_by_hand(report: dict[str, Any], model: Model) -> None:
    right = {"acc": 0, "acc_norm": 0}
    for number, question in enumerate(QUESTIONS):
        context = encoded(model, question)
        whole = [encoded(model, question + choice) for choice in CHOICES]
        values = np.array([likelihood(model, context, ids[len(context) :]) for ids in whole])
        right["acc"] += int(values.argmax() == number % 3)
        right["acc_norm"] += int((values / [len(choice) for choice in CHOICES]).argmax() == number % 3)
    for metric, count in right.items():
        share = count / len(QUESTIONS)
        found = figure(report, "tiny_multiple_choice", metric)
        assert found["value"] == pytest.approx(share)
        assert found["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(QUESTIONS) - 1)))
    assert sum(right.values()) > 0


def test_bits_per_byte_are_those_by_hand(report: dict[str, Any], model: Model) -> None:
    texts = [TEXT[i:] for i in range(4)]
    nats = -sum(likelihood(model, [0], encoded(model, text)) for text in texts)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    found = figure(report, "tiny_loglikelihood_rolling", "bits_per_byte")
    assert found == {
        "metric": "bits_per_byte",
        "filter": "none",
        "value": pytest.approx(expected),
        "stderr": None,
        "higher_is_better": False,
    }


def test_generations_are_those_of_the_model(report: dict[str, Any]) -> None:
    assert figure(report, "tiny_generate_until", "exact_match")["value"] == 0.5


def test_the_file_says_what_was_evaluated_and_how(report: dict[str, Any], graph: Path) -> None:
    assert report["build"]["content_key"] == open_artifact(graph).content_key
    assert report["plan"]["tasks"] == [f"tiny_{name}" for name in sorted(BODIES)]
    task = report["results"]["tiny_multiple_choice"]
    assert (task["version"], task["fewshot"], task["documents"]) == (2.0, 0, len(QUESTIONS))
    assert report["cut_contexts"] == 0


def test_a_limit_and_solved_examples_reach_the_harness(graph: Path, folder: Path, tmp_path: Path) -> None:
    found = evaluate(
        graph, tasks=["tiny_multiple_choice"], out=tmp_path / "r.json", limit=2, fewshot=1, include_path=folder
    )
    task = found["results"]["tiny_multiple_choice"]
    assert (task["documents"], task["fewshot"]) == (2, 1)
    assert found["plan"] == {"tasks": ["tiny_multiple_choice"], "limit": 2, "fewshot": 1, "resamples": 1000}


def test_people_see_a_table(graph: Path, folder: Path, tmp_path: Path) -> None:
    call = ["evaluate", str(graph), "--tasks", "tiny_generate_until", "--include-path", str(folder), "--limit", "1"]
    done = CliRunner().invoke(app, [*call, "-o", str(tmp_path / "r.json")], catch_exceptions=False)
    assert "exact_match" in done.stdout


def test_what_is_there_is_replaced_only_by_force(graph: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    out.write_text("mine")
    call: dict[str, Any] = {"tasks": ["tiny_generate_until"], "include_path": folder, "limit": 1}
    with pytest.raises(OutputExistsError, match="exists already"):
        evaluate(graph, out=out, **call)
    assert out.read_text() == "mine"
    evaluate(graph, out=out, force=True, **call)
    assert json.loads(out.read_text())["schema"] == 1
    with pytest.raises(OutputExistsError):
        evaluate(graph, out=tmp_path, force=True, **call)


def test_an_unknown_task_is_refused_and_nothing_written(graph: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'tiny_generate_until'"):
        evaluate(graph, tasks=["tiny_generate"], out=tmp_path / "r.json", include_path=folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_tasks_of_the_harness_are_known_to_the_command(graph: Path, tmp_path: Path) -> None:
    call = ["evaluate", str(graph), "--tasks", "hellaswog", "-o", str(tmp_path / "r.json")]
    done = subprocess.run(
        [sys.executable, "-m", "slmdeploy", *call], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: the evaluation harness has no task 'hellaswog': did you ")


def test_an_encoder_and_a_scorer_are_refused(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    from slmdeploy.exporting.export import export

    encoder = write_encoder_graph(tmp_path / "encoder")
    scorer = export(str(checkpoint), out=tmp_path / "scorer", tasks=("score",)).path
    for path, why in ((encoder, "encoder"), (scorer, "--task generate")):
        with pytest.raises(InputError, match=why):
            evaluate(path, tasks=["tiny_generate_until"], out=tmp_path / "r.json", include_path=folder)


def test_without_the_extra_one_sentence_says_what_to_install(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs lm_eval.*pip install 'slmdeploy\[eval\]'"):
        evaluate(graph, tasks=["hellaswag"], out=tmp_path / "r.json")
