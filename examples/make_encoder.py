"""Makes what examples/encoder.toml starts from, offline: a small random BERT and a table of sentences with labels.

The sentences are the first ones of the docstrings of four libraries of the running Python, so the label is which of
the four. Usage: python examples/make_encoder.py FOLDER
"""

import argparse
import csv
import random
import shutil
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel

from slmdeploy import corpus

LIBRARIES = 4
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def sentences() -> list[tuple[str, str]]:
    """A sentence and its library, of the four with the most documented symbols, in a seeded order."""
    found = {
        (symbol.summary, symbol.module.split(".")[0])
        for module, text in corpus.sources(corpus.library_root())
        for symbol in corpus.symbols(module, text)
    }
    counts = Counter(library for _, library in found)
    chosen = {library for library, _ in counts.most_common(LIBRARIES)}
    kept = sorted(pair for pair in found if pair[1] in chosen)
    random.Random(0).shuffle(kept)
    return kept


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """WordPiece over the texts, lower case, [CLS] a [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))],
    )
    return tokenizer


def main() -> None:
    """Write FOLDER/bert, FOLDER/sentences.csv and a copy of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    (folder / "bert").mkdir(parents=True, exist_ok=True)
    pairs = sentences()
    with (folder / "sentences.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sentence", "library"), *pairs])
    tokenizer = make_tokenizer([text for text, _ in pairs])
    tokenizer.save(str(folder / "bert" / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder / "bert")
    shutil.copyfile(Path(__file__).with_name("encoder.toml"), folder / "encoder.toml")
    print(f"{len(pairs)} sentences of {LIBRARIES} libraries and a BERT of 3 layers in {folder}")


if __name__ == "__main__":
    main()
