"""widening.py: every family's weights come out as transformers itself loads them, from whatever they are stored as."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmdeploy.exporting.widening import load_causal_lm
from tests.exporting.families import CASES, write_case


@pytest.mark.parametrize("name", CASES)
def test_widened_weights_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    write_case(CASES[name], tmp_path, dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = load_causal_lm(tmp_path)
    assert type(found) is type(expected)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for (key, mine), theirs in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert mine.dtype == torch.float32, key
        assert torch.equal(mine, theirs), key
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in found.named_buffers())


def test_shards_and_mixed_types_are_loaded(tmp_path: Path) -> None:
    model = write_case(next(iter(CASES.values())), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.get_output_embeddings().half()
    model.save_pretrained(tmp_path, max_shard_size="70KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    found = load_causal_lm(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())
