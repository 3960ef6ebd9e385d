"""Commits, names, moves of aliases, yanks, crashes, gc, fsck, restores: in any order all holds."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import event

from storage.aliases import NothingToRollBack, YankedVersion
from storage.backup import back_up
from storage.blobs import BlobStore
from storage.database import open_database
from storage.fsck import fsck
from storage.garbage import collect
from storage.restoring import restore
from storage.schema import metadata
from storage.store import AdapterStore, UnknownVersion

NAMES = st.sampled_from(["bot", "task-1"])
POINTERS = st.sampled_from([("bot", "production"), ("bot", "candidate"), ("task-1", "production")])
LAST = st.integers(0, 2)
VALUES = st.integers(0, 5)
POINTS = ("INSERT INTO versions", "INSERT INTO version_parents", "UPDATE condemned", "COMMIT")


class Crash(BaseException):
    """The process dies here."""


class Pointer:
    """Where an alias points, and where a rollback goes: what the documentation says of it."""

    def __init__(self) -> None:
        self.trail: list[str] = []
        self.left: set[str] = set()

    def promote(self, version: str) -> None:
        self.left.discard(version)
        self.trail.append(version)

    def back(self, unusable: set[str]) -> str | None:
        """Where it goes back to: the last one that may be used and nobody rolled back from."""
        out = self.left | unusable | set(self.trail[-1:])
        return next((v for v in reversed(self.trail) if v not in out), None)

    def roll_back(self, version: str) -> None:
        """What came after it, or of a stranger what it points at, was rolled back from."""
        if version in self.trail:
            last = len(self.trail) - 1 - self.trail[::-1].index(version)
        else:
            last = len(self.trail) - 1
        self.left |= set(self.trail[last:])
        del self.trail[last:]
        self.promote(version)


class Store(RuleBasedStateMachine):
    """A store, beside what it must be like; a rule for each thing that can happen to it.

    A rule for one more operation changes the store and ``self``'s idea of it; the invariants stay
    as they are.

    Args:
        url: of a database with our tables and no row.
        folder: where this example's blobs lie.
    """

    versions = Bundle("versions")

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__()
        shutil.rmtree(folder, ignore_errors=True)
        self.folder = folder
        self.engine = open_database(url)
        self.blobs = BlobStore(folder / "blobs")
        self.store = AdapterStore(self.engine, self.blobs)
        self.content: dict[str, int] = {}
        self.parents: dict[str, set[str]] = {}
        self.names: dict[str, list[str]] = {}
        self.aliases: dict[tuple[str, str], Pointer] = {}
        self.yanked: set[str] = set()
        self.restored = False

    def teardown(self) -> None:
        self.engine.dispose()

    def _commit(self, value: int, parents: dict[str, str]) -> str:
        made = self.store.commit(
            {"x": torch.full((3,), float(value))},
            auxiliary={"m": torch.full((2,), float(value))} if value % 2 else None,
            parents=parents,
            recipe={"value": value},
        )
        self.content[made], self.parents[made] = value, set(parents)
        return made

    @rule(target=versions, value=VALUES)
    def commit_a_first_version(self, value: int) -> str:
        return self._commit(value, {})

    @rule(target=versions, value=VALUES, parent=versions)
    def commit(self, value: int, parent: str) -> str:
        return self._commit(value, {parent: "round"})

    @rule(target=versions, value=VALUES, one=versions, other=versions)
    def merge(self, value: int, one: str, other: str) -> str:
        return self._commit(value, {one: "merge", other: "merge"})

    @rule(version=versions, name=NAMES)
    def name(self, version: str, name: str) -> None:
        numbered = self.names.setdefault(name, [])
        if not numbered or numbered[-1] != version:
            numbered.append(version)
        assert self.store.name(name, version) == f"{name}:v{len(numbered)}"

    @rule(version=versions, pointer=POINTERS)
    def release(self, version: str, pointer: tuple[str, str]) -> None:
        self.name(version, pointer[0])
        self.promote(version, pointer)

    @rule(version=versions, pointer=POINTERS)
    def promote(self, version: str, pointer: tuple[str, str]) -> None:
        if version not in self.names.get(pointer[0], []):
            with pytest.raises(UnknownVersion):
                self.store.promote(*pointer, version, who="me", why="")
        elif version in self.yanked:
            with pytest.raises(YankedVersion):
                self.store.promote(*pointer, version, who="me", why="")
        else:
            self.store.promote(*pointer, version, who="me", why="")
            self.aliases.setdefault(pointer, Pointer()).promote(version)

    @precondition(lambda self: self.names)
    @rule(pointer=POINTERS, last=LAST)
    def promote_one_of_the_last(self, pointer: tuple[str, str], last: int) -> None:
        if numbered := self.names.get(pointer[0]):
            self.promote(numbered[-1 - last % len(numbered)], pointer)

    @precondition(lambda self: self.aliases)
    @rule(pointer=POINTERS, times=st.integers(1, 2))
    def roll_back_again(self, pointer: tuple[str, str], times: int) -> None:
        for _ in range(times):
            self.roll_back(pointer)

    @rule(pointer=POINTERS)
    def roll_back(self, pointer: tuple[str, str]) -> None:
        moved = self.aliases.get(pointer)
        target = moved.back(self.yanked) if moved else None
        if moved is None or target is None:
            with pytest.raises(NothingToRollBack if moved else UnknownVersion):
                self.store.rollback(*pointer, who="me", why="")
        else:
            assert self.store.rollback(*pointer, who="me", why="").version == target
            moved.roll_back(target)

    @rule(version=versions, pointer=POINTERS)
    def roll_back_to(self, version: str, pointer: tuple[str, str]) -> None:
        moved = self.aliases.get(pointer)
        refused: type[Exception] | None = None
        if moved is None or version not in self.names.get(pointer[0], []):
            refused = UnknownVersion
        elif version in self.yanked:
            refused = YankedVersion
        elif version == moved.trail[-1]:
            refused = NothingToRollBack
        if refused is not None:
            with pytest.raises(refused):
                self.store.rollback(*pointer, who="me", why="", to=version)
        else:
            assert moved is not None
            self.store.rollback(*pointer, who="me", why="", to=version)
            moved.roll_back(version)

    @rule(version=versions)
    def yank(self, version: str) -> None:
        self.store.yank(version, who="me", why="it leaks")
        self.yanked.add(version)

    @rule(version=versions)
    def take_back_into_use(self, version: str) -> None:
        self.store.unyank(version, who="me", why="")
        self.yanked.discard(version)

    @precondition(lambda self: not self.restored and len(self.names) > 1)
    @rule()
    def lose_everything_and_restore_a_backup(self) -> None:
        shutil.rmtree(self.folder / "backup", ignore_errors=True)
        back_up(self.engine, self.blobs, self.folder / "backup")
        shutil.rmtree(self.folder / "blobs", ignore_errors=True)
        with self.engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())
        assert restore(self.engine, self.blobs, self.folder / "backup").missing == ()
        self.restored = True  # once in an example: it takes as long as all else

    @rule(delete=st.booleans(), grace_s=st.sampled_from([0.0, 3600.0]))
    def gc(self, delete: bool, grace_s: float) -> None:
        found = collect(self.engine, self.blobs, delete_them=delete, grace_s=grace_s)
        assert not delete or not any(self.blobs.has(one.digest) for one in found.removed)

    @rule(value=VALUES)
    def put_and_die(self, value: int) -> None:
        digest = self.blobs.put({"x": torch.full((3,), float(value))})
        draft = Path(self.blobs.place.where()) / digest[:2] / ".half-written"
        draft.write_bytes(b"half")
        os.utime(draft, (time.time() - 7200,) * 2)

    @rule(target=versions, value=VALUES, parent=versions, point=st.sampled_from(POINTS))
    def die_in_a_commit(self, value: int, parent: str, point: str) -> object:
        before = set(self.content)
        try:
            with self._dying_at(point):
                made = self._commit(value, {parent: "continue"})
        except Crash:
            assert {v.id for v in self.store.versions(limit=1000)} == before
            return multiple()
        return made  # it never came to that point

    @rule(target=versions, value=VALUES)
    def commit_while_gc_runs(self, value: int) -> str:
        """Both passes of it, between a blob and its row."""
        puts = []

        def put(tensors: dict[str, torch.Tensor]) -> str:
            puts.append(BlobStore(self.blobs.place).put(tensors))
            if len(puts) == 1:
                for _ in range(2):
                    collect(self.engine, self.blobs, delete_them=True, grace_s=0)
            return puts[-1]

        self.blobs.put = put  # type: ignore[method-assign]
        try:
            return self._commit(value, {})
        finally:
            del self.blobs.put

    @rule(point=st.sampled_from(POINTS))
    def die_in_gc(self, point: str) -> None:
        try:
            with self._dying_at(point):
                collect(self.engine, self.blobs, delete_them=True, grace_s=0)
        except Crash:
            return

    @rule(version=consumes(versions))
    def lose_a_blob_and_mend_it_from_a_mirror(self, version: str) -> None:
        mirror = BlobStore(self.folder / "mirror")
        mirror.put({"x": torch.full((3,), float(self.content[version]))})
        digest = self.store.version(version).tensors
        self.blobs.remove(digest)
        assert [p.subject for p in fsck(self.engine, self.blobs).problems] == [digest]
        assert fsck(self.engine, self.blobs, repair=True, mirrors=[mirror]).is_sound

    @invariant()
    def every_version_is_whole(self) -> None:
        found = {version.id: version for version in self.store.versions(limit=1000)}
        assert set(found) == set(self.content)
        for version, value in self.content.items():
            own = self.blobs.get(found[version].tensors)["x"]
            assert torch.equal(own, torch.full((3,), float(value)))
            assert bool(found[version].auxiliary) == bool(value % 2)
            assert {parent.id for parent in found[version].parents} == self.parents[version]

    @invariant()
    def every_lineage_is_what_its_parents_say(self) -> None:
        ancestors: dict[str, set[str]] = {}
        for version, parents in self.parents.items():  # parents come first
            ancestors[version] = {version}.union(*(ancestors[parent] for parent in parents))
        for version in list(self.parents)[-3:]:
            assert set(self.store.lineage(version).nodes) == ancestors[version]

    @invariant()
    def every_name_and_alias_says_what_it_should(self) -> None:
        for name, numbered in self.names.items():
            for number, version in enumerate(numbered, 1):
                assert self.store.resolve(f"{name}:v{number}") == version
            usable = [version for version in numbered if version not in self.yanked]
            if usable:
                assert self.store.resolve(name) == usable[-1]
            else:
                with pytest.raises(UnknownVersion):
                    self.store.resolve(name)
        for (name, alias), pointer in self.aliases.items():
            assert self.store.resolve(f"{name}@{alias}") == pointer.trail[-1]

    @invariant()
    def nothing_is_wrong(self) -> None:
        assert fsck(self.engine, self.blobs).problems == ()

    @contextmanager
    def _dying_at(self, point: str) -> Iterator[None]:
        """Die where a statement begins like ``point``, and have the database undo what is open."""

        def die(*arguments: object) -> None:
            if point == "COMMIT" or str(arguments[2]).startswith(point):
                raise Crash

        kind = "commit" if point == "COMMIT" else "before_cursor_execute"
        event.listen(self.engine, kind, die)
        try:
            yield
        finally:
            event.remove(self.engine, kind, die)


@pytest.fixture
def empty(request: pytest.FixtureRequest, tmp_path: Path, migrated_sqlite: Path):
    """Return a function that returns the URL of a database with our tables and without a row."""
    if request.param == "sqlite":

        def copied() -> str:
            for left in tmp_path.glob("weft.db-*"):
                left.unlink()  # of an example that failed
            shutil.copy(migrated_sqlite, tmp_path / "weft.db")
            return f"sqlite:///{tmp_path / 'weft.db'}"

        return copied
    server = request.getfixturevalue("postgres_databases")

    def emptied() -> str:
        server.run(f"TRUNCATE {', '.join(metadata.tables)}", "weft")
        return str(server.of("weft"))

    return emptied


def keeps_its_promises(empty: Callable[[], str], folder: Path, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        lambda: Store(empty(), folder),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


POSTGRES = pytest.mark.postgres
SLOW = (pytest.mark.slow, pytest.mark.timeout(300))
CHAOS = (pytest.mark.chaos, pytest.mark.timeout(3600))


@pytest.mark.parametrize(
    ("empty", "examples", "steps"),
    [
        pytest.param("sqlite", 8, 20, id="sqlite"),
        pytest.param("postgres", 3, 15, id="postgres", marks=POSTGRES),
        pytest.param("sqlite", 30, 40, id="sqlite-long", marks=SLOW),
        pytest.param("postgres", 10, 40, id="postgres-long", marks=(*SLOW, POSTGRES)),
        pytest.param("sqlite", 150, 60, id="sqlite-longest", marks=CHAOS),
        pytest.param("postgres", 50, 60, id="postgres-longest", marks=(*CHAOS, POSTGRES)),
    ],
    indirect=["empty"],
)
def test_whatever_happens_in_any_order_the_store_keeps_its_promises(
    empty, examples, steps, tmp_path
):
    keeps_its_promises(empty, tmp_path / "home", examples, steps)
