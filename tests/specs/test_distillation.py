"""A stage of distillation: what cannot go together is one sentence, and the rest has its defaults."""

from typing import Any

import pytest

from slmdeploy.errors import SpecError
from slmdeploy.specs import DistillStage, distill_stage


def stage(**fields: Any) -> DistillStage:
    return distill_stage(**{"steps": 4, "batch_rows": 4, "length": 64, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"loss": "kl"}, "loss"),
        ({"loss": "jsd"}, "beta goes with loss = 'jsd'"),
        ({"beta": 0.5}, "beta goes with loss = 'jsd'"),
        ({"ce_share": 1.5}, "ce_share"),
        ({"on_policy": 0.5, "score_share": 1.0}, "on_policy needs rows of text"),
        ({"on_policy": 0.5, "response_tokens": 60}, "response_tokens = 60 leaves too little"),
        ({"warmup": 3}, "warmup"),
        ({"skew": 0.2}, "skew goes with loss = 'skew_kl' or 'reverse_skew_kl'"),
        ({"loss": "skew_kl", "skew": 1.0}, "skew"),
        ({"score_loss": "margin"}, "score_loss = 'margin' needs rows of scoring records"),
        ({"layer_map": (0, 1)}, "layer_map goes with hidden_weight or attention_weight"),
        ({"seq_kd_texts": 8, "score_share": 1.0}, "seq_kd_texts needs rows of text"),
        (
            {"cached_rows": 8, "on_policy": 0.5, "response_tokens": 8},
            "cached_rows needs rows that are known beforehand",
        ),
        ({"cached_rows": 8, "hidden_weight": 1.0}, "cached_rows keeps no layers"),
        ({"cached_rows": 3}, "cached_rows = 3 do not fill batch_rows = 4"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        stage(**fields)
    assert stage().tokens == 4 * 4 * 64
    assert not stage().compares_layers


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "jsd", "beta": 0.1},
        {"loss": "reverse_skew_kl", "skew": 0.2},
        {"loss": "skew_kl"},
        {"score_loss": "listwise", "score_share": 1.0, "score_items": 8},
        {"hidden_weight": 0.1, "layer_map": [0, 3]},
        {"seq_kd_texts": 8, "on_policy": 0.5, "response_tokens": 16},
        {"cached_rows": 4, "seq_kd_texts": 8, "response_tokens": 16},
    ],
)
def test_what_goes_together_is_taken(fields: dict[str, Any]) -> None:
    taken = stage(**fields)
    assert {name: getattr(taken, name) for name in fields if name != "layer_map"} == {
        name: value for name, value in fields.items() if name != "layer_map"
    }
