"""Likelihoods against the definition, computed from the logits of one run over everything."""

from pathlib import Path

import numpy as np
import pytest

from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.evaluation import continuations
from slmdeploy.evaluation.continuations import fitting, likelihoods
from slmdeploy.runtime.model import Model, load
from tests.graphs import write_tiny_graph

CONTEXT = [0, 60, 61, 62, 63]


def by_definition(model: Model, context: list[int], continuation: list[int]) -> float:
    ids = [*context, *continuation]
    logits = model.logits(ids)[:-1].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(sum(logits[i, ids[i + 1]] for i in range(len(context) - 1, len(ids) - 1)))


def greedy(model: Model, length: int) -> list[int]:
    return list(model.generate_ids(CONTEXT, max_new_tokens=length, ignore_eos=True))


@pytest.mark.parametrize("piece", [1, 2, 128])
def test_each_continuation_is_judged_by_definition(model: Model, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(continuations, "PIECE", piece)
    wanted = [[70], [70, 71, 72], list(range(80, 120)), [70, 71]]
    found = likelihoods(model, CONTEXT, wanted)
    assert [one.log_probability for one in found] == pytest.approx([by_definition(model, CONTEXT, w) for w in wanted])
    assert found == likelihoods(model, CONTEXT, wanted[:1]) + likelihoods(model, CONTEXT, wanted[1:])


def test_the_greedy_continuation_is_known_from_others(model: Model) -> None:
    best = greedy(model, 6)
    other = [*best[:5], (best[5] + 1) % 100]
    assert [one.greedy for one in likelihoods(model, CONTEXT, [best, other, best[:1]])] == [True, False, True]


def test_a_graph_that_cannot_go_back_gives_the_same(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    from slmdeploy.exporting.export import export

    portable = load(export(str(checkpoint), out=tmp_path / "portable", tasks=("generate",), dialect="portable").path)
    assert portable.runtime.interface != "shared"
    wanted = [[70], [70, 71, 72]]
    one, other = likelihoods(portable, CONTEXT, wanted), likelihoods(model, CONTEXT, wanted)
    assert [x.log_probability for x in one] == pytest.approx([x.log_probability for x in other], abs=1e-4)


def test_the_end_of_a_context_stays() -> None:
    assert fitting([1, 2, 3], [4], 3) == [1, 2, 3]
    assert fitting([1, 2, 3], [4, 5], 3) == [2, 3]
    assert fitting([1, 2, 3], [4, 5, 6], 3) == [3]
    with pytest.raises(InputError, match="4 tokens was asked for, but the context of this model holds 3"):
        fitting([1, 2, 3], [4, 5, 6, 7], 3)


def test_a_sequence_that_fills_the_whole_context(model: Model) -> None:
    limit = model.runtime.max_length
    found = likelihoods(model, CONTEXT, [[70] * (limit - len(CONTEXT) + 1)])
    assert np.isfinite(found[0].log_probability)
    with pytest.raises(InputError, match=f"holds {limit}"):
        likelihoods(model, CONTEXT, [[70] * (limit - len(CONTEXT) + 2)])


def test_no_token_and_foreign_tokens_are_refused(model: Model) -> None:
    with pytest.raises(InputError, match="There are no tokens"):
        likelihoods(model, CONTEXT, [[70], []])
    with pytest.raises(InputError, match="outside the vocabulary"):
        likelihoods(model, CONTEXT, [[70, 10**6]])


def test_damaged_weights_are_no_likelihood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = load(write_tiny_graph(tmp_path / "tiny"))
    assert likelihoods(tiny, [0, 5], [[6]])[0].log_probability < 0
    monkeypatch.setattr(Model, "prefill", lambda self, ids: np.full(self.runtime.vocab_size, np.nan, np.float32))
    with pytest.raises(CorruptArtifactError, match="NaN"):
        likelihoods(tiny, [0, 5], [[6]])


def test_probabilities_of_all_next_tokens_are_one(model: Model) -> None:
    every = likelihoods(model, CONTEXT, [[token] for token in range(model.runtime.vocab_size)])
    assert sum(np.exp(one.log_probability) for one in every) == pytest.approx(1, abs=1e-5)
    assert sum(one.greedy for one in every) == 1
    chain = greedy(model, 3)
    steps = [likelihoods(model, CONTEXT + chain[:i], [chain[i : i + 1]])[0].log_probability for i in range(3)]
    assert likelihoods(model, CONTEXT, [chain])[0].log_probability == pytest.approx(sum(steps))
