"""The default data: film-review sentences with human ratings, and reviews from a shop as the shifted test set.

The ratings are those of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text" (ICWSM 2014). The sentences belong to others, so nothing is shipped with this package: the source distribution of
vaderSentiment 3.3.2, which carries them, is obtained by name with pip at the first use, checked and cached.
"""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import pandas as pd

from ivon_lora.cli.packages import package_file

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
MIN_STRENGTH = 0.5  # sentences rated closer to neutral than this (on a scale from -4 to 4) are left out


def film_reviews() -> tuple[pd.DataFrame, ...]:
    """Film reviews and shop reviews: columns ``text`` and ``label``, 1 for positive. InputError if not obtainable."""
    archive = _member(
        reviews_archive().read_bytes(), "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    )
    names = ("movieReviewSnippets_GroundTruth.txt", "amazonReviewSnippets_GroundTruth.txt")
    return tuple(read_ratings(_member(archive, f"hutto_ICWSM_2014/{name}")) for name in names)


def read_ratings(raw: bytes) -> pd.DataFrame:
    """Texts and labels from lines ``id TAB mean rating TAB text``: label 1 for ratings above 0, weak ones left out."""
    names = ["id", "rating", "text"]
    table = pd.read_csv(io.BytesIO(raw), sep="\t", names=names, quoting=csv.QUOTE_NONE, keep_default_na=False)
    strong = table[table["rating"].abs() >= MIN_STRENGTH]
    return pd.DataFrame({"text": strong["text"], "label": (strong["rating"] > 0).astype(int)})


def reviews_archive() -> Path:
    """Path of the checked archive in the cache. InputError if it cannot be obtained."""
    return package_file(REQUIREMENT, ARCHIVE, ARCHIVE_SHA256, "the default data", "--data FILE")


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        assert file is not None, f"{name} is not a file"
        return file.read()
