"""The default data: film-review sentences with human ratings, and reviews from a shop as the shifted test set.

The ratings are those of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text" (ICWSM 2014). The sentences belong to others, so nothing is shipped with this package: the source distribution of
vaderSentiment 3.3.2, which carries them, is obtained by name with pip at the first use, checked and cached.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from ivon_lora.finetune.corpus import Corpus, Row, build_corpus
from ivon_lora.finetune.errors import InputError
from ivon_lora.finetune.files import replace_file

__all__ = ["cache_folder", "load_reviews", "parse_ratings", "reviews_archive"]

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
INNER_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
MOVIES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SHOP = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
LABELS = ("negative", "positive")
MIN_STRENGTH = 0.5  # sentences rated closer to neutral than this (on a scale from -4 to 4) are left out


def load_reviews() -> Corpus:
    """Film reviews split into train, validation and test, with shop reviews as the shifted test set.

    Raises:
        InputError: if the data is neither cached nor obtainable, or is not the expected file.
    """
    movies, shop = read_ratings(reviews_archive())
    return build_corpus("film reviews (vaderSentiment 3.3.2)", movies, LABELS, shifted=shop)


def cache_folder() -> Path:
    """Where downloads are kept: $IVON_LORA_CACHE, else ivon-lora in the cache folder of the user."""
    chosen = os.environ.get("IVON_LORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ivon-lora"


def reviews_archive() -> Path:
    """Path of the checked archive in the cache; downloads it first if it is not there."""
    path = cache_folder() / ARCHIVE
    if path.is_file():
        if _sha256(path.read_bytes()) == ARCHIVE_SHA256:
            return path
        raise InputError(f"{path} is not the expected file (sha256 differs): delete it and run again")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the cache {path.parent} ({error.strerror}): set IVON_LORA_CACHE") from None
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        downloaded = _download(Path(scratch))
        with replace_file(path) as target:
            shutil.copyfile(downloaded, target)
    return path


def read_ratings(archive: Path) -> tuple[list[Row], list[Row]]:
    """The rated film and shop sentences inside the archive."""
    with tarfile.open(archive) as outer:
        inner = _member(outer, INNER)
    if _sha256(inner) != INNER_SHA256:
        raise InputError(f"{INNER} in {archive} is not the expected file (sha256 differs): delete {archive}, run again")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        return parse_ratings(_member(tar, MOVIES)), parse_ratings(_member(tar, SHOP))


def parse_ratings(raw: bytes) -> list[Row]:
    """Rows of a file of lines `id TAB mean rating TAB text`: label 1 for ratings above 0, weak ratings left out.

    Raises:
        InputError: if a line has not three fields or its rating is not a number.
    """
    rows = []
    for number, line in enumerate(raw.decode("utf-8").split("\n"), start=1):
        line = line.rstrip("\r")
        if not line:
            continue
        fields = line.split("\t")
        try:
            _, rating_text, text = fields
            rating = float(rating_text)
        except ValueError:
            raise InputError(f"line {number} of the ratings is not `id TAB rating TAB text`: {line[:60]!r}") from None
        if abs(rating) >= MIN_STRENGTH:
            rows.append(Row(text, int(rating > 0)))
    return rows


def _download(folder: Path) -> Path:
    """The source distribution, obtained by name with pip into ``folder``."""
    by_hand = (
        f"check the network, or put {ARCHIVE} (the source distribution of {REQUIREMENT}) into {cache_folder()}, "
        "or give your own --data FILE"
    )
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"the default data needs pip, which {sys.executable} does not have: install pip, or {by_hand}")
    requirements = folder / "requirements.txt"
    # pip asks a source distribution for metadata, which runs its setup.py: with a hash, only the file we know
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-input"]
    command += ["--no-deps", "--no-binary", "vaderSentiment", "--require-hashes", "-r", str(requirements)]
    command += ["--dest", str(folder)]
    # the setuptools at hand spares fetching one; where there is none, pip gets it for itself
    tries = [["--no-build-isolation"]] if importlib.util.find_spec("setuptools") else []
    reason = ""
    for extra in [*tries, []]:
        done = subprocess.run([*command, *extra], capture_output=True, text=True)
        found = folder / ARCHIVE
        if done.returncode == 0 and found.is_file() and _sha256(found.read_bytes()) == ARCHIVE_SHA256:
            return found
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            f"status {done.returncode}"
        ]
        reason = errors[0].removeprefix("ERROR:").strip()[:160]
    raise InputError(f"pip could not get the default data ({reason}): {by_hand}")


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise InputError(f"{name} in the archive of the default data is not a file: delete {cache_folder()}, run again")
    return file.read()


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
