"""Which populations share records: a site's keyed digests of every record that it has ever seen.

A budget belongs to people's data, so neither a new name nor one row more nor a subset of the data
may begin another. The site keeps a digest of each record, keyed by its secret: to anyone else they
are noise, where a plain hash would confirm that a record is there. They never leave the site's
folder; what leaves is that two populations share some record, and not how many or which.

A record is recognised by the text that is trained on, whatever its label, its case, its spacing
and its place: by its words. One that has several (a text, tokens, a prompt with its completion) is
recognised by each, since another run may train on another. What is written in other words is
another record; where a run's unit is a column, such as a patient's number, it is recognised by its
value there too.

A million records take 24 MB of disk, 60 MB of memory and 20 seconds of one core the first time;
a data set that did not change since is not read again.
"""

from __future__ import annotations

import hmac
import json
import sqlite3
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from clients.assignment import DataSpec, ModelSpec
from clients.examples import Example
from clients.keys import data_key
from clients.records import forms
from clients.sources import source_state

_DIGEST_BYTES = 16  # of 10^9 records, two different ones agree with probability 10^-21
_AT_ONCE = 50_000
_WAIT_S = 600.0
_TABLES = """
CREATE TABLE IF NOT EXISTS populations (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS records (
    digest BLOB NOT NULL, population INTEGER NOT NULL, PRIMARY KEY (digest, population)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shared (
    population INTEGER NOT NULL, other INTEGER NOT NULL, PRIMARY KEY (population, other)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS taken (
    population INTEGER NOT NULL, spec TEXT NOT NULL, state TEXT NOT NULL,
    PRIMARY KEY (population, spec)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Holding:
    """A population's data set.

    Attributes:
        population: whose data.
        data: the records.
        model: what they are for; needed where ``data`` is a part of a data set.
    """

    population: str
    data: DataSpec
    model: ModelSpec | None = None


class Census:
    """The digests of one site, in its folder.

    Args:
        folder: the site's; created where it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self._key = data_key(Path(folder))
        self._path = Path(folder) / "census.db"

    def take(self, holdings: Iterable[Holding]) -> None:
        """Add the records of data sets that changed since they were last taken; all or none.

        What a population once held it holds for ever: a row that was deleted was spent on.

        Raises:
            BadDataURI, DataNotFound, MissingExtra, BadSelection: if one cannot be read.
        """
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            for holding in holdings:
                self._take(connection, holding)
            connection.execute("COMMIT")

    def related(self, populations: Collection[str] | None = None) -> dict[str, frozenset[str]]:
        """Return which others each population shares records with; None asks for all of them."""
        found: dict[str, set[str]] = {}
        query = (
            "SELECT one.name, two.name FROM shared JOIN populations one ON one.number = population "
            "JOIN populations two ON two.number = other"
        )
        with self._open() as connection:
            for one, other in connection.execute(query):
                if populations is None or one in populations:
                    found.setdefault(one, set()).add(other)
        return {name: frozenset(others) for name, others in sorted(found.items())}

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=_WAIT_S)) as connection:
            connection.isolation_level = None  # transactions are written out
            connection.execute("PRAGMA cache_size = -65536")
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                connection.executescript(f"{_TABLES} PRAGMA user_version = 1;")
            yield connection

    def _take(self, connection: sqlite3.Connection, holding: Holding) -> None:
        name, spec = holding.population, holding.data
        state = json.dumps(source_state(spec.uri))
        described = json.dumps([spec.uri, sorted(spec.fields.items()), repr(spec.shard), spec.unit])
        connection.execute("INSERT OR IGNORE INTO populations (name) VALUES (?)", (name,))
        [number] = connection.execute(
            "SELECT number FROM populations WHERE name = ?", (name,)
        ).fetchone()
        known = connection.execute(
            "SELECT 1 FROM taken WHERE population = ? AND spec = ? AND state = ?",
            (number, described, state),
        ).fetchone()
        if known is not None and state != "null":
            return
        digests = (one for e in _examples(holding) for one in _digests(e, spec.unit, self._key))
        while some := set(islice(digests, _AT_ONCE)):
            _add(connection, number, some)
        connection.execute(
            "INSERT OR REPLACE INTO taken VALUES (?, ?, ?)", (number, described, state)
        )


def content_digest(example: Example, key: bytes) -> bytes:
    """Return the keyed digest of what an example says, 16 bytes, whatever its label."""
    texts = (example.text, example.text_pair, example.prompt, example.completion)
    words = [
        unicodedata.normalize("NFKC", text).casefold().split() if text else [] for text in texts
    ]
    message = b"weft:census:1:" + json.dumps([" ".join(part) for part in words]).encode()
    return hmac.digest(key, message, "sha256")[:_DIGEST_BYTES]


def _digests(example: Example, column: str, key: bytes) -> Iterator[bytes]:
    """Yield what an example is recognised by: what it says, and whose it is."""
    yield content_digest(example, key)
    if example.unit is not None:
        message = b"weft:census:unit:1:" + json.dumps([column, example.unit]).encode()
        yield hmac.digest(key, message, "sha256")[:_DIGEST_BYTES]


def _examples(holding: Holding) -> Iterator[Example]:
    """Yield the examples of a data set, each in every form in which a run could train on it."""
    spec = holding.data
    if spec.shard is not None:
        from clients import data  # it makes tensors of them; most censuses need none

        assert holding.model is not None
        whole = replace(spec, part="all", holdout=0.0, holdout_by="")  # what is held out is its too
        yield from data.examples(whole, holding.model)
        return
    yield from forms(spec)


def _add(connection: sqlite3.Connection, number: int, digests: Iterable[bytes]) -> None:
    """Add digests to a population, and note whoever has one of them already."""
    connection.execute("CREATE TEMP TABLE IF NOT EXISTS fresh (digest BLOB PRIMARY KEY)")
    connection.execute("DELETE FROM temp.fresh")
    rows = ((digest,) for digest in sorted(digests))  # in order: pages are written once
    connection.executemany("INSERT INTO temp.fresh VALUES (?)", rows)
    others = connection.execute(
        "SELECT DISTINCT population FROM temp.fresh JOIN records USING (digest) "
        "WHERE population <> ?",
        (number,),
    ).fetchall()
    pairs = [pair for (other,) in others for pair in ((number, other), (other, number))]
    connection.executemany("INSERT OR IGNORE INTO shared VALUES (?, ?)", pairs)
    connection.execute(
        "INSERT OR IGNORE INTO records SELECT digest, ? FROM temp.fresh ORDER BY digest", (number,)
    )
