"""Sequences decoded together: each gets what it gets alone, whenever others join, leave, grow or move."""

from pathlib import Path

import numpy as np
import pytest

from slmdeploy.runtime import slots
from slmdeploy.runtime.batching import BatchDecoder
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.decoding import Decoder
from slmdeploy.runtime.errors import InputError
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.slots import SlotCache

PROMPTS = [[0, 5, 60, 7, 111], [9], [10, 33, 4, 8, 8, 21, 90, 14, 3, 2, 77], [44, 45], [6, 7, 8, 200], [100] * 20]


def batch(folder: Path, size: int) -> BatchDecoder:
    return BatchDecoder(Decoder(folder, read_runtime(folder), threads=1), size)


def test_a_step_over_unequal_lengths_equals_each_sequence_alone(tiny: Path, model: Model) -> None:
    decoder = batch(tiny, 6)
    behind_prompts = [decoder.admit(np.array(prompt)).copy() for prompt in PROMPTS]
    tokens = np.arange(6) + 30
    behind_tokens = decoder.step(tokens)
    for i, prompt in enumerate(PROMPTS):
        assert np.abs(behind_prompts[i] - model.prefill(prompt)).max() < 1e-5
        assert np.abs(behind_tokens[i] - model.decode(int(tokens[i]))).max() < 1e-5


def test_sequences_join_leave_and_move_while_others_go_on(tiny: Path, model: Model) -> None:
    decoder = batch(tiny, 3)
    ids = [list(prompt) for prompt in PROMPTS[:3]]
    for prompt in ids:
        decoder.admit(np.array(prompt))

    def step_and_compare() -> None:
        tokens = np.arange(len(ids)) + 50 + len(ids[0])
        logits = decoder.step(tokens)
        for row, token in enumerate(tokens):
            ids[row].append(int(token))
            assert np.abs(logits[row] - model.logits(ids[row])[-1]).max() < 1e-5

    step_and_compare()
    decoder.release(0)  # the last row moves into the first
    ids[0] = ids.pop()
    step_and_compare()
    decoder.admit(np.array(PROMPTS[5]))
    ids.append(list(PROMPTS[5]))
    step_and_compare()
    decoder.release(2)
    ids.pop()
    step_and_compare()
    assert decoder.used == 2


def test_given_tokens_of_one_sequence_equal_steps_and_can_be_taken_back(tiny: Path, model: Model) -> None:
    decoder, prompt = batch(tiny, 2), PROMPTS[2]
    decoder.admit(np.array(prompt))
    whole = model.logits([*prompt, 5, 6, 7, 8])
    decoder.begin(40)
    decoder.extend(np.array(PROMPTS[5][:4]), last=False)  # a prompt in the making stands behind it
    for kept in (4, 2, 1):
        logits = decoder.judge(np.array([5, 6, 7, 8]))
        assert np.abs(logits - whole[-4:]).max() < 1e-5
        decoder.take_back(4)
        assert np.abs(decoder.judge(np.array([5, 6, 7, 8][:kept]))[-1] - whole[len(prompt) + kept - 1]).max() < 1e-5
        decoder.take_back(kept)
    assert decoder.length(0) == len(prompt)
    behind = decoder.extend(np.array(PROMPTS[5][4:]), last=True)
    assert behind is not None
    assert np.abs(behind - model.logits(PROMPTS[5])[-1]).max() < 1e-5
    decoder.join()
    assert np.abs(decoder.step(np.array([5, 9]))[0] - whole[len(prompt)]).max() < 1e-5
    with pytest.raises(AssertionError, match="one row alone"):
        decoder.judge(np.array([5, 6]))


