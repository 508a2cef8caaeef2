"""The harness' model over a build: equal to the harness' own `hf` model on the same checkpoint, cut and ended alike."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from slmdeploy.errors import InputError
from slmdeploy.evaluation.harness import BuildModel, text_options
from slmdeploy.runtime.model import Model, load
from tests.graphs import write_tiny_graph
from tests.worlds import TEXT

PAIRS = [
    ("the box", " opens"),
    ("the box", " returns one value"),
    ("the box ", "opens a list"),
    ("", "the box opens"),
    ("<s>the box", " opens"),
    ("", "<s> opens"),
    (f"{TEXT} " * 12, " returns one value"),
    ("ein Kästchen", " – ja"),
]
TEXTS = [TEXT, f"{TEXT} é " * 15, "x", "<s>the box"]
GENERATIONS = [
    ("the box", {"until": ["\n"], "max_gen_toks": 12}),
    (f"{TEXT} " * 12, {"until": [], "max_gen_toks": 6, "do_sample": False, "temperature": 0.7}),
    ("a list", {"until": ["\n"], "max_gen_toks": 12}),
    ("", {"until": "e", "max_gen_toks": 5}),
]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


class Counting:
    """A progress that adds up what it hears."""

    def __init__(self) -> None:
        self.done, self.total, self.ended = 0, 0, False

    def start(self, label: str, total: int | None, unit: str) -> None:
        self.total, self.ended = total, False

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n

    def finish(self) -> None:
        self.ended = True


@pytest.fixture(scope="module")
def reference(checkpoint: Path):
    from lm_eval.models.huggingface import HFLM

    # Its cache takes equal tokens for one request though they are cut into context and continuation at unequal places.
    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=1, logits_cache=False)


def test_likelihoods_are_those_of_the_hf_model(model: Model, reference) -> None:
    asked = requests("loglikelihood", PAIRS)
    answering = BuildModel(model)
    found, expected = answering.loglikelihood(asked), reference.loglikelihood(asked, disable_tqdm=True)
    assert [one.log_probability for one in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]
    assert answering.cut == 1


def test_texts_are_as_likely_as_to_the_hf_model(model: Model, reference) -> None:
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert len(model.tokenizer.encode(TEXTS[1]).ids) > 2 * model.runtime.max_length
    expected = reference.loglikelihood_rolling(asked, disable_tqdm=True)
    assert BuildModel(model).loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-3)


def test_generations_are_those_of_the_hf_model(model: Model, reference) -> None:
    asked = requests("generate_until", [pair for pair in GENERATIONS if pair[0]])
    answering = BuildModel(model)
    assert answering.generate_until(asked) == reference.generate_until(asked, disable_tqdm=True)
    assert answering.cut == 1


def test_a_stop_string_ends_a_generation_and_is_no_part_of_it(model: Model) -> None:
    asked = [("the box", {"until": until, "max_gen_toks": 12}) for until in ([], ["no such text"])]
    whole, same = BuildModel(model).generate_until(requests("generate_until", asked))
    assert whole == same
    stop = whole[3:5]
    (cut,) = BuildModel(model).generate_until(
        requests("generate_until", [("the box", {"until": [stop, ""], "max_gen_toks": 12})])
    )
    assert cut == whole[: whole.index(stop)]


def test_samples_differ_between_repeats_and_not_between_runs(model: Model) -> None:
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 40}
    asked = requests("generate_until", [("the box", settings)] * 3)
    once = BuildModel(model).generate_until(asked)
    assert len(set(once)) == 3
    assert BuildModel(model).generate_until(asked) == once


def test_answers_stand_in_the_order_of_the_requests(model: Model) -> None:
    asked, progress = requests("loglikelihood", PAIRS[:5]), Counting()
    found = BuildModel(model, progress).loglikelihood(asked)
    assert (progress.done, progress.total, progress.ended) == (5, 5, True)
    assert BuildModel(model).loglikelihood(asked[::-1]) == found[::-1]


def test_one_context_is_computed_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = []
    prefill = Model.prefill
    monkeypatch.setattr(Model, "prefill", lambda self, ids: prompts.append(ids) or prefill(self, ids))
    BuildModel(model).loglikelihood(requests("loglikelihood", [("the box", f" {word}") for word in "abcd"]))
    assert len(prompts) == 1


def test_settings_of_generation_become_those_of_the_runtime() -> None:
    assert text_options({"until": "\n", "max_new_tokens": 7, "temperature": None, "num_beams": 1}) == {
        "max_new_tokens": 7,
        "stop": ["\n"],
        "temperature": 0.0,
    }
    sampled = text_options({"do_sample": True, "top_p": 0.9, "temperature": 0.5})
    assert (sampled["temperature"], sampled["top_p"], sampled["max_new_tokens"]) == (0.5, 0.9, 256)
    assert text_options({"do_sample": True})["temperature"] == 1.0
    with pytest.raises(InputError, match="beam search"):
        text_options({"num_beams": 4})
    with pytest.raises(InputError, match="sets length_penalty, suffix for generation"):
        text_options({"suffix": "x", "length_penalty": 2})


def test_more_new_tokens_than_the_context_holds_are_refused(model: Model) -> None:
    asked = requests("generate_until", [("the box", {"until": [], "max_gen_toks": model.runtime.max_length})])
    with pytest.raises(InputError, match="max_gen_toks"):
        BuildModel(model).generate_until(asked)


def test_a_build_without_a_token_for_beginnings(tmp_path: Path) -> None:
    bare = load(write_tiny_graph(tmp_path / "tiny"))
    bare.runtime = replace(bare.runtime, bos_token_id=None, eos_token_ids=(1,))
    assert BuildModel(bare).prefix_token_id == 1
    bare.runtime = replace(bare.runtime, eos_token_ids=())
    answering = BuildModel(bare)
    assert answering.loglikelihood(requests("loglikelihood", [("a", "b")]))[0].log_probability < 0
    with pytest.raises(InputError, match="leave the task out"):
        answering.loglikelihood(requests("loglikelihood", [("", "b")]))
