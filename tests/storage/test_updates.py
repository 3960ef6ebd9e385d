"""Kept updates: blobs that outlive their files, for as long as a run keeps them, whatever dies."""

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from sqlalchemy import event

from storage.blobs import BlobStore, digest_of
from storage.buckets import Bucket
from storage.database import open_database
from storage.fsck import fsck
from storage.garbage import collect
from storage.store import AdapterStore
from storage.updates import Leaf, UpdateGone, Updates


@pytest.fixture
def spilled(tmp_path):
    """Return a function that writes an update to a file, as a run does."""

    def write(client: str, round_: int = 1) -> Leaf:
        data = f"update of {client} in {round_}".encode()
        path = tmp_path / "runs" / f"round-{round_}" / client
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return Leaf(client, hashlib.sha256(data).hexdigest(), path)

    return write


@pytest.fixture
def made(store, ledger, spilled):
    """Return a function that commits a round's version and keeps its updates for some runs."""

    def make(round_: int = 1, runs=("run-1",), clients=("a", "b")) -> list[Leaf]:
        leaves = [spilled(client, round_) for client in clients]
        recipe = {"updates": [{"client": one.client, "digest": one.digest} for one in leaves]}
        version = store.commit({"x": torch.ones(round_)}, parents={}, recipe=recipe)
        for run in runs:
            if run not in {record.id for record in ledger.runs()}:
                ledger.create_run(run, "task-1", {}, {})
            store.updates.keep(run, version, round_, leaves)
        return leaves

    return make


def stored(blobs: BlobStore) -> set[str]:
    return {d for e in blobs.place.entries() if (d := digest_of(e.name)) is not None}


def removed_by_gc(engine, blobs) -> set[str]:
    passes = (collect(engine, blobs, delete_them=True, grace_s=0) for _ in range(2))
    return {one.digest for found in passes for one in found.removed}


def test_what_is_kept_is_read_when_its_file_is_gone_and_is_safe_from_gc(engine, blobs, store, made):
    leaves = made()
    wanted = [one.path.read_bytes() for one in leaves]
    for one in leaves:
        one.path.unlink()
    assert removed_by_gc(engine, blobs) == set()
    assert [store.updates.read(one.digest) for one in leaves] == wanted
    found = fsck(engine, blobs)
    assert (found.problems, found.orphans) == ((), ())


def test_nothing_is_written_twice_where_the_disk_can_link(blobs, made):
    for one in made():
        where = Path(blobs.place.where()) / one.digest[:2] / one.digest[2:]
        assert where.samefile(one.path)


