"""Imports point down the layers, and Ray and HTTP stay at the edges."""

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import specdecode

ROOT = Path(__file__).parent.parent
LAYERS = {
    "specdecode.errors": 0,
    "specdecode.chance": 1,
    "specdecode.config": 1,
    "specdecode.embedded": 1,
    "specdecode.log": 1,
    "specdecode.parts": 1,
    "specdecode.rows": 1,
    "specdecode.text": 2,
    "specdecode.vocabulary": 3,
    "specdecode.backends": 3,
    "specdecode.grammar": 4,
    "specdecode.decoding": 5,
    "specdecode.exchange": 6,
    "specdecode.training": 7,
    "specdecode.routing": 7,
    "specdecode": 7,  # the public names, in specdecode/__init__.py alone
    "specdecode.evaluation": 8,
    "specdecode.commands": 9,
    "serve": 9,
    "specdecode.cli": 10,
    "jobs": 10,
}
EDGE_ONLY = {"ray", "fastapi", "starlette", "uvicorn"}
MODULES = sorted(path for folder in ("specdecode", "serve", "jobs") for path in (ROOT / folder).rglob("*.py"))


def layer(module: str) -> str | None:
    """The longest entry of the layers that the module's name begins with; None for what is not ours."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in LAYERS), None)


def imports(tree: ast.AST) -> Iterator[str]:
    """All that is imported, at the top and inside functions, as module.name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lazy_imports(tree: ast.AST) -> set[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {name for function in functions for name in imports(function)}


def violations(module: str, source: str) -> list[str]:
    """The imports of a module that it may not have."""
    tree, own, found = ast.parse(source), layer(module), []
    at_top = set(imports(tree)) - lazy_imports(tree)
    for name in imports(tree):
        other = layer(name)
        if own == "specdecode.commands" and other in ("serve", "jobs") and name not in at_top:
            continue
        if other is None:
            is_allowed = name.split(".")[0] not in EDGE_ONLY or own in ("serve", "jobs")
        else:
            is_allowed = other == own or LAYERS[other] < LAYERS[own]
        if not is_allowed:
            found.append(name)
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


def test_every_module_belongs_to_a_layer():
    assert len(MODULES) > 30
    assert [path for path in MODULES if layer(module_name(path)) == "specdecode"] == [ROOT / "specdecode/__init__.py"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdecode.backends.table", "from specdecode.decoding.loop import step"),
        ("specdecode.decoding.loop", "import specdecode.training.losses"),
        ("specdecode.decoding.loop", "from specdecode import training"),
        ("specdecode.decoding.loop", "from specdecode import generate"),
        ("specdecode.training.draft", "from specdecode.evaluation.analysis import summarise"),
        ("specdecode.training.draft", "def train():\n    import ray"),
        ("specdecode.text", "from fastapi import FastAPI"),
        ("specdecode.config", "from specdecode.text import Tokenizer"),
        ("specdecode.commands.serve", "from serve.local import deployed"),
        ("specdecode.commands.serve", "def run():\n    import ray"),
        ("specdecode.routing.router", "def run():\n    from serve.app import build"),
        ("serve.app", "from jobs import train_draft"),
        ("serve.local", "from jobs.drills import run_drills"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdecode.commands.serve", "def serve():\n    from serve.local import deployed"),
        ("specdecode.decoding.loop", "from specdecode.decoding.drafters import Drafter\nimport torch"),
        ("serve.app", "import ray\nfrom specdecode import generate"),
        ("jobs.drills", "from serve.app import wire"),
        ("jobs.benchmark", "from ray import data\nfrom specdecode.evaluation.analysis import summarise"),
    ],
)
def test_an_import_that_points_down_is_fine(module, source):
    assert violations(module, source) == []


@pytest.mark.parametrize("module", ["jobs.benchmark", "jobs.drills", "jobs.train_draft", "serve.ladder"])
def test_rays_mode_is_set_before_ray_is_imported(module: str) -> None:
    script = (
        "import importlib, os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'ray':\n"
        "            print(os.environ.get('RAY_AUTH_MODE'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"importlib.import_module({module!r})\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) <= {"token"}


# Each is a process that starts before anyone is served, and after each failure; these packages take it seconds.
@pytest.mark.parametrize("module", ["serve.router", "serve.target", "serve.draft", "specdecode.cli"])
def test_processes_without_a_model_import_none(module: str) -> None:
    script = f"import sys, {module}; print(*sys.modules.keys() & {{'accelerate', 'torch._dynamo', 'sentence_transformers'}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_the_command_line_asks_for_torch_only_when_it_decodes() -> None:
    script = "import sys, specdecode.cli; print(*sys.modules.keys() & {'torch', 'transformers', 'ray'})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_every_public_name_is_there() -> None:
    tree = ast.parse((ROOT / "specdecode/__init__.py").read_text(encoding="utf-8"))
    shown = {alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(specdecode.__all__) == specdecode._HOMES.keys() == shown.keys() - {"TYPE_CHECKING", "Any"}
    for name in specdecode.__all__:
        assert shown[name] == specdecode._HOMES[name]
        assert getattr(specdecode, name) is getattr(importlib.import_module(shown[name]), name)
        assert name in dir(specdecode)
    with pytest.raises(AttributeError, match="module 'specdecode' has no attribute 'speculate'"):
        _ = specdecode.speculate
