"""Every public name says what it is, and every plug-in says where it comes from."""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.adapters import ADAPTERS
from clients.optimizers import OPTIMIZERS
from clients.regularizers import REGULARIZERS
from strategies import STRATEGIES
from strategies.encodings import ENCODINGS
from strategies.merges import MERGES
from strategies.plugins import Family, Plugin

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    path
    for package in ("orchestrator", "clients", "strategies", "storage")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "migrations" not in path.parts
]
FAMILIES = (STRATEGIES, ENCODINGS, MERGES, ADAPTERS, REGULARIZERS, OPTIMIZERS)
ARXIV = re.compile(r"\d{4}\.\d{4,5}")

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Documented]]:
    """Yield the public classes, functions and methods of a module with their dotted names."""
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorators = {ast.unparse(d).rpartition(".")[2] for d in child.decorator_list}
        if child.name.startswith("_") or decorators & {"overload", "override", "setter"}:
            continue
        yield f"{prefix}{child.name}", child
        if isinstance(child, ast.ClassDef):
            yield from public(child, f"{prefix}{child.name}.")


def silent(source: str) -> list[str]:
    """Return the public names of a module that have no docstring, or an empty one."""
    tree = ast.parse(source)
    names: list[tuple[str, Documented]] = [("the module", tree), *public(tree)]
    return [n for n, node in names if not (ast.get_docstring(node) or "").partition("\n")[0]]


def unsourced(plugin: Plugin, text: str) -> bool:
    """Return whether neither the plug-in nor its module's text says where the method is from."""
    return not (plugin.source or ARXIV.search(text) or "no paper" in text.lower())


def module_text(plugin: Plugin) -> str:
    module = inspect.getmodule(inspect.unwrap(plugin.factory))
    assert module, f"{plugin.kind} {plugin.name} is not from a module"
    return f"{sys.modules[module.__name__].__doc__ or ''}\n{plugin.factory.__doc__ or ''}"


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_every_public_name_has_a_docstring(path: Path) -> None:
    assert silent(path.read_text("utf-8")) == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
def test_every_plugin_has_a_summary_of_one_line(family: Family) -> None:
    summaries = {name: family.get(name).summary for name in family.names()}
    assert summaries
    wrong = {n: s for n, s in summaries.items() if not 0 < len(s) <= 100 or "\n" in s}
    assert wrong == {}


@pytest.mark.parametrize(
    "family", [STRATEGIES, ENCODINGS, MERGES, REGULARIZERS], ids=lambda f: f.kind
)
def test_every_method_names_its_source(family: Family) -> None:
    plugins = [family.get(name) for name in family.names()]
    assert [p.name for p in plugins if unsourced(p, module_text(p))] == []


def test_a_name_without_a_docstring_is_found() -> None:
    source = '''"""A module."""
class Loud:
    """A class."""
    def said(self):
        """Do."""
    def unsaid(self): ...
    def _private(self): ...
    class Inner: ...
def helper():
    """Help."""
    def local(): ...
@overload
def many(): ...
async def later(): ...
'''
    assert silent(source) == ["Loud.unsaid", "Loud.Inner", "later"]
    assert silent("x = 1") == ["the module"]


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("2505.12805", "", False),
        ("", "After arXiv 2306.01708.", False),
        ("", "The plain mean; no paper.", False),
        ("", "Something from somewhere.", True),
    ],
)
def test_a_method_without_a_source_is_found(source: str, text: str, expected: bool) -> None:
    plugin = Plugin("merge", "x", factory=dict, summary="X.", source=source)
    assert unsourced(plugin, text) is expected
