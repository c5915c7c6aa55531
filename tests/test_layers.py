"""The layout of the design: who may import whom, how long a file may be, what may load at import time."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ternlm"
MAX_LINES = 400

# What each package may import from ternlm, beside itself. `cli` may import everything, inside functions.
ALLOWED = {
    "config": "",
    "ops": "",
    "planner": "config",
    "data": "config",
    "agent": "config",
    "convert": "config ops data model",
    "model": "config ops",
    "parallel": "config ops",
    "optim": "config parallel",
    "checkpoint": "config parallel",
    "web": "",
    "monitor": "config planner parallel",
    "train": "config planner ops data model parallel optim checkpoint convert monitor",
    "infer": "config ops data model parallel convert",
    "eval": "config data infer",
    "serve": "config data infer",
    "post": "config ops data model parallel convert train infer",
}
FREE_OF_TORCH = ("config", "planner", "agent", "web")
VAGUE_NAMES = {"utils", "util", "common", "core", "base", "misc", "helpers"}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Yield every absolute module name imported, and whether that happens inside a function."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it out"
            yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(ast.parse(source), False)


def faults(package: str, source: str) -> list[str]:
    """Return the imports of `source`, a file of `package`, that the design forbids."""
    found = []
    for name, inside in imports(source):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if package == "cli":
            heavy = top in ("torch", "numpy", "tokenizers", "pydantic")
            if not inside and (heavy or (top == "ternlm" and target not in ("cli", "__version__"))):
                found.append(f"{name} outside a function")
        elif top == "torch":
            if package in FREE_OF_TORCH:
                found.append(f"{name}: {package} is free of torch")
            if package == "model" and name.startswith("torch.distributed"):
                found.append(f"{name}: model knows nothing of distribution")
        elif top == "ternlm" and target not in ("", package, "__version__", *ALLOWED[package].split()):
            found.append(f"{name}: {package} may import {ALLOWED[package] or 'nothing of ternlm'}")
    return found


def package_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON = [f for top in ("ternlm", "tests", "examples", "benchmarks") for f in sorted((ROOT / top).rglob("*.py"))]


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_follow_the_table(file: Path) -> None:
    package = package_of(file)
    if package not in ("__init__", "__main__"):
        assert faults(package, file.read_text(encoding="utf-8")) == []


def test_each_package_stands_in_the_table() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*ALLOWED, "cli"}


def test_the_table_has_no_cycle() -> None:
    left = {package: set(allowed.split()) for package, allowed in ALLOWED.items()}
    while free := [package for package, needs in left.items() if not needs & left.keys()]:
        for package in free:
            del left[package]
    assert left == {}


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("data", "import ternlm.train"),
        ("data", "from ternlm import train"),
        ("data", "def f():\n    from ternlm.train.loop import x"),
        ("ops", "from ternlm.config import Config"),
        ("config", "def f():\n    import torch"),
        ("planner", "from torch import nn"),
        ("model", "import torch.distributed as dist"),
        ("model", "from torch import distributed"),
        ("cli", "import torch"),
        ("cli", "from ternlm.config import load_config"),
    ],
)
def test_a_forbidden_import_is_found(package: str, source: str) -> None:
    assert len(faults(package, source)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("train", "from ternlm.model.decoder import build_model"),
        ("model", "import torch"),
        ("cli", "def f():\n    from ternlm.train.pretrain import pretrain"),
        ("config", "from ternlm.config.section import Section"),
    ],
)
def test_an_allowed_import_is_left_alone(package: str, source: str) -> None:
    assert faults(package, source) == []


@pytest.mark.parametrize("file", PYTHON, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_file_is_too_long(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [f for f in SOURCES if VAGUE_NAMES & {part.removesuffix(".py") for part in f.relative_to(ROOT).parts}] == []


@pytest.mark.parametrize(
    "module",
    ["ternlm", "ternlm.config", "ternlm.planner", "ternlm.cli", "ternlm.checkpoint.folders", "ternlm.serve.address"],
)
def test_importing_leaves_heavy_modules_unloaded(module: str) -> None:
    heavy = {"torch", "tokenizers", "transformers", *(["numpy"] if module != "ternlm.planner" else [])}
    code = f"import sys, {module}; print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
