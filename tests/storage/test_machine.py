"""Commits, names, aliases, merges, crashes, gc and fsck in any order keep what was promised."""

import os
import shutil
import time
from collections.abc import Iterator
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
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import event

from storage.blobs import BlobStore
from storage.database import open_database
from storage.fsck import fsck
from storage.garbage import collect
from storage.store import AdapterStore, UnknownVersion

NAMES = st.sampled_from(["bot", "task-1"])
ALIASES = st.sampled_from(["production", "candidate"])
VALUES = st.integers(0, 5)
POINTS = ("INSERT INTO versions", "INSERT INTO version_parents", "UPDATE condemned", "COMMIT")


class Crash(BaseException):
    """The process dies here."""


class Store(RuleBasedStateMachine):
    """A store, beside what it must be like; a rule for each thing that can happen to it.

    A rule for one more operation (a rollback, a yank) changes the store and ``self``'s idea of it;
    the invariants stay as they are.

    Args:
        migrated: a SQLite file with our tables and no row.
        folder: where this example's store lies.
    """

    versions = Bundle("versions")

    def __init__(self, migrated: Path, folder: Path) -> None:
        super().__init__()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(migrated, folder / "weft.db")
        self.engine = open_database(f"sqlite:///{folder / 'weft.db'}")
        self.blobs = BlobStore(folder / "blobs")
        self.store = AdapterStore(self.engine, self.blobs)
        self.content: dict[str, int] = {}
        self.parents: dict[str, set[str]] = {}
        self.names: dict[str, list[str]] = {}
        self.aliases: dict[tuple[str, str], str] = {}

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

    @rule(version=versions, name=NAMES, alias=ALIASES)
    def promote(self, version: str, name: str, alias: str) -> None:
        if version in self.names.get(name, []):
            self.store.promote(name, alias, version, who="me", why="")
            self.aliases[name, alias] = version
        else:
            with pytest.raises(UnknownVersion):
                self.store.promote(name, alias, version, who="me", why="")

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
        mirror = BlobStore(Path(self.blobs.place.where()).parent / "mirror")
        mirror.put({"x": torch.full((3,), float(self.content[version]))})
        digest = self.store.version(version).tensors
        self.blobs.remove(digest)
        assert [p.subject for p in fsck(self.engine, self.blobs).problems] == [digest]
        assert fsck(self.engine, self.blobs, repair=True, mirrors=[mirror]).is_sound

    @invariant()
    def every_version_is_whole(self) -> None:
        assert {v.id for v in self.store.versions(limit=1000)} == set(self.content)
        for version, value in self.content.items():
            assert torch.equal(self.store.tensors(version)["x"], torch.full((3,), float(value)))
            assert bool(self.store.auxiliary(version)) == bool(value % 2)
            assert {p.id for p in self.store.version(version).parents} == self.parents[version]

    @invariant()
    def every_name_and_alias_says_what_it_should(self) -> None:
        for name, numbered in self.names.items():
            for number, version in enumerate(numbered, 1):
                assert self.store.resolve(f"{name}:v{number}") == version
        for (name, alias), version in self.aliases.items():
            assert self.store.resolve(f"{name}@{alias}") == version

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


def test_whatever_happens_in_any_order_the_store_keeps_its_promises(migrated_sqlite, tmp_path):
    run_state_machine_as_test(
        lambda: Store(migrated_sqlite, tmp_path / "home"),
        settings=settings(
            max_examples=int(os.environ.get("WEFT_FUZZ_EXAMPLES", "8")),
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
