"""Train the embedded default's teacher: a Llama of 11M parameters over the standard library, from nothing, on a CPU.

    python examples/train_teacher.py --out work/teacher
    python examples/train_teacher.py --out work/teacher --phase rank

Writes an ordinary checkpoint folder (config, bf16 safetensors, tokenizer) and the training log. Phase *read* learns
text and, in the other half of every batch, query-symbol pairs that end in a label word. Phase *rank* goes on from it
with three quarters pairs, counts only their label words, and adds made-up queries: the shuffled words of a symbol's
own name among words of other queries, so that matching words is learned from every symbol, documented or not. Linear
layers inside the blocks train with Muon, everything else with AdamW. One seed, machine, thread count and Python
version give one model. The held-out figures are teacher_card.py's.
"""

import argparse
import ast
import json
import random
import re
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


def made_up_records(data: Path, seed: int) -> list[dict[str, Any]]:
    """A score record for every function and class of the training modules, its query made from its own name."""
    picker = random.Random(seed)
    fillers = [word for r in read(data / "score.train.jsonl") for word in r["prefix"].split()[1:]]
    records = []
    for module, text in corpus.sources(corpus.library_root()):
        if corpus.split_of(module) != "train":
            continue
        signatures = sorted(set(all_signatures(module, text)))
        for signature in signatures if len(signatures) > 4 else []:
            words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", signature.split("(")[0].rsplit(".", 1)[-1])
            words = [word.lower() for word in words if picker.random() < 0.8] or [signature.split(".")[-1]]
            words += picker.sample(fillers, picker.randint(1, 8))
            picker.shuffle(words)
            negatives = picker.sample([s for s in signatures if s != signature], min(9, len(signatures) - 1))
            candidates = [signature, *negatives]
            records.append(
                {
                    "prefix": f"query: {' '.join(words).capitalize()}{picker.choice(('.', ''))}\n",
                    "items": [f"symbol: {candidate}\nrelevant:" for candidate in candidates],
                    "labels": [1] + [0] * len(negatives),
                }
            )
    return records


def all_signatures(module: str, text: str) -> Iterator[str]:
    """Qualified name and arguments of every function and class, in the form of slmdeploy.corpus."""

    def walk(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                yield f"{prefix}.{child.name}{arguments}"[:120]
                yield from walk(child, f"{prefix}.{child.name}")

    yield from walk(ast.parse(text), module)


class Pieces:
    """Token pieces of both tasks: (ids, loss weights), each starting with BOS and counted from position 0."""

    def __init__(self, data: Path, tokenizer: PreTrainedTokenizerFast, seed: int, rank: bool) -> None:
        self.rank = rank
        backend = tokenizer.backend_tokenizer
        texts = read(data / "generate.train.jsonl")
        self.texts = [[*e.ids, 1] for e in backend.encode_batch([r["prompt"] + r["completion"] for r in texts])]

        def encoded(record: dict[str, Any]) -> tuple[list[int], list[list[int]], list[int]]:
            items = [e.ids for e in backend.encode_batch(record["items"], add_special_tokens=False)]
            return backend.encode(record["prefix"]).ids, items, record["labels"]

        self.pairs = [encoded(record) for record in read(data / "score.train.jsonl")]
        self.made_up = [encoded(record) for record in made_up_records(data, seed)] if rank else []
        self.label_ids = [backend.encode(word, add_special_tokens=False).ids[0] for word in corpus.SCORE_LABELS]
        self.picker = random.Random(seed)

    def text_stream(self) -> Iterator[tuple[list[int], list[float]]]:
        while True:
            for index in self.picker.sample(range(len(self.texts)), len(self.texts)):
                ids = self.texts[index][:LENGTH]
                yield ids, [1.0] * len(ids)

    def pair_stream(self) -> Iterator[tuple[list[int], list[float]]]:
        while True:
            extra = self.picker.sample(self.made_up, len(self.pairs)) if self.rank else []
            for prefix, items, labels in self.picker.sample(self.pairs + extra, len(self.pairs + extra)):
                positive = labels.index(1)
                negatives = [i for i in range(len(items)) if i != positive]
                for which in [positive, *self.picker.sample(negatives, min(len(negatives), 3 if self.rank else 2))]:
                    ids = [*(prefix + items[which])[: LENGTH - 1], self.label_ids[labels[which]]]
                    text = 1.0 if which == positive and not self.rank else 0.0
                    yield ids, [text] * (len(ids) - 1) + [LABEL_WEIGHT]


class Packed(torch.utils.data.IterableDataset):
    """Rows of LENGTH tokens, text or pairs; position_ids restart, so packed pieces do not see each other."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        streams = [self.pieces.text_stream(), self.pieces.pair_stream()]
        pending: list[tuple[list[int], list[float]] | None] = [None, None]
        while True:
            for side in (0, 1, 1, 1) if self.pieces.rank else (0, 1):
                stream = streams[side]
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
        # Loading replaces the parts' groups, and accelerate loads once at the start: a scheduler must see the new ones.
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class WeightedTrainer(Trainer):
    """Cross-entropy with a weight per token: the label word counts more than a word of text."""

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = inputs["input_ids"]
        logits = model(input_ids=ids, position_ids=inputs["position_ids"], use_cache=False).logits
        losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weights = inputs["weights"][:, 1:].flatten()
        return (losses * weights).sum() / weights.sum()


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rates stay as they are: that is what the shipped teacher was trained with."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--phase", choices=("read", "rank"), default="read")
    parser.add_argument("--steps", type=int, help="default: 1500 to read, 900 to rank")
    parser.add_argument("--batch", type=int, default=8, help="rows of 512 tokens per step")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    data = options.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    print(json.dumps(corpus.write(data)))
    tokenizer = train_tokenizer(data)
    rank, checkpoint = options.phase == "rank", options.out / "checkpoint"
    steps = options.steps or (900 if rank else 1500)
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32) if rank else new_model(options.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = TwoOptimizers(model, lr=3.75e-4 if rank else 7.5e-4, muon_lr=0.0025 if rank else 0.005)
    arguments = TrainingArguments(
        output_dir=str(options.out / options.phase),
        max_steps=steps,
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
    dataset = Packed(Pieces(data, tokenizer, options.seed, rank))
    trainer = WeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        optimizers=(optimizer, constant(optimizer)),
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    history = "".join(json.dumps({"phase": options.phase} | entry) + "\n" for entry in trainer.state.log_history)
    log = checkpoint / "training_log.jsonl"
    log.write_text((log.read_text() if rank else "") + history)


if __name__ == "__main__":
    main()
