"""However the package gets onto a machine, `ivon_lora.kernels` comes with it and nobody else's `kernels` is hidden."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ivon_lora import __version__

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {path.name for path in (ROOT / "kernels").glob("*.py")}
IMPORT = "import ivon_lora.kernels.noise as m; print(m.__file__)"


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Run a command and return its output; `path` becomes PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "TRITON_INTERPRET"}}
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a package is built from, so that building leaves nothing behind here."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ["pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "dev"]:
        shutil.copy2(ROOT / name, copy / name)
    for name in ["ivon_lora", "kernels", "tests"]:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, cwd=checkout)
    (path,) = out.glob("*.whl")
    return path


def test_the_kernels_folder_is_no_package_and_the_package_links_to_it() -> None:
    """With an `__init__.py` the folder hides Hugging Face's package `kernels`, which breaks `import transformers`."""
    assert KERNELS
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "ivon_lora" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"


def test_a_wheel_holds_the_package_its_kernels_its_type_marker_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"ivon_lora/__init__.py", "ivon_lora/py.typed"} <= set(names)
    assert {f"ivon_lora/kernels/{name}" for name in KERNELS} <= set(names)
    assert {name.split("/")[0] for name in names} == {"ivon_lora", f"ivon_lora-{__version__}.dist-info"}


def test_an_sdist_builds_the_same_wheel(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", tmp_path, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, cwd=source)
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as two:
        assert {i.filename: i.CRC for i in one.infolist()} == {i.filename: i.CRC for i in two.infolist()}


def test_an_editable_install_serves_the_kernels(checkout: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # What is installed here (torch, hatchling) is visible there, after the editable install: .pth files go by name.
    (site / "zz_outer.pth").write_text(sysconfig.get_paths()["purelib"])
    options = ["--no-deps", "--no-build-isolation", "--editable"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, checkout, cwd=tmp_path)
    assert Path(run(python, "-c", IMPORT, cwd=tmp_path).strip()).is_relative_to(checkout)
