import multiprocessing
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from storage.blobs import BlobStore
from storage.database import open_database, writing
from storage.fsck import fsck
from storage.garbage import GRACE_S, collect
from storage.references import claim
from storage.store import AdapterStore

NOW = datetime(2026, 1, 2, tzinfo=UTC)
LATER = NOW + timedelta(seconds=GRACE_S)


def adapter(value: float) -> dict[str, torch.Tensor]:
    return {"q.lora_A.weight": torch.full((2, 3), value)}


def commit(store: AdapterStore, value: float, **recipe) -> str:
    return store.commit(adapter(value), parents={}, recipe=recipe)


def test_nothing_that_a_version_needs_is_ever_removed(engine, blobs, store):
    version = store.commit(
        adapter(1),
        auxiliary={"momentum": torch.ones(2)},
        memory={"m": torch.ones(3)},
        parents={},
        recipe={},
    )
    for _ in range(3):
        found = collect(engine, blobs, delete_them=True, grace_s=0)
        assert (found.removed, found.waiting, found.num_reached) == ((), (), 3)
    assert store.auxiliary(version)
    assert store.memory(version)


def test_an_orphan_is_condemned_first_and_removed_after_the_grace(engine, blobs, store):
    kept, orphan = commit(store, 1), blobs.put(adapter(2))
    first = collect(engine, blobs, delete_them=True, moment=NOW)
    assert [one.digest for one in first.waiting] == [orphan]
    assert first.removed == ()
    early = collect(engine, blobs, delete_them=True, moment=LATER - timedelta(seconds=1))
    assert early.removed == ()
    assert early.waiting[0].since == NOW
    done = collect(engine, blobs, delete_them=True, moment=LATER)
    assert [one.digest for one in done.removed] == [orphan]
    assert done.removed_bytes > 0
    assert not blobs.has(orphan)
    assert torch.equal(store.tensors(kept)["q.lora_A.weight"], torch.ones(2, 3))
    assert collect(engine, blobs, delete_them=True, moment=LATER).removed == ()


def test_a_dry_run_says_what_would_be_removed_and_changes_nothing(engine, blobs):
    orphan = blobs.put(adapter(2))
    assert [one.digest for one in collect(engine, blobs, grace_s=0).removed] == [orphan]
    assert [one.digest for one in collect(engine, blobs, moment=LATER).waiting] == [orphan]
    assert blobs.has(orphan)
    # it condemned nothing either: the grace begins with the pass that may delete
    assert collect(engine, blobs, delete_them=True, moment=LATER).removed == ()


def test_a_commit_rescues_a_condemned_blob(engine, blobs, store):
    blobs.put(adapter(2))
    collect(engine, blobs, delete_them=True, moment=NOW)
    version = commit(store, 2)
    found = collect(engine, blobs, delete_them=True, moment=LATER)
    assert (found.removed, found.waiting) == ((), ())
    assert store.tensors(version)


def test_a_blob_that_is_removed_between_put_and_row_is_put_again(engine, blobs, monkeypatch):
    """The writer found it stored, and slept over its grace; `gc` ran before it wrote the row."""
    orphan = blobs.put(adapter(2))
    collect(engine, blobs, delete_them=True, moment=NOW)
    slow = BlobStore(blobs.place)
    store, put, puts = AdapterStore(engine, slow), slow.put, []

    def put_and_sleep(tensors):
        digest = put(tensors)
        puts.append(digest)
        if len(puts) == 1:
            assert collect(engine, blobs, delete_them=True, moment=LATER).removed
        return digest

    monkeypatch.setattr(slow, "put", put_and_sleep)
    version = commit(store, 2)
    assert puts == [orphan, orphan]
    assert torch.equal(store.tensors(version)["q.lora_A.weight"], torch.full((2, 3), 2.0))
    assert fsck(engine, blobs).is_sound


def test_a_blob_that_is_removed_and_put_again_begins_a_new_grace(engine, blobs):
    orphan = blobs.put(adapter(2))
    collect(engine, blobs, delete_them=True, moment=NOW)
    assert collect(engine, blobs, delete_them=True, moment=LATER).removed
    blobs.put(adapter(2))
    found = collect(engine, blobs, delete_them=True, moment=LATER)
    assert found.removed == ()
    assert [(one.digest, one.since) for one in found.waiting] == [(orphan, LATER)]


def test_a_pass_that_dies_after_removing_a_file_harms_no_later_commit(engine, blobs, store):
    orphan = blobs.put(adapter(2))
    collect(engine, blobs, delete_them=True, moment=NOW)
    blobs.remove(orphan)  # as far as the pass came before its transaction ended
    with writing(engine) as connection:
        assert claim(connection, blobs, [orphan, None]) == [orphan]
    version = commit(store, 2)
    assert store.tensors(version)
    assert fsck(engine, blobs).is_sound


def test_a_draft_is_removed_only_when_its_writer_must_be_dead(engine, blobs):
    folder = Path(blobs.place.where()) / "ab"
    folder.mkdir(parents=True)
    for name, age in ((".old", 7200), (".young", 60)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    found = collect(engine, blobs, delete_them=True, grace_s=0)
    assert [entry.name for entry in found.drafts] == ["ab/.old"]
    assert [path.name for path in folder.iterdir()] == [".young"]


def test_a_negative_grace_is_refused(engine, blobs):
    with pytest.raises(ValueError, match="grace must be >= 0 seconds, got -1"):
        collect(engine, blobs, grace_s=-1)


def write(url: str, folder: Path, writer: int) -> None:
    """Commit what others commit and abandon too, and now and then abandon a blob."""
    torch.set_num_threads(1)
    engine = open_database(url)
    blobs = BlobStore(folder)
    store = AdapterStore(engine, blobs)
    for number in range(15):
        blobs.put(adapter(number + 1))  # somebody commits it next, or nobody
        commit(store, number, writer=writer)
    engine.dispose()


def clean(url: str, folder: Path, ended) -> None:
    torch.set_num_threads(1)
    engine = open_database(url)
    while not ended.is_set():
        collect(engine, BlobStore(folder), delete_them=True, grace_s=0)
    engine.dispose()


def test_passes_beside_writers_in_other_processes_take_nothing_from_them(
    url, engine, blobs, store, tmp_path
):
    processes = multiprocessing.get_context("fork")
    ended = processes.Event()
    engine.dispose()  # a child must not share a connection
    where = tmp_path / "blobs"
    writers = [processes.Process(target=write, args=(url, where, n)) for n in range(2)]
    cleaners = [processes.Process(target=clean, args=(url, where, ended)) for _ in range(2)]
    for process in (*cleaners, *writers):
        process.start()
    for process in writers:
        process.join(120)
    ended.set()
    for process in cleaners:
        process.join(120)
    assert [process.exitcode for process in (*writers, *cleaners)] == [0] * 4
    assert len(store.versions(limit=1000)) == 30
    found = fsck(engine, blobs)
    assert found.problems == ()
    assert len(found.orphans) <= 1