def test_where_the_disk_cannot_link_it_is_copied(blobs, store, made, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    [one, _] = made()
    where = Path(blobs.place.where()) / one.digest[:2] / one.digest[2:]
    assert not where.samefile(one.path)
    assert store.updates.read(one.digest) == one.path.read_bytes()


def test_updates_are_kept_in_a_bucket_too(engine, ledger, spilled):
    blobs = BlobStore(Bucket("memory://kept"))
    store = AdapterStore(engine, blobs)
    version = store.commit({"x": torch.ones(1)}, parents={}, recipe={})
    ledger.create_run("run-1", "task-1", {}, {})
    leaves = [spilled(name) for name in "abc"]
    store.updates.keep("run-1", version, 1, leaves)
    assert [store.updates.read(one.digest) for one in leaves] == [
        one.path.read_bytes() for one in leaves
    ]
    assert store.updates.drop("run-1") == 3
    assert stored(blobs) == {store.version(version).tensors}


def test_what_is_dropped_is_removed_and_what_another_run_keeps_is_not(engine, blobs, store, made):
    first, second = made(1, runs=("run-1", "run-2")), made(2)
    assert store.updates.drop("run-1", until=1) == 2
    assert {one.digest for one in first + second} <= stored(blobs)
    assert store.updates.drop("run-1") == 2
    assert store.updates.drop("run-1") == 0
    with pytest.raises(UpdateGone, match=r"is not kept \(see retention\)"):
        store.updates.read(second[0].digest)
    assert store.updates.drop("run-2") == 2
    assert not {one.digest for one in first + second} & stored(blobs)
    assert fsck(engine, blobs).is_sound


def test_a_tombstone_stays_of_who_withdrew_whatever_is_dropped(engine, blobs, store, ledger, made):
    one, other = made()
    ledger.withdrawals.add("a", "me", "asked to")
    assert (store.updates.bury(), store.updates.bury()) == (1, 0)
    assert (blobs.has(one.digest), blobs.has(other.digest)) == (False, True)
    assert store.updates.drop("run-1") == 1
    with pytest.raises(UpdateGone, match="was withdrawn"):
        store.updates.read(one.digest)
    assert fsck(engine, blobs).problems == ()


def test_of_who_withdrew_before_no_byte_is_kept(blobs, store, ledger, made):
    ledger.withdrawals.add("a", "me", "")
    one, other = made()
    assert (blobs.has(one.digest), blobs.has(other.digest)) == (False, True)
    with pytest.raises(UpdateGone, match="was withdrawn"):
        store.updates.read(one.digest)


def test_a_blob_that_gc_took_before_its_row_came_is_put_again(engine, blobs, store, made):
    leaves = made()
    version = store.versions()[0].id
    store.updates.drop("run-1")
    collected = []

    def gc_is_faster(connection, cursor, statement, *rest):
        if statement.startswith("SELECT withdrawals") and not collected:
            collected.append(True)
            for one in leaves:
                blobs.adopt({one.digest: one.path})
            collected.append(removed_by_gc(engine, blobs))

    event.listen(engine, "before_cursor_execute", gc_is_faster)
    store.updates.keep("run-1", version, 1, leaves)
    event.remove(engine, "before_cursor_execute", gc_is_faster)
    assert collected[1:] == [{one.digest for one in leaves}]
    assert {one.digest for one in leaves} <= stored(blobs)
    assert fsck(engine, blobs).is_sound


@pytest.mark.parametrize("dies_at", ["INSERT INTO kept_updates", "COMMIT"])
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_killed_before_its_row_it_leaves_garbage_for_gc_only(
    engine, url, blobs, store, ledger, spilled, dies_at
):
    leaves = [spilled("a"), spilled("b")]
    recipe = {"updates": [{"client": one.client, "digest": one.digest} for one in leaves]}
    version = store.commit({"x": torch.ones(1)}, parents={}, recipe=recipe)
    ledger.create_run("run-1", "task-1", {}, {})

    def keep() -> None:
        def die(connection, cursor=None, statement=dies_at, *rest):
            if statement.startswith(dies_at):
                os.kill(os.getpid(), signal.SIGKILL)

        own = open_database(url)
        event.listen(own, "commit" if dies_at == "COMMIT" else "before_cursor_execute", die)
        Updates(own, BlobStore(blobs.place.where())).keep("run-1", version, 1, leaves)

    engine.dispose()  # a child must not share a connection
    process = multiprocessing.get_context("fork").Process(target=keep)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    digests = {one.digest for one in leaves}
    found = fsck(engine, blobs)
    assert (found.problems, set(found.orphans)) == ((), digests)
    assert removed_by_gc(engine, blobs) == digests
    store.updates.keep("run-1", version, 1, leaves)
    assert fsck(engine, blobs).orphans == ()
    assert [store.updates.read(one.digest) for one in leaves] == [
        one.path.read_bytes() for one in leaves
    ]


def test_what_a_crash_leaves_of_dropped_updates_gc_removes(engine, blobs, store, made, monkeypatch):
    leaves = made()

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            store.updates.drop("run-1")
    found = fsck(engine, blobs)
    assert (found.problems, set(found.orphans)) == ((), {one.digest for one in leaves})
    assert removed_by_gc(engine, blobs) == {one.digest for one in leaves}


def test_an_update_that_its_version_was_not_made_of_is_found(engine, blobs, store, spilled, made):
    made()
    stranger = spilled("c")
    store.updates.keep("run-1", store.versions()[0].id, 1, [stranger])
    [problem] = fsck(engine, blobs).problems
    assert (problem.kind, problem.subject) == ("update", stranger.digest)


def test_a_missing_update_comes_back_from_a_mirror(engine, blobs, store, made, tmp_path):
    [one, _] = made()
    mirror = BlobStore(tmp_path / "mirror")
    mirror.adopt({one.digest: one.path})
    blobs.remove(one.digest)
    with pytest.raises(UpdateGone, match=f"cannot be read: no blob {one.digest[:12]}"):
        store.updates.read(one.digest)
    assert fsck(engine, blobs, repair=True, mirrors=[mirror]).is_sound
    assert store.updates.read(one.digest) == one.path.read_bytes()
