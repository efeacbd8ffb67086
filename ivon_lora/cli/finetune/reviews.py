"""The default data: film-review sentences with human ratings, and reviews from a shop as the shifted test set.

The ratings are those of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text" (ICWSM 2014). The sentences belong to others, so nothing is shipped with this package: the source distribution of
vaderSentiment 3.3.2, which carries them, is obtained by name with pip at the first use, checked and cached.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pandas as pd

from ivon_lora.cli.errors import InputError

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = ("movieReviewSnippets_GroundTruth.txt", "amazonReviewSnippets_GroundTruth.txt")
MIN_STRENGTH = 0.5  # sentences rated closer to neutral than this (on a scale from -4 to 4) are left out


def film_reviews() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Film reviews and shop reviews: columns ``text`` and ``label``, 1 for positive. InputError if not obtainable."""
    inner = _member(reviews_archive().read_bytes(), INNER)
    films, shop = (read_ratings(_member(inner, f"hutto_ICWSM_2014/{name}")) for name in FILES)
    return films, shop


def read_ratings(raw: bytes) -> pd.DataFrame:
    """Texts and labels from lines ``id TAB mean rating TAB text``: label 1 for ratings above 0, weak ones left out."""
    names = ["id", "rating", "text"]
    table = pd.read_csv(io.BytesIO(raw), sep="\t", names=names, quoting=csv.QUOTE_NONE, keep_default_na=False)
    strong = table[table["rating"].abs() >= MIN_STRENGTH]
    return pd.DataFrame({"text": strong["text"], "label": (strong["rating"] > 0).astype(int)})


def reviews_archive() -> Path:
    """Path of the checked archive in the cache: $IVON_LORA_CACHE, else ivon-lora in the cache folder of the user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("IVON_LORA_CACHE") or cache / "ivon-lora").expanduser() / ARCHIVE
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create the cache {path.parent} ({error.strerror}): set IVON_LORA_CACHE") from None
        _download(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise InputError(f"{path} is not the expected file (sha256 differs): delete it and run again")
    return path


def _download(path: Path) -> None:
    """The source distribution, obtained by name with pip."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirements = Path(folder, "requirements.txt")
        # pip asks a source distribution for metadata, which runs its setup.py: with a hash, only the file we know
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-input"]
        command += ["--no-deps", "--no-binary", "vaderSentiment", "--require-hashes", "-r", str(requirements)]
        if importlib.util.find_spec("setuptools"):  # what is at hand spares fetching it
            command += ["--no-build-isolation"]
        done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True)
        if done.returncode == 0:
            Path(folder, ARCHIVE).replace(path)
            return
    reason = next((line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line), "no reason")
    raise InputError(
        f"pip could not get the default data ({reason[:160]}): check the network, or put {ARCHIVE} (the source "
        f"distribution of {REQUIREMENT}) into {path.parent}, or give your own --data FILE"
    )


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        assert file is not None, f"{name} is not a file"
        return file.read()
