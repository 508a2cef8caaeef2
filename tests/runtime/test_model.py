"""The Model: generation as text and as ids, laziness, and every folder that cannot be run."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from slmdeploy.runtime.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.model import Model, load
from tests.graphs import write_manifest, write_tiny_graph

PROMPT = "def f("


def greedy_reference(model: Model, ids: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: all logits anew for each token."""
    made: list[int] = []
    for _ in range(count):
        made.append(int(model.logits(ids + made)[-1].argmax()))
    return made


def test_greedy_generation_equals_decoding_without_a_cache(model: Model) -> None:
    ids = model.tokenizer.encode(PROMPT).ids
    made = list(model.generate_ids(ids, max_new_tokens=12, ignore_eos=True))
    assert made == greedy_reference(model, ids, 12)


def test_text_ids_and_stream_agree(model: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    completion = model.generate(PROMPT, **options)
    ids = model.tokenizer.encode(PROMPT).ids
    assert completion.token_ids == tuple(model.generate_ids(ids, **options))
    assert completion == model.generate(ids, **options)
    assert "".join(model.stream(PROMPT, **options)) == completion.text
    assert completion.text == model.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
    assert (completion.finish_reason, completion.prompt_tokens) == ("length", len(ids))


def test_a_stop_string_ends_the_text_unseen(model: Model) -> None:
    whole = model.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
    stop = whole.text[5:8]
    cut = model.generate(PROMPT, max_new_tokens=20, ignore_eos=True, stop=["never there", stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)


def test_an_end_token_ends_generation_and_is_not_given_out(tiny: Path, model: Model) -> None:
    ids = model.tokenizer.encode(PROMPT).ids
    made = greedy_reference(model, ids, 5)
    folder = rewritten(tiny, eos_token_ids=[made[3]])
    assert list(load(folder).generate_ids(ids, max_new_tokens=5)) == made[: made.index(made[3])]
    assert list(load(folder).generate_ids(ids, max_new_tokens=5, ignore_eos=True)) == made
    assert load(folder).generate(PROMPT, max_new_tokens=5).finish_reason == "stop"


def test_generation_ends_where_the_context_is_full(model: Model) -> None:
    made = list(model.generate_ids([5] * 60, max_new_tokens=100, ignore_eos=True))
    assert len(made) == 4
    with pytest.raises(InputError, match="The prompt has 64 tokens, but the context of this model holds 64"):
        model.generate_ids([5] * 64)
    with pytest.raises(InputError, match="The prompt has 101 tokens, but the context"):
        model.generate("x" * 100)


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("", {}, "The prompt is empty"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ("x", {"temperature": -1.0}, "temperature must be 0 or more"),
        ("x", {"stop": [""]}, "stop must be a list"),
    ],
)
def test_bad_requests_are_refused_before_the_first_token(
    model: Model, prompt: str, options: dict[str, Any], problem: str
) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises(InputError, match=problem):
            call(prompt, **options)


def test_a_newer_generation_ends_an_older_one_loudly(model: Model) -> None:
    older = model.generate_ids([5, 6], ignore_eos=True)
    next(older)
    next(model.generate_ids([7], ignore_eos=True))
    with pytest.raises(InputError, match="Another generation has begun"):
        next(older)


def test_a_scorer_never_opens_the_generating_graph_and_the_other_way_round(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path)
    scorer, generator = load(folder), load(folder)
    (folder / "model.onnx").unlink()
    scorer.score("p", ["x"])
    with pytest.raises(CorruptArtifactError, match=r"model\.onnx does not load"):
        scorer.generate("p")
    write_tiny_graph(tmp_path)
    (folder / "score.onnx").unlink()
    generator.generate("p", max_new_tokens=1)


def test_a_task_that_the_folder_lacks_is_named(tmp_path: Path) -> None:
    generator = load(write_tiny_graph(tmp_path / "g", tasks=("generate",)))
    with pytest.raises(InputError, match=r"was made for generate, not for score: export it with --task score"):
        generator.score("p", ["x"])
    scorer = load(rewritten(write_tiny_graph(tmp_path / "s"), tasks=["score"]))
    with pytest.raises(InputError, match="was made for score, not for generate"):
        scorer.generate("p")


def rewritten(folder: Path, **changes: Any) -> Path:
    """A copy of a folder with keys of runtime.json changed and a manifest that fits."""
    copy = folder.parent / f"{folder.name}-{'-'.join(changes)}"
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    runtime = json.loads((copy / "runtime.json").read_text()) | changes
    (copy / "runtime.json").write_text(json.dumps(runtime))
    write_manifest(copy)
    return copy


def test_a_changed_file_is_found_and_verify_false_looks_away(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path)
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CorruptArtifactError, match=r"config\.json has \d+ bytes where"):
        load(folder)
    assert load(folder, verify=False).tasks == ("generate", "score")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x0a"])
def test_a_graph_that_onnx_runtime_cannot_read_is_corrupt(tmp_path: Path, content: bytes) -> None:
    folder = write_tiny_graph(tmp_path)
    (folder / "model.onnx").write_bytes(content)
    write_manifest(folder)
    with pytest.raises(CorruptArtifactError, match=r"model\.onnx does not load; make or unpack it again"):
        load(folder).logits([5])


def test_truncated_graph_and_weights_are_corrupt_even_without_hashes(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        folder = write_tiny_graph(tmp_path / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(CorruptArtifactError, match=r"model\.onnx does not load"):
            load(folder, verify=False).logits([5])


def test_weights_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path / "model")
    (folder / "model.onnx.data").rename(tmp_path / "outside.data")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../outside.data" if entry.key == "location" else entry.value
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    write_manifest(folder)
    with pytest.raises(CorruptArtifactError, match=r"model\.onnx does not load"):
        load(folder).logits([5])


@pytest.mark.parametrize("name", ["tokenizer.json", "model.onnx", "score.onnx", "runtime.json"])
def test_a_file_that_was_never_listed_is_missed_by_name(tmp_path: Path, name: str) -> None:
    folder = write_tiny_graph(tmp_path)
    (folder / name).unlink()
    write_manifest(folder)
    with pytest.raises(CorruptArtifactError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers": 3, "kv_heads": [2, 1, 1]}, r"lacks the input or output past_key_values\.2"),
        ({"layers": 1, "kv_heads": [2]}, r"has an unexpected input or output past_key_values\.1"),
        ({"kv_heads": [2, 2]}, r"past_key_values\.1\.key has shape"),
        ({"head_dim": 8}, r"past_key_values\.0\.key has shape"),
    ],
)
def test_a_graph_that_is_not_what_runtime_json_says_is_corrupt(
    tiny: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(CorruptArtifactError, match=problem):
        load(rewritten(tiny, **changes)).logits([5])


def test_other_kinds_of_artifact_are_not_run(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path, kind="checkpoint")
    with pytest.raises(InputError, match="is a checkpoint, which cannot be run"):
        load(folder)


def test_threads_can_be_set_and_must_make_sense(tiny: Path) -> None:
    assert load(tiny, threads=2).logits([5]).shape == (1, 272)
    with pytest.raises(InputError, match="threads must be 0 or more, not -1"):
        load(tiny, threads=-1)
