"""Parameter types: read what a function parameter is for, predict its documented type.

``verbose: whether to print progress`` is a ``bool``. The rows are parsed with :mod:`ast` from the
docstrings of packages that weft depends on: nothing is downloaded, imported or executed. A client
is a library, so the clients differ as real ones do: in vocabulary, in habits, in which types they
use.

Honesty of the task:

- Train and test share no source file, and a description that occurs anywhere in training is not
  tested, whatever the parameter is called.
- The text does not spell the answer: the type, a stated default (``defaults to False``) and a
  leading type (``list of``) are cut from the description. What remains is what a person would
  write, which may still say much (``whether to …``).
- A parameter that takes several of the types (``int or list of int``) has no one answer and is left
  out.

The rows depend on the packages' versions and on nothing else. Parsing takes seconds, so the rows
are kept in the user's cache folder.
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
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, TypedDict

LABELS = ("int", "float", "bool", "str", "array", "callable", "sequence", "mapping")
CLIENTS = (
    "huggingface_hub",
    "networkx",
    "numpy",
    "peft",
    "scipy",
    "torch",
    "transformers",
)
OPTIONS = {"split": ("train", "test"), "client": CLIENTS}

_MAX_ROWS = 1500  # of one client, both splits together: no library drowns the others
_MAX_CHARS = 300
_MIN_CHARS = 15
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "_vendor", "vendored"})


class Row(TypedDict):
    """One labelled parameter: ``label`` is one of LABELS, ``file`` relative to the package."""

    text: str
    label: str
    client: str
    file: str


def rows(split: Literal["train", "test"] = "train", client: str | None = None) -> list[Row]:
    """Return the rows of a split, of one client or of all, in an order that is always the same.

    Raises:
        ValueError: if there is no such split or client.
    """
    for name, value in (("split", split), ("client", client or CLIENTS[0])):
        if value not in OPTIONS[name]:
            raise ValueError(f"{name} must be one of {', '.join(OPTIONS[name])}, got {value!r}")
    found = _load()[split]
    return [row for row in found if client is None or row["client"] == client]


@lru_cache(maxsize=1)
def _load() -> dict[str, list[Row]]:
    """Return the rows by split, from the cache where it has them."""
    file = _cache_file()
    cached = _read_cache(file) if file else None
    if cached is None:
        cached = _split([row for client in CLIENTS for row in _parse_package(client)])
        if file:
            _write_cache(file, cached)
    return cached


def _split(found: list[Row]) -> dict[str, list[Row]]:
    """Return ``found`` by split: a fifth of the files is test, minus what training contains."""
    train = [row for row in found if not _is_test(row)]
    known = {_description(row) for row in train}
    test = []
    for row in found:
        if _is_test(row) and _description(row) not in known:
            known.add(_description(row))
            test.append(row)
    return {"train": train, "test": test}


def _description(row: Row) -> str:
    return row["text"].partition(": ")[2].lower()


def _is_test(row: Row) -> bool:
    return _place(row["client"], row["file"])[-1] % 5 == 0


def _place(client: str, file: str) -> bytes:
    """Return a hash of a file's name, which decides its split and when it is read."""
    return hashlib.sha256(f"{client}/{file}".encode()).digest()


# --- packages to docstrings ------------------------------------------------------------------


def _parse_package(client: str) -> list[Row]:
    """Return at most ``_MAX_ROWS`` rows of an installed package; none if it is not installed."""
    spec = importlib.util.find_spec(client)  # a top-level name: finding it imports nothing
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(spec.submodule_search_locations[0])
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    files = [name.as_posix() for name in names if _SKIPPED_FOLDERS.isdisjoint(name.parts)]
    found: dict[str, Row] = {}
    for file in sorted(files, key=lambda file: _place(client, file)):
        for name, kind, description in _parameters(root / file):
            label, text = label_of(kind), clean(name, description)
            if label and text:
                found.setdefault(
                    text.lower(), Row(text=text, label=label, client=client, file=file)
                )
        if len(found) >= _MAX_ROWS:
            break
    return list(found.values())[:_MAX_ROWS]


