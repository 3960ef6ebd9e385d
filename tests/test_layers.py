"""The import directions of the architecture, and what no module of it may do.

    orchestrator -> clients -> strategies          storage stands alone

Read from the source with ``ast``: a module that is imported lazily, under ``TYPE_CHECKING`` or by
a literal name counts like any other.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("orchestrator", "clients", "strategies", "storage")

ALLOWED = {"strategies": sys.stdlib_module_names | {"torch", "strategies"}}
FORBIDDEN = {
    "storage": {"ray", "flwr", "opacus", "peft", "transformers"}
    | {"clients", "strategies", "orchestrator"},
    "clients": {"ray", "sqlalchemy", "alembic", "storage", "orchestrator"},
}
CONFINED = {
    "flwr": {
        "orchestrator.backends.superlink",
        "orchestrator.flower_app",
        "orchestrator.flower_strategy",
        "clients.flower",
        "clients.flower_messages",
        "clients.flower_runtime",
        "clients.flower_site",
        "clients.flower_supernode",
    }
}
"""Libraries whose internals stay in one place."""

JUNK_DRAWERS = {"common", "core", "helper", "helpers", "misc", "util", "utils"}
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE = {
    "torch.load": "runs what a file says; read safetensors",
    "torch.save": "writes pickle; write safetensors",
    "ray.cloudpickle": "is pickle",
    "pandas.read_pickle": "is pickle",
    "yaml.load": "makes any object; use yaml.safe_load",
    "yaml.load_all": "makes any object; use yaml.safe_load_all",
    "yaml.full_load": "makes objects; use yaml.safe_load",
    "yaml.unsafe_load": "makes any object; use yaml.safe_load",
    "builtins.eval": "runs a string",
    "builtins.exec": "runs a string",
}


def imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the full dotted name of everything that ``module`` imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # relative to the package; `module` of a package's __init__ ends in .__init__
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def wrong_imports(source: str, module: str) -> list[str]:
    """Return a sentence for each import that the architecture does not allow ``module``."""
    layer = module.split(".")[0]
    found = []
    for line, name in imports(ast.parse(source), module):
        top = name.split(".")[0]
        if layer in ALLOWED and top not in ALLOWED[layer]:
            found.append(f"{module}:{line} imports {name}: {layer} is torch and the stdlib only")
        if top in FORBIDDEN.get(layer, ()):
            found.append(f"{module}:{line} imports {name}: not in {layer}")
        if top in CONFINED and module not in CONFINED[top]:
            found.append(f"{module}:{line} imports {name}: only in {', '.join(CONFINED[top])}")
        if top in PICKLERS:
            found.append(f"{module}:{line} imports {name}: unpickling runs what a file says")
    return found


def unsafe_calls(source: str, module: str) -> list[str]:
    """Return a sentence for each use of a function that runs what it reads."""
    tree = ast.parse(source)
    names = {"eval": "builtins.eval", "exec": "builtins.exec"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in ast.walk(tree):
        used = resolved(node, names)
        if used in UNSAFE:
            found.append(f"{module}:{node.lineno} uses {used}, which {UNSAFE[used]}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(f"{module}:{node.value.lineno} mentions allow_pickle")
    return found


def resolved(node: ast.AST, names: dict[str, str]) -> str:
    """Return the full dotted name that a name or attribute expression stands for, or ''."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        base = resolved(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def modules(package: str) -> dict[str, Path]:
    """Return the files of a package by dotted name (a package's own ends in ``__init__``)."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted((ROOT / package).rglob("*.py"))
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    files = modules(package)
    assert files
    found = [w for m, path in files.items() for w in wrong_imports(path.read_text("utf-8"), m)]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_runs_what_it_reads(package: str) -> None:
    files = modules(package)
    found = [u for m, path in files.items() for u in unsafe_calls(path.read_text("utf-8"), m)]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_a_junk_drawer(package: str) -> None:
    found = [name for name in modules(package) if JUNK_DRAWERS & set(name.split("."))]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("strategies.fedavg", "import numpy"),
        ("strategies.fedavg", "from clients.assignment import Assignment"),
        ("strategies.merges.ties", "from ...storage import store"),
        ("storage.store", "import strategies.base"),
        ("storage.store", "def f():\n    from ray import get"),
        ("storage.store", "if TYPE_CHECKING:\n    import transformers as tf"),
        ("clients.trainer", "from storage.store import AdapterStore"),
        ("clients.trainer", "import importlib\nimportlib.import_module('ray')"),
        ("clients.adapters.__init__", "from ..ray import x\nfrom sqlalchemy.orm import Session"),
        ("clients.trainer", "import flwr"),
        ("orchestrator.federation", "from flwr.app import Message"),
        ("orchestrator.federation", "import cloudpickle"),
        ("orchestrator.federation", "__import__('pickle')"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(wrong_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("strategies.fedavg", "import math\nimport torch.nn.functional as F\nfrom . import base"),
        ("strategies.merges.__init__", "from ..plugins import Family"),
        ("strategies.merges.ties", "from ..tensors import norm\nfrom . import svd"),
        ("storage.store", "import sqlalchemy\nfrom torch import Tensor"),
        ("clients.flower", "import flwr\nfrom strategies.base import Update"),
        ("orchestrator.backends.ray", "import ray\nfrom storage.store import AdapterStore"),
        ("orchestrator.backends.superlink", "from flwr.app import Message"),
    ],
)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    assert wrong_imports(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load as read\nread('x')",
        "import torch.nn\ntorch.save({}, 'x')",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "eval('1 + 1')",
        "run = exec",
        "import builtins\nbuiltins.eval('1')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "from ray import cloudpickle\ncloudpickle",
    ],
)
def test_an_unsafe_call_is_found(source: str) -> None:
    assert len(unsafe_calls(source, "orchestrator.cli")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import yaml\nyaml.safe_load(text)",
        "from safetensors.torch import load\nload(data)",
        "session.exec(query)",
        "def load(path): ...\nload('x')",
    ],
)
def test_a_safe_call_is_let_through(source: str) -> None:
    assert unsafe_calls(source, "orchestrator.cli") == []
