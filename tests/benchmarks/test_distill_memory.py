"""The benchmark of the chunked loss: both forms compute the same, and memory is of the whole logits or of less."""

import pytest

from benchmarks.distill_memory import compare_losses, loss_once


def test_both_forms_give_the_same_loss() -> None:
    found = [loss_once(form, tokens=24, vocabulary=300, hidden=8)["loss"] for form in ("naive", "chunked")]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.slow
def test_the_chunked_form_needs_less_memory_than_whole_logits() -> None:
    found = compare_losses(tokens=1024, vocabulary=16384, hidden=64, rounds=1)
    whole_logits = 4 * 1024 * 16384
    assert found["naive"]["bytes"] > 2 * whole_logits
    assert found["memory_ratio"] < 0.5