def _parameters(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the name, type and description of every parameter documented in a source file."""
    source = path.read_bytes()
    if not re.search(rb"Args:|Arguments:|Parameters", source):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for docstring in _docstrings(tree):
        yield from numpydoc(docstring)
        yield from googledoc(docstring)


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


# --- docstrings to parameters ----------------------------------------------------------------

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


# --- parameters to rows ----------------------------------------------------------------------

_NOUNS = {
    "int": "int integer long",
    "float": "float double real number scalar",
    "bool": "bool boolean",
    "str": "str string path pathlike path-like filename",
    "array": "array ndarray array_like array-like arraylike tensor matrix",
    "callable": "callable function func",
    "sequence": "list tuple sequence iterable set container iterator collection",
    "mapping": "dict dictionary mapping mutablemapping ordereddict",
}
_LABEL_OF_NOUN = {noun: label for label, nouns in _NOUNS.items() for noun in nouns.split()}
_NOT_A_TYPE = re.compile(
    r"\b(?:optional(?!\[)|defaults?|keyword-only|required|if not|e\.g)\b.*", re.DOTALL
)
_CHOICES = re.compile(r"\{[^{}]*['\"\u2018\u201c][^{}]*\}|literal\[\s*['\"][^\]]*\]")


def label_of(kind: str) -> str | None:
    """Return the label of a documented type, or None if it has none or several.

    >>> label_of("`int`, *optional*, defaults to 8"), label_of("dict[str, int]")
    ('int', 'mapping')
    >>> label_of("int or list of int"), label_of("torch.dtype")
    (None, None)
    """
    text = kind.lower().translate({ord(mark): None for mark in "`~*"})
    text = _CHOICES.sub("str", text)
    text = re.sub(r":\w+:", "", _NOT_A_TYPE.sub("", text))
    text = re.sub(r"\b(?:typing\.)?(?:optional|union)\[(.*)\]", r"\1", text)
    while (flat := re.sub(r"\[[^\[\]]*\]|\([^()]*\)|\{[^{}]*\}", " ", text)) != text:
        text = flat
    alternatives = [part.strip(" .:;") for part in re.split(r",|\bor\b|\|", text)]
    nouns = [_head_noun(part) for part in alternatives if part not in ("", "none")]
    labels = {_LABEL_OF_NOUN.get(noun) for noun in nouns} - {None}
    first = _LABEL_OF_NOUN.get(nouns[0]) if nouns else None
    return first if len(labels) == 1 else None


def _head_noun(phrase: str) -> str:
    """Return the noun that a type's phrase is about: ``sparse 2-d arrays of ints`` → ``array``."""
    words = re.split(r" (?:of|with|containing|from|to|like|in|that|which|representing)\b", phrase)
    noun = (words[0].split() or [""])[-1].rpartition(".")[2]
    noun = "tensor" if noun.endswith("tensor") else noun
    return noun if noun in _LABEL_OF_NOUN else noun.removesuffix("s")


_DIRECTIVE = re.compile(r"\.\. \w+::.*", re.DOTALL)
_ROLE = re.compile(r":\w+:(?=[`~])")
_DEFAULT = re.compile(
    r"[\s,;([]*\b(?:the )?defaults?(?: value)?"
    r"(?: is| are| to|[:=]| (?=['\"\d.-]|true|false|none)).*"
    r"| \(default\)"
    r"|\S+ by default\b.*",
    re.IGNORECASE,
)
_LEADING_TYPE = re.compile(
    r"\A(?:(?:an?|the|optional|python|\(?optional\)?[,:]?) )*"
    r"\(?(?:lists?|tuples?|sequences?|iterables?|dict(?:ionary|ionaries)?|mappings?|callables?"
    r"|functions?|(?:nd|numpy )?arrays?|array[_-]like|matrix|[\w.]*tensors?|str(?:ings?)?"
    r"|bool(?:eans?)?|int(?:egers?)?|floats?)\)?"
    r"(?: ?[,:;-]| of| containing| that| which| with)? +",
    re.IGNORECASE,
)


def clean(name: str, description: str) -> str | None:
    """Return ``name: description`` without markup or answer, or None if too little is left.

    >>> clean("tol", "Relative `tolerance` of the solver. Defaults to 1e-3.")
    'tol: Relative tolerance of the solver.'
    >>> clean("nodes", "list of nodes to start from, default: None")
    'nodes: nodes to start from'
    >>> clean("x", "the input") is None
    True
    """
    text = _DIRECTIVE.sub("", description)
    text = _ROLE.sub("", text).translate({ord(mark): None for mark in "`*~"})
    text = " ".join(text.split())
    sentences = [_DEFAULT.sub("", part) for part in re.split(r"(?<=[.;])\s+", text)]
    text = " ".join(part for part in sentences if len(part) > 1)
    text = _LEADING_TYPE.sub("", text)
    name = name.replace("*", "").strip()
    return f"{name}: {text}"[:_MAX_CHARS] if len(text) >= _MIN_CHARS else None


# --- the cache -------------------------------------------------------------------------------


def _cache_file() -> Path | None:
    """Return where the rows of these packages, by this code, are kept; None without a home."""
    versions = {}
    for client in CLIENTS:
        with suppress(PackageNotFoundError):
            versions[client] = version(client)
    state = json.dumps(versions).encode() + Path(__file__).read_bytes()
    key = hashlib.sha256(state).hexdigest()[:16]
    folder = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(folder) if Path(folder).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    return base / "weft" / f"parameter-types-{key}.json"


def _read_cache(file: Path) -> dict[str, list[Row]] | None:
    """Return what :func:`_write_cache` wrote, or None if it is absent or damaged."""
    try:
        digest, _, body = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    found: dict[str, list[Row]] = json.loads(body)
    return found


def _write_cache(file: Path, found: dict[str, list[Row]]) -> None:
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
