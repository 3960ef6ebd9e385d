"""Where records come from: data URIs, and one reader for each scheme.

``jsonl:PATH``, ``csv:PATH`` (both also gzipped), ``parquet:PATH``, ``hf:NAME[/CONFIG]`` and
``builtin:NAME``, with options as a query: ``hf:stanfordnlp/imdb?split=train``. ``several:`` is
URIs one after the other, with ``;`` between. ``site:NAME`` is what a site calls one of its data
sets: it alone knows what that stands for, and everywhere else there is nothing to read.

A reader yields every record with its number, and a broken one with what is wrong with it, so that a
check can count what a run refuses. No message holds a record's content: only names of fields,
numbers of lines and, where it is short, a label.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import parse_qsl

from clients.builtin import DATA_SETS


class DataNotFound(FileNotFoundError):
    """There is no such file, or no such data set on the Hub."""


class DataElsewhere(DataNotFound):
    """The data lie at a site of somebody's, where alone they can be read."""


class BadRecord(ValueError):
    """A record cannot be used; the message says where it is, and not what it says."""


class BadDataURI(ValueError):
    """A data URI names no scheme, or an option that its scheme does not have."""


class MissingExtra(ImportError):
    """A reader needs a package that is an optional extra of weft."""


class DataURI(NamedTuple):
    """A data URI in its parts: ``scheme:path?options``."""

    scheme: str
    path: str
    options: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it stands in its source.

    Attributes:
        number: of its first line or its row, from 1.
        fields: by the source's own column names. Absent cells are None.
        problem: why it could not be read, or empty.
    """

    number: int
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """An opened data URI.

    Attributes:
        name: for messages; a file's path as given.
        unit: what a record's number counts, ``line`` or ``row``.
        typed: whether numbers are numbers; False for CSV, where everything is text.
        records: to be read once.
    """

    name: str
    unit: str
    typed: bool
    records: Iterator[Record]


_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "jsonl": (),
    "csv": (),
    "parquet": (),
    "hf": ("split", "revision", "config"),
    "builtin": ("split", "client"),
    "several": (),
    "site": (),
}
_AT_SITE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def parse_uri(uri: str) -> DataURI:
    """Return the parts of a data URI; opens nothing.

    >>> parse_uri("builtin:parameter-types?split=test")
    DataURI(scheme='builtin', path='parameter-types', options={'split': 'test'})

    Raises:
        BadDataURI: for an unknown scheme, data set or option, or no path.
    """
    scheme, colon, rest = uri.partition(":")
    if scheme == "several":
        for one in rest.split(";"):
            if parse_uri(one).scheme == "site":
                raise BadDataURI(f"data URI {uri!r}: {one} cannot be one of several; name it alone")
        return DataURI(scheme, rest, {})
    path, _, query = rest.partition("?")
    if scheme not in _OPTIONS or not colon:
        raise BadDataURI(_unknown_scheme(uri, scheme if colon else ""))
    _refuse_path(uri, scheme, path)
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise BadDataURI(f"data URI {uri!r}: options are ?name=value&name=value") from None
    for name in options:
        _known(f"{scheme} option", name, _OPTIONS[scheme])
    if scheme == "builtin":
        _known("builtin data set", path, DATA_SETS)
        for name, value in options.items():
            _known(name, value, DATA_SETS[path].OPTIONS[name])
    return DataURI(scheme, path, options)


def _refuse_path(uri: str, scheme: str, path: str) -> None:
    if not path:
        raise BadDataURI(f"data URI {uri!r} names no data; write {scheme}:PATH")
    if scheme == "site" and not _AT_SITE.fullmatch(path):
        raise BadDataURI(
            f"data URI {uri!r}: a site calls its data by lower-case letters, digits, dots, "
            "underscores and hyphens, at most 64, beginning with a letter or digit"
        )


def _unknown_scheme(uri: str, scheme: str) -> str:
    allowed = ", ".join(f"{known}:" for known in _OPTIONS)
    if not scheme:
        suffix = Path(uri.removesuffix(".gz")).suffix.removeprefix(".")
        guess = suffix if suffix in _OPTIONS else "jsonl"
        return f"data URI {uri!r} has no scheme ({allowed}); write {guess}:{uri}"
    close = difflib.get_close_matches(scheme.lower(), _OPTIONS, n=1)
    hint = f"; did you mean '{close[0]}:'?" if close else ""
    return f"data URI {uri!r}: there is no scheme '{scheme}:'{hint} (schemes: {allowed})"


def _known(what: str, name: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> None:
    if name not in allowed:
        close = difflib.get_close_matches(name, allowed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        listed = ", ".join(allowed) or "none"
        raise BadDataURI(f"there is no {what} {name!r}{hint} (allowed: {listed})")


def several(uris: Sequence[str]) -> str:
    """Return the URI of the records of all ``uris``, one after the other; of one, itself.

    >>> several(["jsonl:/a.jsonl", "csv:/b.csv"])
    'several:jsonl:/a.jsonl;csv:/b.csv'

    Raises:
        BadDataURI: if one has a ``;``, which stands between them.
    """
    if len(uris) == 1:
        return uris[0]
    if odd := [uri for uri in uris if ";" in uri]:
        raise BadDataURI(f"data URI {odd[0]!r} has a ';', which stands between several; rename it")
    return f"several:{';'.join(uris)}"


def parts_of(uri: str) -> list[str]:
    """Return the URIs that a URI is made of: itself, unless it is of several.

    Raises:
        BadDataURI: as :func:`parse_uri`.
    """
    scheme, path, _ = parse_uri(uri)
    return path.split(";") if scheme == "several" else [uri]


def absolute(uri: str) -> str:
    """Return a file's URI with an absolute path, so that it means the same from anywhere.

    Raises:
        BadDataURI: as :func:`parse_uri`.
    """
    kind = parse_uri(uri).scheme
    if kind == "several":
        return several([absolute(one) for one in parts_of(uri)])
    if kind not in ("jsonl", "csv", "parquet"):
        return uri
    scheme, _, rest = uri.partition(":")
    path, mark, options = rest.partition("?")
    return f"{scheme}:{Path(path).expanduser().absolute()}{mark}{options}"


def is_public(uri: str) -> bool:
    """Return whether everyone has these data: only ``builtin:``.

    Raises:
        BadDataURI: as :func:`parse_uri`.
    """
    return all(parse_uri(one).scheme == "builtin" for one in parts_of(uri))


def is_elsewhere(uri: str) -> bool:
    """Return whether data lie at a site, which alone can read them: only ``site:``."""
    return uri.startswith("site:")


def is_there(uri: str) -> bool:
    """Return whether data can be read here: a file if it is there, and all but a site's else.

    Raises:
        BadDataURI: as :func:`parse_uri`.
    """
    scheme, path, _ = parse_uri(uri)
    if scheme == "several":
        return all(is_there(one) for one in path.split(";"))
    if scheme == "site":
        return False
    return scheme in ("hf", "builtin") or Path(path).expanduser().is_file()


def source_state(uri: str) -> tuple[str | int, ...] | None:
    """Return what changes when the records behind a URI change; None where only reading tells.

    Of a file: its place, inode, size and the time of its last change. ``builtin:`` data do not
    change while a process lives.

    Raises:
        BadDataURI: as :func:`parse_uri`.
        DataNotFound: if there is no such file, or it cannot be opened.
    """
    scheme, path, _ = parse_uri(uri)
    if scheme == "several":
        states = [source_state(one) for one in path.split(";")]
        return None if None in states else tuple(part for s in states if s for part in s)
    if scheme == "hf":
        return None
    if scheme == "builtin":
        return (uri,)
    _require_file(scheme, path)
    file = Path(path).absolute()
    status = file.stat()
    return scheme, str(file), status.st_ino, status.st_size, status.st_mtime_ns


def content_of(uri: str) -> str:
    """Return what says which records a URI means: a file's sha256, or else the URI itself.

    Of data that the operator holds: a digest of a client's would confirm who has them.

    Raises:
        BadDataURI: as :func:`parse_uri`.
        DataNotFound: if there is no such file, or it cannot be opened.
    """
    scheme, path, _ = parse_uri(uri)
    if scheme == "several":
        return ";".join(content_of(one) for one in path.split(";"))
    if scheme in ("hf", "builtin"):
        return uri
    _require_file(scheme, path)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_source(uri: str) -> Source:
    """Return the records behind a URI, unread.

    Raises:
        BadDataURI: as :func:`parse_uri`; also for a split or config that a Hub data set lacks.
        BadRecord: if a parquet file is not one.
        DataNotFound: if there is nothing there, or it cannot be opened.
        MissingExtra: if the reader's package is not installed.
    """
    scheme, path, options = parse_uri(uri)
    if scheme == "several":
        return _chained([open_source(one) for one in path.split(";")])
    if scheme == "builtin":
        rows = DATA_SETS[path].rows(**options)
        return Source(uri, "row", True, _numbered(iter(rows)))
    if scheme == "hf":
        return Source(f"hf:{path}", "row", True, _numbered(_hub_rows(path, options)))
    _require_file(scheme, path)
    if scheme == "parquet":
        return Source(path, "row", True, _numbered(_parquet_rows(path)))
    if scheme == "csv":
        return Source(path, "line", False, _until_broken(_csv_records(path)))
    return Source(path, "line", True, _until_broken(_jsonl_records(path)))


def _chained(sources: Sequence[Source]) -> Source:
    """Return sources as one, each record with its own's number; in one with CSV all is text."""
    records = (record for source in sources for record in source.records)
    name = " and ".join(source.name for source in sources)
    return Source(name, sources[0].unit, all(source.typed for source in sources), records)


