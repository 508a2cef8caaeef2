"""eager.py: cached, batched and packed forms against plain forward passes of the same torch model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from slmdeploy.checkpoint import label_token_ids
from slmdeploy.errors import InputError, UnsupportedModelError
from slmdeploy.exporting import eager
from slmdeploy.exporting.eager import EagerModel
from tests.exporting.checkpoints import TINY, write_checkpoint

PROMPT = [0, 7, 31, 8]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> EagerModel:
    return EagerModel(checkpoint)


def greedy(model: EagerModel, count: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(model.logits(ids)[-1].argmax()))
    return ids[len(PROMPT) :]


def test_generation_is_greedy_and_yields_each_token(model: EagerModel) -> None:
    assert list(model.generate_ids(PROMPT, max_new_tokens=6, ignore_eos=True)) == greedy(model, 6)


def test_the_end_token_ends_generation_unless_it_is_to_be_ignored(tmp_path: Path, model: EagerModel) -> None:
    tokens = greedy(model, 4)
    write_checkpoint(tmp_path, eos_token_id=tokens[2])
    ended = EagerModel(tmp_path)
    assert list(ended.generate_ids(PROMPT, max_new_tokens=4, ignore_eos=False)) == tokens[: tokens.index(tokens[2])]
    assert list(ended.generate_ids(PROMPT, max_new_tokens=4, ignore_eos=True)) == tokens


def test_scores_equal_label_logits_one_by_one(checkpoint: Path, model: EagerModel) -> None:
    items = [[5], [9, 8, 7, 6], [12, 40]]
    expected = [model.logits([*PROMPT, *item])[-1, list(label_token_ids(checkpoint))] for item in items]
    assert np.allclose(model.score_ids(PROMPT, items), expected, atol=1e-5)
    assert np.allclose(model.score_ids(PROMPT, items), expected, atol=1e-5), "a score leaves nothing behind"


def test_prefill_decode_and_batch_equal_whole_sequences(model: EagerModel) -> None:
    assert np.allclose(model.prefill(PROMPT), model.logits(PROMPT)[-1], atol=1e-5)
    assert np.allclose(model.decode(50), model.logits([*PROMPT, 50])[-1], atol=1e-5)
    rows = [PROMPT, [3], [1, 2]]
    for row, logits in zip(rows, model.batch_logits(rows), strict=True):
        assert np.allclose(logits, model.logits(row)[-1], atol=1e-5)


def test_the_context_bounds_everything(model: EagerModel) -> None:
    length = TINY["max_position_embeddings"]
    assert len(list(model.generate_ids([5] * (length - 2), max_new_tokens=9, ignore_eos=True))) == 2
    with pytest.raises(InputError, match=f"{length + 1} tokens are needed, .* holds {length}"):
        model.logits([5] * (length + 1))
    with pytest.raises(InputError, match="tokens are needed"):
        next(model.generate_ids([5] * length, max_new_tokens=1, ignore_eos=True))
    with pytest.raises(InputError, match="tokens are needed"):
        model.score_ids([5] * (length - 1), [[1], [2, 3]])


def test_weights_in_bfloat16_run_in_float32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in EagerModel(tmp_path).model.parameters()} == {torch.float32}


def test_a_model_that_is_not_understood_is_not_run_either(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "mish"}))
    with pytest.raises(UnsupportedModelError, match="hidden_act"):
        EagerModel(tmp_path)


def test_the_worker_reports_a_missing_checkpoint_instead_of_its_hello(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eager.main([str(tmp_path / "none"), "--threads", "1"])
    reply = json.loads(capsys.readouterr().out)
    assert "does not exist" in reply["error"]
    assert reply["exit_code"] == 2


def test_the_worker_serves_the_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr(eager, "serve", lambda session, info: served.append((session, info)))
    eager.main([str(checkpoint)])
    ((session, info),) = served
    assert isinstance(session, EagerModel)
    assert info["load_s"] > 0
    assert "torch" in info["engine"]
