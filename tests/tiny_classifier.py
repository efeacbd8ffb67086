"""A classifier and data so small that a whole run of `ivon-lora finetune` takes about a second."""

import csv
import random
from pathlib import Path

import torch

GOOD = ("great", "lovely", "superb", "fine", "moving", "funny", "warm", "clever")
BAD = ("awful", "dull", "poor", "boring", "weak", "ugly", "silly", "flat")
NOUNS = ("film", "plot", "cast", "scene", "story", "ending", "music")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "is", "and", *NOUNS, *GOOD, *BAD)


def make_model(folder: Path) -> Path:
    """A random BERT of two layers and its tokenizer, saved as Hugging Face does."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, initializer_range=0.2, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def make_rows(count: int = 240) -> list[tuple[str, str]]:
    """(text, label) with words that give the label away."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        words, label = (GOOD, "pos") if i % 2 else (BAD, "neg")
        rows.append((f"the {draw.choice(NOUNS)} {i} is {draw.choice(words)} and {draw.choice(words)}", label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]], head: tuple[str, str] = ("text", "label")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return path