def _numbered(rows: Iterator[Mapping[str, Any]]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield Record(number, row)


# --- files -----------------------------------------------------------------------------------


def _require_file(scheme: str, path: str) -> None:
    if scheme == "site":
        raise DataElsewhere(
            f"site:{path} lies at a site, and can be read there alone; name data that are here, or "
            "leave the client to a run with backend: superlink"
        )
    try:
        with Path(path).open("rb"):
            return
    except IsADirectoryError:
        raise DataNotFound(f"{path} is a folder; name a file in it") from None
    except FileNotFoundError:
        raise DataNotFound(f"there is no file {path} (looked from {Path.cwd()})") from None
    except OSError as error:
        raise DataNotFound(f"{path} cannot be opened: {error.strerror}") from error


def _open(path: str) -> BinaryIO:
    opened = gzip.open if path.endswith(".gz") else open
    return cast("BinaryIO", opened(path, "rb"))


def _until_broken(records: Iterator[Record]) -> Iterator[Record]:
    """Yield ``records``; where the file itself breaks off, a last one that says so."""
    number = 0
    try:
        for record in records:
            number = record.number
            yield record
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Record(number + 1, problem=f"the gzip file is damaged from here on ({error})")


def _jsonl_records(path: str) -> Iterator[Record]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, from Windows
            if line.strip():
                fields, problem = _json_object(line)
                yield Record(number, fields, problem)


def _json_object(line: bytes) -> tuple[dict[str, Any], str]:
    """Return the object on a line and no problem, or nothing and the problem.

    The problem is returned, not raised: a JSON or decoding error carries the whole line with it.
    """
    try:
        value = json.loads(line.decode())
    except json.JSONDecodeError as error:
        return {}, f"not JSON ({error.msg} at column {error.colno})"
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 (byte {error.start + 1} of the line)"
    except (ValueError, RecursionError):
        return {}, "not JSON (a number is too long, or it is nested too deeply)"
    if not isinstance(value, dict):
        return {}, f"not a JSON object but a {type(value).__name__}"
    return value, ""


def _csv_records(path: str) -> Iterator[Record]:
    with _open(path) as binary:
        # What is not UTF-8 becomes a lone surrogate, so that one bad line does not end the file.
        lines = (line.decode("utf-8", "surrogateescape") for line in binary)
        reader = csv.reader(lines, strict=True)
        header = [name.removeprefix("\ufeff").strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            yield Record(1, problem="the header names a column twice")
            return
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # the reader starts afresh on the next line
                yield Record(number, problem=f"not CSV ({error})")
                continue
            if len(cells) == len(header):
                yield Record(number, {k: v or None for k, v in zip(header, cells, strict=True)})
            elif cells:
                problem = f"has {len(cells)} cells where the header has {len(header)}"
                yield Record(number, problem=problem)


def _parquet_rows(path: str) -> Iterator[Mapping[str, Any]]:
    parquet = _extra("pyarrow.parquet", "parquet")
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError):  # pyarrow.ArrowInvalid is a ValueError
        raise BadRecord(f"{path} is not a parquet file") from None
    return (row for batch in file.iter_batches() for row in batch.to_pylist())


def _extra(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise MissingExtra(
            f"reading this data needs the package {package}, which is not installed; "
            f"run: pip install 'weft[{extra}]'"
        ) from error


# --- the Hugging Face Hub --------------------------------------------------------------------


def _hub_rows(path: str, options: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    """Return the rows of a Hub data set or a local folder, class indices as the classes' names."""
    datasets = _extra("datasets", "hub")
    name, config = path, options.get("config")
    if not Path(path).is_dir() and path.count("/") == 2:
        name, _, config = path.rpartition("/")
    try:
        data = datasets.load_dataset(
            name, config, split=options.get("split", "train"), revision=options.get("revision")
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise DataNotFound(
            f"there is no data set hf:{name}, or the Hub cannot be reached"
        ) from error
    except ValueError as error:
        raise BadDataURI(f"hf:{path}: {str(error).splitlines()[0]}") from error
    except datasets.exceptions.DatasetGenerationError:
        raise BadRecord(f"hf:{path} holds files that are not a data set") from None
    # An index belongs to the data set's own label order, which need not be the model's.
    inner = {k: getattr(f, "feature", f) for k, f in data.features.items()}  # of lists, as of tags
    classes = {k: f for k, f in inner.items() if isinstance(f, datasets.ClassLabel)}
    return ({**row, **_class_names(row, classes)} for row in data)


def _class_names(row: Mapping[str, Any], classes: Mapping[str, Any]) -> dict[str, Any]:
    def named(value: Any, feature: Any) -> Any:
        if isinstance(value, list):
            return [named(one, feature) for one in value]
        # -1 is the Hub's mark of a hidden label
        return None if value in (None, -1) else feature.int2str(value)

    return {name: named(row[name], feature) for name, feature in classes.items()}
