"""Docstrings of the packages that weft depends on, parsed with :mod:`ast`: nothing is imported.

What a data set makes of them depends on the packages' versions and on nothing else. Parsing takes
seconds, so the rows are kept in the user's cache folder.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

CLIENTS = (
    "huggingface_hub",
    "networkx",
    "numpy",
    "peft",
    "scipy",
    "torch",
    "transformers",
)
OPTIONS: Mapping[str, tuple[str, ...]] = {"split": ("train", "test"), "client": CLIENTS}
R = TypeVar("R", bound=Mapping[str, Any])
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "_vendor", "vendored"})


def is_test(client: str, file: str) -> bool:
    """Return whether a file's rows are for testing: of a fifth of the files, by their names."""
    return _place(client, file)[-1] % 5 == 0


def _place(client: str, file: str) -> bytes:
    """Return a hash of a file's name, which decides its split and when it is read."""
    return hashlib.sha256(f"{client}/{file}".encode()).digest()


def files_of(client: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each source file of an installed package with the docstrings of its documented parts.

    In an order that is always the same; nothing if the package is not installed.
    """
    spec = importlib.util.find_spec(client)  # a top-level name: finding it imports nothing
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(spec.submodule_search_locations[0])
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    files = [name.as_posix() for name in names if _SKIPPED_FOLDERS.isdisjoint(name.parts)]
    for file in sorted(files, key=lambda file: _place(client, file)):
        yield file, list(_documented(root / file))


def _documented(path: Path) -> Iterator[str]:
    source = path.read_bytes()
    if not re.search(rb"Args:|Arguments:|Parameters", source):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    yield from _docstrings(tree)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings below ``node``; looks at statements only, which are few."""
    for child in [*getattr(node, "body", ()), *getattr(node, "orelse", ())]:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(child) or ""
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            # numpy and torch document what is compiled by a call: add_newdoc(…, """…""")
            for part in ast.walk(child.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield inspect.cleandoc(part.value)
        yield from _docstrings(child)


_NUMPY_SECTION = re.compile(
    r"^(?:Other )?Parameters\n-{3,}\n(.*?)(?=^\w[\w ]*\n-{3,}|\Z)", re.DOTALL | re.MULTILINE
)
_NUMPY_ENTRY = re.compile(r"^(\*{0,2}\w[\w, *]*?) ?: ?(.+)$")
_GOOGLE_SECTION = re.compile(
    r"^( *)(?:Args|Arguments|Parameters|Params|Keyword args|Keyword arguments):? *\n"
    r"(.*?)(?=\n\1\S|\Z)",
    re.DOTALL | re.MULTILINE,
)
_GOOGLE_ENTRY = re.compile(r"^ *[`*]{0,2}(\w+)[`*]{0,2} ?\(([^()]*(?:\([^()]*\)[^()]*)*)\) ?:(.*)$")


def numpydoc(docstring: str) -> Iterator[tuple[str, str, str]]:
    """Yield the parameters of a docstring in numpy's style: ``x : int`` over an indented text."""
    for section in _NUMPY_SECTION.finditer(docstring):
        entry: tuple[str, str] | None = None
        lines: list[str] = []
        for line in [*section[1].split("\n"), "end : end"]:
            head = _NUMPY_ENTRY.match(line)
            if head:
                if entry:
                    yield *entry, " ".join(lines)
                entry, lines = (head[1], head[2]), []
            else:
                lines.append(line.strip())


def googledoc(docstring: str) -> Iterator[tuple[str, str, str]]:
    """Yield the parameters of a docstring in Google's style: ``x (int): text``."""
    for section in _GOOGLE_SECTION.finditer(docstring):
        entry: tuple[str, str] | None = None
        lines: list[str] = []
        for line in [*section[2].split("\n"), "end (end):"]:
            head = _GOOGLE_ENTRY.match(line)
            if head:
                if entry:
                    yield *entry, " ".join(lines)
                entry, lines = (head[1], head[2]), [head[3].strip()]
            else:
                lines.append(line.strip())


def chosen(load: Callable[[], Mapping[str, list[R]]], split: str, client: str | None) -> list[R]:
    """Return the rows of a split, of one client or of all.

    Args:
        load: returns all rows by split.
        split: of :data:`OPTIONS`.
        client: likewise; None for all.

    Raises:
        ValueError: if there is no such split or client.
    """
    for name, value in (("split", split), ("client", client or CLIENTS[0])):
        if value not in OPTIONS[name]:
            raise ValueError(f"{name} must be one of {', '.join(OPTIONS[name])}, got {value!r}")
    return [row for row in load()[split] if client is None or row["client"] == client]


def kept(file: Path | None, make: Callable[[], dict[str, list[R]]]) -> dict[str, list[R]]:
    """Return the rows that are kept in ``file``; else those that ``make`` returns, kept there now.

    Args:
        file: see :func:`cache_file`; None keeps none.
        make: returns the rows by split.
    """
    found: dict[str, list[R]] | None = read_cache(file) if file else None
    if found is None:
        found = make()
        if file:
            write_cache(file, found)
    return found


def by_split(found: Sequence[R], same: Callable[[R], str]) -> dict[str, list[R]]:
    """Return rows by split: a fifth of the files is test, minus what training contains.

    Args:
        found: rows, with their ``client`` and ``file``.
        same: what two rows have in common that are the same but for where they stand.
    """
    train = [row for row in found if not is_test(row["client"], row["file"])]
    known = {same(row) for row in train}
    test = []
    for row in found:
        if is_test(row["client"], row["file"]) and same(row) not in known:
            known.add(same(row))
            test.append(row)
    return {"train": train, "test": test}


def cache_file(name: str, code: str) -> Path | None:
    """Return where the rows of a data set are kept; None without a home.

    Args:
        name: the data set's.
        code: the file that makes it of docstrings; rows of other code are others.
    """
    versions = {}
    for client in CLIENTS:
        with suppress(PackageNotFoundError):
            versions[client] = version(client)
    made_by = Path(code).read_bytes() + Path(__file__).read_bytes()
    state = json.dumps(versions).encode() + made_by
    key = hashlib.sha256(state).hexdigest()[:16]
    folder = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(folder) if Path(folder).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    return base / "weft" / f"{name}-{key}.json"


def read_cache(file: Path) -> Any:
    """Return what :func:`write_cache` wrote, or None if it is absent or damaged."""
    try:
        digest, _, body = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    return json.loads(body)


def write_cache(file: Path, found: Any) -> None:
    """Keep the rows: whole or not at all, and not at all where the folder cannot be written."""
    body = json.dumps(found).encode()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            Path(name).replace(file)
        except OSError:
            Path(name).unlink(missing_ok=True)
