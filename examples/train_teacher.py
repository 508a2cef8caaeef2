"""Train the embedded default's teacher: a Llama of 10.5M parameters over the standard library, from nothing, on a CPU.

    python examples/train_teacher.py --out work/teacher

Writes an ordinary checkpoint folder (config, bf16 safetensors, tokenizer) and the training log. Batches are of two
kinds: text, and query-symbol pairs of which the label word counts most. The pairs' queries are first sentences of
docstrings (the task itself), other sentences of the same docstrings, and the shuffled words of a symbol's own name
among words of other queries, so that matching words is learned from every symbol, documented or not. Linear layers
inside the blocks train with Muon, everything else with AdamW; the learning rates warm up, stay, and fall to zero. One
seed, machine, thread count and Python version give one model. The held-out figures are teacher_card.py's.
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
EARLY_LENGTH, PAIR_LENGTH = 256, 128
"""Attention is what is slow on a CPU: rows of text are LENGTH long only while the learning rates fall, pairs never."""
BATCH_TOKENS = 4096
STEPS = 3600
DECAY = 0.5
"""The last share of the steps, in which the learning rates fall to zero and most batches are pairs."""
PAIR_SHARE, LATE_PAIR_SHARE = 0.5, 0.75
NEGATIVES = 4
SHORTEST = 64
TEXT_WEIGHT = 0.02
"""Weight of a token of a matching pair's text next to its label word."""
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
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def other_records(data: Path, seed: int) -> list[dict[str, Any]]:
    """More score records from the training modules: queries from a symbol's own name and from its docstring's rest."""
    picker = random.Random(seed)
    fillers = [word for r in read(data / "score.train.jsonl") for word in r["prefix"].split()[1:]]
    records = []
    for module, text in corpus.sources(corpus.library_root()):
        if corpus.split_of(module) != "train":
            continue
        rest = dict(all_symbols(module, text))
        for signature, docstring in rest.items() if len(rest) > 4 else ():
            others = [s for s in rest if s != signature]
            for query in (name_query(signature, fillers, picker), *later_sentences(docstring)):
                negatives = picker.sample(others, min(9, len(others)))
                records.append(
                    {
                        "prefix": f"query: {query}\n",
                        "items": [f"symbol: {candidate}\nrelevant:" for candidate in (signature, *negatives)],
                        "labels": [1] + [0] * len(negatives),
                    }
                )
    return records


def name_query(signature: str, fillers: list[str], picker: random.Random) -> str:
    """Most words of the symbol's name among words of other queries, shuffled."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", signature.split("(")[0].rsplit(".", 1)[-1])
    words = [word.lower() for word in words if picker.random() < 0.8] or [signature.split("(")[0].split(".")[-1]]
    words += picker.sample(fillers, picker.randint(1, 8))
    picker.shuffle(words)
    return " ".join(words).capitalize() + picker.choice((".", ""))


def later_sentences(docstring: str) -> list[str]:
    """Up to two sentences behind the first, which is the query of the task itself."""
    sentences = re.split(r"(?<=[.!?])\s+|\n\n", docstring.strip())[1:]
    flat = (" ".join(sentence.split())[:200] for sentence in sentences)
    return [sentence for sentence in flat if len(sentence.split()) >= 4][:2]


def all_symbols(module: str, text: str) -> Iterator[tuple[str, str]]:
    """Signature, in the form of slmdeploy.corpus, and docstring of every function and class, documented or not."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                yield f"{prefix}.{child.name}{arguments}"[:120], ast.get_docstring(child) or ""
                yield from walk(child, f"{prefix}.{child.name}")

    yield from walk(ast.parse(text), module)


Piece = tuple[list[int], list[float]]
"""Token ids that start with BOS, and the loss weight of each as a target."""


