"""Dependencies point one way: a module imports from its own layer of the house or from one below.

Every import counts, also those inside functions.
"""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "v2m"
# Lowest first. What stands in one layer may import each other.
LAYERS = [
    {"errors"},
    {"ops"},
    {"layers"},
    {"models", ""},  # "": the package itself, which offers what the models are
    {"heads"},
    {"data", "engine", "evaluation", "recipes", "visualize", "export"}
    | {"predict", "predict_dense", "drawing"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LEVEL["__init__"] = LEVEL[""]
COMPILERS = {"triton", "numba", "llvmlite", "numpy"}
THIRD_PARTY = {
    "errors": set(),
    "ops": {"torch"} | COMPILERS,
    "layers": {"torch"},
    "models": {"torch", "timm", "safetensors"},
}


def imported(path: Path, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of everything a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package[: len(package) - node.level + 1]
                base = ".".join((*anchor, base) if base else anchor)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def violations(source: Path) -> list[str]:
    problems = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        own = parts[0]
        where = path.relative_to(source).as_posix()
        if own not in LEVEL:
            problems.append(f"{where}: {own!r} has no place among the layers")
            continue
        for line, name in imported(path, ("v2m", *parts[:-1])):
            root, *rest = name.split(".")
            if root == "v2m":
                known = rest and rest[0] in LEVEL
                level = LEVEL[rest[0]] if known else LEVEL[""]
                if level > LEVEL[own]:
                    problems.append(f"{where}:{line}: imports {name}, from a layer above")
            elif own in THIRD_PARTY and root not in sys.stdlib_module_names | THIRD_PARTY[own]:
                problems.append(f"{where}:{line}: imports {root}")
    return problems


def test_the_library_keeps_the_direction():
    assert violations(SOURCE) == []


def test_the_check_sees_the_whole_library():
    seen = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in SOURCE.rglob("*.py")}
    assert {"ops", "layers", "models", "data", "engine", "evaluation", "cli"} <= seen
    names = [name for _, name in imported(SOURCE / "ops" / "core.py", ("v2m", "ops"))]
    assert "v2m.ops.eager" in names
    assert "v2m.ops.backend.choose_backend" in names


@pytest.mark.parametrize(
    ("where", "line", "named"),
    [
        ("ops/core.py", "from v2m.layers import Mixer2d", "v2m.layers.Mixer2d"),
        ("ops/core.py", "from ..models import plain", "v2m.models.plain"),
        ("ops/cpu/core.py", "from ...layers.mixer import Mixer2d", "v2m.layers.mixer.Mixer2d"),
        ("ops/core.py", "import v2m", "v2m"),
        ("errors.py", "from v2m import ops", "v2m.ops"),
        ("errors.py", "import torch", "torch"),
        ("layers/mixer.py", "def f():\n    import v2m.models.plain", "v2m.models.plain"),
        ("layers/mixer.py", "import timm", "timm"),
        ("models/plain.py", "if True:\n    from v2m.engine import trainer", "v2m.engine.trainer"),
        ("models/plain.py", "import torchvision", "torchvision"),
        ("heads/dense.py", "from v2m import data", "v2m.data"),
        ("data/loaders.py", "from v2m.cli import main", "v2m.cli.main"),
        ("engine/trainer.py", "from ..cli.main import main", "v2m.cli.main"),
        ("somewhere/new.py", "import os", "'somewhere' has no place"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, where, line, named):
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n")
    (problem,) = violations(tmp_path)
    assert problem.startswith(where)
    assert named in problem


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("ops/core.py", "from .backend import choose_backend\nfrom v2m.errors import InputError"),
        ("models/plain.py", "from v2m.layers import Block\nimport timm, torch, math"),
        ("engine/trainer.py", "from v2m.evaluation import x\nimport v2m\nimport rich"),
        ("cli/main.py", "from v2m import engine, data\nfrom . import train"),
    ],
)
def test_imports_downwards_are_fine(tmp_path, where, line):
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n")
    assert violations(tmp_path) == []
