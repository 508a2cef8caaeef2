"""The smallest checkpoint and data that compression works on, made anew for each test session."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "the quick brown fox jumps over the lazy dog and says yes or no, " * 4
BOS, EOS = 0, 1


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, " yes no yes no"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes a tiny Llama checkpoint and returns its folder; keywords change the config."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
        tokenizer = _tokenizer()
        settings: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "initializer_range": 0.2,
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def teacher(checkpoint: Callable[..., Path]) -> Path:
    """The default tiny checkpoint; tests only read it."""
    return checkpoint()


@pytest.fixture(scope="session")
def student(checkpoint: Callable[..., Path]) -> Path:
    """A smaller checkpoint with the same tokenizer; tests only read it."""
    return checkpoint(seed=1, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with both kinds of records, train and valid."""
    folder = tmp_path_factory.mktemp("data")
    texts = [{"prompt": f"{i} the quick", "completion": f" brown fox {i} jumps over the dog"} for i in range(40)]
    scores = [
        {"prefix": f"{i} fox\n", "items": ["the dog", "lazy fox", "quick"], "labels": [0, 1, 0]} for i in range(40)
    ]
    for split in ("train", "valid"):
        write_lines(folder / f"generate.{split}.jsonl", texts)
        write_lines(folder / f"score.{split}.jsonl", scores)
    return folder


@torch.no_grad()
def max_difference(first: Any, second: Any, input_ids: torch.Tensor) -> float:
    """Largest absolute difference of two models' logits in float32 on ``input_ids`` [rows, length]."""
    models = (copy.deepcopy(model).float() for model in (first, second))
    logits = [model(input_ids=input_ids, use_cache=False).logits for model in models]
    return float((logits[0] - logits[1]).abs().max())