class Batches(torch.utils.data.IterableDataset):
    """Whole batches of packed pieces; position_ids restart with each, so pieces of a row do not see each other."""

    def __init__(self, data: Path, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> None:
        backend = tokenizer.backend_tokenizer
        texts = read(data / "generate.train.jsonl")
        self.texts = [[*e.ids, 1] for e in backend.encode_batch([r["prompt"] + r["completion"] for r in texts])]

        def encoded(record: dict[str, Any]) -> tuple[list[int], list[list[int]], list[int]]:
            items = [e.ids for e in backend.encode_batch(record["items"], add_special_tokens=False)]
            return backend.encode(record["prefix"]).ids, items, record["labels"]

        self.pairs = [encoded(record) for record in read(data / "score.train.jsonl")]
        self.others = [encoded(record) for record in other_records(data, seed)]
        print(f"{len(self.texts)} texts, {len(self.pairs)} records, {len(self.others)} made from the same modules")
        self.label_ids = [backend.encode(word, add_special_tokens=False).ids[0] for word in corpus.SCORE_LABELS]
        self.picker = random.Random(seed)
        self.steps = steps

    def text_pieces(self) -> Iterator[Piece]:
        while True:
            for index in self.picker.sample(range(len(self.texts)), len(self.texts)):
                ids = self.texts[index][:LENGTH]
                yield ids, [1.0] * len(ids)

    def pair_pieces(self) -> Iterator[Piece]:
        while True:
            records = self.pairs + self.picker.sample(self.others, min(len(self.others), len(self.pairs)))
            for prefix, items, labels in self.picker.sample(records, len(records)):
                positive = labels.index(1)
                negatives = [i for i in range(len(items)) if i != positive]
                for which in [positive, *self.picker.sample(negatives, min(len(negatives), NEGATIVES))]:
                    ids = [*(prefix + items[which])[: PAIR_LENGTH - 1], self.label_ids[labels[which]]]
                    yield ids, [TEXT_WEIGHT if which == positive else 0.0] * (len(ids) - 1) + [1.0]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        pairs = packed(self.pair_pieces(), PAIR_LENGTH, cut=False)
        early, late = (packed(self.text_pieces(), length, cut=True) for length in (EARLY_LENGTH, LENGTH))
        for step in range(self.steps):
            decaying = step >= self.steps * (1 - DECAY)
            texts, share = (late, LATE_PAIR_SHARE) if decaying else (early, PAIR_SHARE)
            rows = pairs if self.picker.random() < share else texts
            batch = [next(rows)]
            batch += [next(rows) for _ in range(BATCH_TOKENS // len(batch[0]["input_ids"]) - 1)]
            yield {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def packed(pieces: Iterator[Piece], length: int, cut: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of ``length`` tokens, filled up at the end; pieces may be cut into parts of SHORTEST or more."""
    waiting: Piece | None = None
    while True:
        ids: list[int] = []
        weights: list[float] = []
        positions: list[int] = []
        while len(ids) < length:
            piece = waiting or next(pieces)
            room = length - len(ids)
            if len(piece[0]) > room and (not cut or room < SHORTEST):
                waiting = piece
                break
            rest = (piece[0][room:], piece[1][room:])
            waiting = rest if len(rest[0]) >= SHORTEST else None
            ids += piece[0][:room]
            weights += [0.0, *piece[1][1:room]]  # nothing predicts BOS
            positions += range(min(len(piece[0]), room))
        fill = length - len(ids)
        yield {
            "input_ids": torch.tensor(ids + [1] * fill),
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
    """Cross-entropy with a weight per token; logits are computed only where a token counts."""

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = inputs["input_ids"]
        weights = inputs["weights"][:, 1:].flatten()
        counted = weights.nonzero().flatten()
        # The Trainer's own autocast sits on the model's forward, which is not what is called here.
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids, position_ids=inputs["position_ids"], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1].flatten(0, 1)[counted])
        losses = functional.cross_entropy(logits.float(), ids[:, 1:].flatten()[counted], reduction="none")
        return (losses * weights[counted]).sum() / weights.sum()


def warm_up_stay_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Factor of the learning rates: up over the first 2 % of the steps, down to zero over the last DECAY of them."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (DECAY * steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="batches of 4,096 tokens (default %(default)s)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: about 1.4 times faster; needs a compiler"
    )
    options = parser.parse_args()
    data, checkpoint = options.out / "data", options.out / "checkpoint"
    data.mkdir(parents=True, exist_ok=True)
    print(json.dumps(corpus.write(data)))
    tokenizer = train_tokenizer(data)
    model = new_model(options.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    if options.compile:
        model.model.compile(dynamic=False)
    optimizer = TwoOptimizers(model, lr=2e-3, muon_lr=0.01)
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=1,  # an item of the dataset is a batch
        use_cpu=True,
        logging_steps=20,
        save_steps=500,
        save_total_limit=1,
        max_grad_norm=1.0,
        report_to=[],
        remove_unused_columns=False,
        seed=options.seed,
        disable_tqdm=True,
    )
    trainer = WeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=Batches(data, tokenizer, options.seed, options.steps),
        data_collator=lambda batches: batches[0],
        optimizers=(optimizer, warm_up_stay_decay(optimizer, options.steps)),
    )
    trainer.train()
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    history = "".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
    (checkpoint / "training_log.jsonl").write_text(history)


if __name__ == "__main__":
    main()