def test_a_batch_that_outgrows_its_buffers_keeps_what_they_hold(
    tiny: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_SMALLEST", 4)
    decoder = batch(tiny, 2)
    ids = [[1, 2, 3], [9]]
    for prompt in ids:
        decoder.admit(np.array(prompt))
    assert decoder.cache.capacity == 4
    for token in range(40, 50):
        logits = decoder.step(np.array([token, token + 1]))
        ids = [[*ids[0], token], [*ids[1], token + 1]]
    assert decoder.cache.capacity == 16
    assert decoder.cache.size_bytes == 2 * 2 * (2 + 1) * 16 * 16 * 4
    for row in range(2):
        assert np.abs(logits[row] - model.logits(ids[row])[-1]).max() < 1e-5


def test_it_leaves_the_decoders_own_sequence_alone(tiny: Path, model: Model) -> None:
    decoder = Decoder(tiny, read_runtime(tiny), threads=1)
    decoder.prefill(np.array([1, 2, 3]))
    together = BatchDecoder(decoder, 2)
    together.admit(np.array([7, 7, 7, 7]))
    together.step(np.array([8]))
    assert np.abs(decoder.step(4) - model.logits([1, 2, 3, 4])[-1]).max() < 1e-5


@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_generated_tokens_are_those_of_each_prompt_alone(model: Model, size: int) -> None:
    alone = [list(model.generate_ids(prompt, max_new_tokens=9 + i)) for i, prompt in enumerate(PROMPTS)]
    same_room = [tokens[:9] for tokens in alone]
    assert model.generate_batch_ids(PROMPTS, slots=size, max_new_tokens=9) == same_room


def test_sampling_is_seeded_as_alone(model: Model) -> None:
    options = {"max_new_tokens": 8, "temperature": 0.9, "top_p": 0.95, "seed": 5, "ignore_eos": True}
    alone = [list(model.generate_ids(prompt, **options)) for prompt in PROMPTS]
    assert model.generate_batch_ids(PROMPTS, slots=3, **options) == alone


def test_text_ends_at_stop_strings_and_says_why(model: Model) -> None:
    prompts = ["def f", "a", "some longer text"]
    whole = [model.generate(prompt, max_new_tokens=12) for prompt in prompts]
    assert model.generate_batch(prompts, slots=2, max_new_tokens=12) == whole
    ids = [model.tokenizer.encode(prompt).ids for prompt in prompts]
    assert model.generate_batch([prompts[0], *ids[1:]], slots=2, max_new_tokens=12) == whole
    stop = whole[0].text[2:4]
    stopped = [model.generate(prompt, max_new_tokens=12, stop=[stop]) for prompt in prompts]
    assert stopped[0].finish_reason == "stop"
    assert model.generate_batch(prompts, slots=2, max_new_tokens=12, stop=[stop]) == stopped


def test_a_sequence_ends_at_the_end_of_the_context_and_at_end_tokens(model: Model) -> None:
    longest = [3] * 60
    assert len(model.generate_batch_ids([longest, [5]], max_new_tokens=30, ignore_eos=True)[0]) == 4
    assert model.generate_batch([], max_new_tokens=3) == []


def test_what_cannot_run_is_refused_before_anything_runs(model: Model) -> None:
    with pytest.raises(InputError, match="The prompt has 64 tokens, but the context of this model holds 64"):
        model.generate_batch_ids([[1], [2] * 64])
    with pytest.raises(InputError, match="room for at least 1 sequence, not 0"):
        model.generate_batch_ids([[1]], slots=0)
    with pytest.raises(InputError, match="a list of strings, not one string"):
        model.generate_batch("text")
    with pytest.raises(InputError, match="65 tokens are needed"):
        SlotCache(model.runtime, 2).reserve(65)


def test_forced_tokens_for_checks(model: Model) -> None:
    prompts, tokens = PROMPTS[:3], [[5], [6, 7, 8], [9, 10]]
    for prompt, forced, rows in zip(prompts, tokens, model.batch_decode(prompts, tokens), strict=True):
        expected = model.logits([*prompt, *forced])[len(prompt) - 1 :]
        assert np.abs(rows - expected).max() < 1e-5


def test_prompts_in_pieces_between_steps_give_what_whole_ones_give(tiny: Path, model: Model) -> None:
    decoder = batch(tiny, 3)
    ids = [list(PROMPTS[0]), list(PROMPTS[1])]
    for prompt in ids:
        decoder.admit(np.array(prompt))
    arriving = PROMPTS[2]
    decoder.begin(len(arriving))
    for start, stop in ((0, 3), (3, 4), (4, 9)):
        assert decoder.extend(np.array(arriving[start:stop]), last=False) is None
        if start == 3:
            decoder.release(0)  # the last row moves into the first, and the staged one moves up
            ids[0] = ids.pop()
        tokens = np.arange(len(ids)) + 70 + start
        logits = decoder.step(tokens)
        for row, token in enumerate(tokens):
            ids[row].append(int(token))
            assert np.abs(logits[row] - model.logits(ids[row])[-1]).max() < 1e-5
    behind = decoder.extend(np.array(arriving[9:]), last=True)
    assert behind is not None
    assert np.abs(behind - model.prefill(arriving)).max() < 1e-5
    assert decoder.used == 1
    decoder.join()
    decoder.fork()
    assert decoder.used == 3
    logits = decoder.step(np.array([1, 2, 3]))
    for row, expected in enumerate(([*ids[0], 1], [*arriving, 2], [*arriving, 3])):
        assert np.abs(logits[row] - model.logits(expected)[-1]).max() < 1e-5


def test_a_staged_row_outlives_growing_buffers_and_can_be_abandoned(
    tiny: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_SMALLEST", 4)
    decoder = batch(tiny, 2)
    decoder.begin(4)
    decoder.extend(np.array([3, 4]), last=False)
    decoder.reserve(20)
    behind = decoder.extend(np.array([5]), last=True)
    assert behind is not None
    assert np.abs(behind - model.prefill([3, 4, 5])).max() < 1e-5
    decoder.abandon()
    assert np.abs(decoder.admit(np.array([8, 9])) - model.prefill([8, 9])).max() < 1e-5
    assert decoder.used == 1


def test_segments_read_out_of_a_row_begin_another(tiny: Path, model: Model) -> None:
    decoder = batch(tiny, 2)
    decoder.admit(np.array(PROMPTS[2]))
    pieces = [(decoder.read(0, 0, 6), 6), (decoder.read(0, 6, 11), 2)]
    decoder.begin(12, pieces)
    behind = decoder.extend(np.array([50, 51]), last=True)
    assert behind is not None
    assert np.abs(behind - model.prefill([*PROMPTS[2][:8], 50, 51])).max() < 1e-5


def test_memory_goes_back_when_nothing_is_held(tiny: Path, model: Model) -> None:
    decoder = batch(tiny, 2)
    decoder.admit(np.array(PROMPTS[0]))
    size = decoder.cache.size_bytes
    with pytest.raises(AssertionError, match="hold a sequence"):
        decoder.shrink(size - 1)
    decoder.release(0)
    decoder.shrink(size)
    assert decoder.cache.size_bytes == size
    decoder.shrink(size - 1)
    assert decoder.cache.size_bytes == 0
    assert np.abs(decoder.admit(np.array(PROMPTS[1])) - model.prefill(PROMPTS[1])).max() < 1e-5
    assert np.isfinite(decoder.step(np.array([4]))).all()
