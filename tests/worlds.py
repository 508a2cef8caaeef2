"""A whole project in miniature for tests: a random teacher of 2 layers, a tokenizer of few words, data, a recipe."""

import json
from pathlib import Path

RECIPE = """
name = "tiny"
tasks = ["generate", "score"]
[model]
teacher = "teacher"
[data]
source = "data"
[prune]
ratio = 0.5
calibration_tokens = 512
[[distill]]
steps = 2
batch_rows = 2
length = 64
score_share = 0.5
[[distill]]
steps = 2
batch_rows = 2
length = 64
on_policy = 1.0
response_tokens = 8
[candidates]
profiles = ["cpu-fp32", "cpu-int8"]
[[workload]]
name = "short"
task = "generate"
prompt_tokens = 8
new_tokens = 4
requests = 2
[[workload]]
name = "few"
task = "score"
prefix_tokens = 6
items = 3
item_tokens = 4
requests = 2
[budget]
constraints = ["size_bytes <= 1e9"]
objective = "smallest"
"""

TEXT = "the box opens a list of items and returns one value for each key in order of time"
WORDS = TEXT.split(" ")


def tiny_teacher(folder: Path) -> Path:
    """A random Llama checkpoint: hidden 64, 2 layers, 4 query heads and 2 KV heads of 16, context 128."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "x yes", "x no"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def tiny_data(folder: Path) -> Path:
    """A data folder of a few dozen records in each split of both tasks."""
    folder.mkdir(parents=True)
    for split, start in (("train", 0), ("valid", 40), ("test", 60)):
        texts, scores = [], []
        for i in range(start, start + (40 if split == "train" else 12)):
            words = [WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(24)]
            texts.append({"prompt": " ".join(words[:8]), "completion": " " + " ".join(words[8:])})
            items = [f" {words[j]} {words[j + 1]} is" for j in range(4)]
            scores.append(
                {"prefix": " ".join(words[:5]), "items": items, "labels": [int(j == i % 4) for j in range(4)]}
            )
        for task, records in (("generate", texts), ("score", scores)):
            (folder / f"{task}.{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def tiny_project(folder: Path) -> Path:
    """Teacher, data and recipe under ``folder``; returns the recipe's path."""
    tiny_teacher(folder / "teacher")
    tiny_data(folder / "data")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"
