"""Train the embedded default's teacher: a Llama of 11M parameters over the standard library, from nothing, on a CPU.

    python examples/train_teacher.py --out work/teacher

Writes an ordinary checkpoint folder (config, bf16 safetensors, tokenizer), the training log and held-out metrics beside
simple baselines. Deterministic for one seed, machine, thread count and Python version up to the wall-clock budget: the
number of steps is fixed by --steps, and the log records it. Two tasks share every batch: packed text, and query-symbol
pairs that end in a label word. Linear layers inside the blocks train with Muon, everything else with AdamW.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from slmdeploy import corpus

VOCABULARY = 4096
LENGTH = 512
LABEL_WEIGHT = 6.0
BOS, EOS = "<|bos|>", "<|eos|>"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def train_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the training text and the pairs; BOS is added in front, never EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (r["prompt"] + r["completion"] for r in read(data / "generate.train.jsonl"))
    pairs = (r["prefix"] + r["items"][0] + corpus.SCORE_LABELS[1] for r in read(data / "score.train.jsonl"))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((t for group in (texts, pairs) for t in group), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def new_model(seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        rms_norm_eps=1e-5,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


class Pieces:
    """Token pieces of both tasks: (ids, loss weights), each starting with BOS and counted from position 0."""

    def __init__(self, data: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        backend = tokenizer.backend_tokenizer
        texts = read(data / "generate.train.jsonl")
        self.texts = [[*e.ids, 1] for e in backend.encode_batch([r["prompt"] + r["completion"] for r in texts])]
        self.pairs = []
        for record in read(data / "score.train.jsonl"):
            prefix = backend.encode(record["prefix"]).ids
            items = [e.ids for e in backend.encode_batch(record["items"], add_special_tokens=False)]
            self.pairs.append((prefix, items, record["labels"]))
        self.label_ids = [backend.encode(word, add_special_tokens=False).ids[0] for word in corpus.SCORE_LABELS]
        self.picker = random.Random(seed)

    def text_stream(self) -> Iterator[tuple[list[int], list[float]]]:
        while True:
            for index in self.picker.sample(range(len(self.texts)), len(self.texts)):
                ids = self.texts[index][:LENGTH]
                yield ids, [1.0] * len(ids)

    def pair_stream(self) -> Iterator[tuple[list[int], list[float]]]:
        while True:
            for index in self.picker.sample(range(len(self.pairs)), len(self.pairs)):
                prefix, items, labels = self.pairs[index]
                positive = labels.index(1)
                negatives = [i for i in range(len(items)) if i != positive]
                for which in [positive, *self.picker.sample(negatives, 2)]:
                    ids = [*(prefix + items[which])[: LENGTH - 1], self.label_ids[labels[which]]]
                    text = 1.0 if which == positive else 0.0
                    yield ids, [text] * (len(ids) - 1) + [LABEL_WEIGHT]


class Packed(torch.utils.data.IterableDataset):
    """Rows of LENGTH tokens: half text, half pairs; position_ids restart, so packed pieces do not see each other."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        streams = [self.pieces.text_stream(), self.pieces.pair_stream()]
        pending: list[tuple[list[int], list[float]] | None] = [None, None]
        while True:
            for side, stream in enumerate(streams):
                row, weights, positions = [], [], []
                while True:
                    piece = pending[side] or next(stream)
                    if len(row) + len(piece[0]) > LENGTH and (side == 1 or LENGTH - len(row) < 64):
                        pending[side] = piece
                        break
                    room = LENGTH - len(row)
                    row += piece[0][:room]
                    weights += [0.0, *piece[1][1:room]]  # nothing predicts BOS
                    positions += range(min(len(piece[0]), room))
                    pending[side] = None
                    if len(row) == LENGTH:
                        break
                fill = LENGTH - len(row)
                yield {
                    "input_ids": torch.tensor(row + [1] * fill),
                    "weights": torch.tensor(weights + [0.0] * fill),
                    "position_ids": torch.tensor(positions + list(range(fill))),
                }


class TwoOptimizers(torch.optim.Optimizer):
    """Muon for the block matrices and AdamW for the rest, behind one face for the Trainer."""

    def __init__(self, model: torch.nn.Module, lr: float, muon_lr: float) -> None:
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
        others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
        self.parts = [
            torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.97), weight_decay=0.01),
        ]
        super().__init__([{"params": matrices}, {"params": others}], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


class WeightedTrainer(Trainer):
    """Cross-entropy with a weight per token: the label word counts more than a word of text."""

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = inputs["input_ids"]
        logits = model(input_ids=ids, position_ids=inputs["position_ids"], use_cache=False).logits
        losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weights = inputs["weights"][:, 1:].flatten()
        return (losses * weights).sum() / weights.sum()


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over 4 steps (Muon needs no more), flat, then linear to nothing over the last 45 %."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 4, (steps - step) / (0.45 * steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8, help="rows of 512 tokens per step")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    data = options.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    print(json.dumps(corpus.write(data)))
    tokenizer = train_tokenizer(data)
    model = new_model(options.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = TwoOptimizers(model, lr=3e-3, muon_lr=0.02)
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        bf16=True,
        use_cpu=True,
        logging_steps=20,
        save_steps=200,
        save_total_limit=3,
        max_grad_norm=1.0,
        report_to=[],
        remove_unused_columns=False,
        seed=options.seed,
        disable_tqdm=True,
    )
    dataset = Packed(Pieces(data, tokenizer, options.seed))
    trainer = WeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        optimizers=(optimizer, schedule(optimizer, options.steps)),
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    checkpoint = options.out / "checkpoint"
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    history = "".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
    (checkpoint / "training_log.jsonl").write_text(history)


if __name__ == "__main__":
    main()
