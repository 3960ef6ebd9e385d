import os
import time
from pathlib import Path

import pytest
import torch
from sqlalchemy import Integer

from storage.blobs import BlobStore
from storage.fsck import fsck
from storage.ledger import ClientRecord, Ledger
from storage.schema import metadata


def adapter(value: float) -> dict[str, torch.Tensor]:
    return {"q.lora_A.weight": torch.full((2, 3), value), "q.scaling": torch.tensor(2.0)}


@pytest.fixture
def history(store, ledger) -> list[str]:
    """Three versions in a row, two names, an alias, and a run with its log."""
    made: list[str] = []
    for value in range(3):
        parents = {made[-1]: "round"} if made else {}
        recipe = {"round": value, "updates": [{"client": "north"}]}
        made.append(store.commit(adapter(value), parents=parents, recipe=recipe))
        store.name("task-1", made[-1])
    store.name("bot", made[2])
    store.promote("bot", "production", made[2], who="me", why="")
    store.yank(made[0], who="me", why="it was the first")
    ledger.create_run("run-1", "task-1", config={}, plan={}, rounds=3)
    ledger.record("run-1", "committed", {"round": 1}, status="running", version=made[1], round=1)
    return made


def file_of(blobs: BlobStore, digest: str) -> Path:
    return Path(blobs.place.where()) / digest[:2] / digest[2:]


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def unchecked(engine, *statements: str) -> None:
    """Do what no weft does, as somebody with a shell might."""
    raw = engine.raw_connection()
    off = {
        "sqlite": "PRAGMA foreign_keys = OFF",
        "postgresql": "SET session_replication_role = replica",
    }
    cursor = raw.cursor()
    for statement in (off[engine.dialect.name], *statements):
        cursor.execute(statement)
    raw.commit()
    raw.invalidate()  # who comes next has them checked again
    raw.close()


def kinds(checkup) -> list[tuple[str, str]]:
    return [(problem.kind, problem.subject) for problem in checkup.problems]


def test_a_store_that_nobody_harmed_is_sound(engine, blobs, history):
    found = fsck(engine, blobs)
    assert found.problems == ()
    assert found.is_sound
    assert (found.orphans, found.drafts, found.strangers) == ((), (), ())
    assert found.num_blobs == 3


def test_an_empty_store_is_sound(engine, blobs):
    assert fsck(engine, blobs).is_sound


@pytest.mark.parametrize("harm", [alter, lambda path: path.write_bytes(path.read_bytes()[:-3])])
def test_an_altered_or_truncated_blob_is_found_and_fetched_from_a_mirror(
    engine, blobs, store, history, tmp_path, harm
):
    digest = store.version(history[1]).tensors
    mirror = BlobStore(tmp_path / "mirror")
    mirror.put(adapter(1))
    harm(file_of(blobs, digest))
    assert kinds(fsck(engine, blobs)) == [("blob-corrupt", digest)]
    assert not fsck(engine, blobs, repair=True).is_sound  # from nowhere
    mended = fsck(engine, blobs, repair=True, mirrors=[BlobStore(tmp_path / "none"), mirror])
    assert mended.is_sound
    assert mended.problems[0].repaired == f"written again from {tmp_path}/mirror"
    assert fsck(engine, blobs).problems == ()
    assert torch.equal(store.tensors(history[1])["q.lora_A.weight"], torch.ones(2, 3))


def test_a_mirror_that_is_corrupt_itself_repairs_nothing(engine, blobs, store, history, tmp_path):
    digest = store.version(history[1]).tensors
    mirror = BlobStore(tmp_path / "mirror")
    mirror.put(adapter(1))
    alter(file_of(mirror, digest))
    file_of(blobs, digest).unlink()
    found = fsck(engine, blobs, repair=True, mirrors=[mirror])
    assert kinds(found) == [("blob-missing", digest)]
    assert not found.is_sound


def test_a_missing_blob_is_written_again_from_the_cache(engine, store, history, blobs, tmp_path):
    cached = BlobStore(blobs.place, BlobStore(tmp_path / "cache").place)
    digest = store.version(history[1]).tensors
    cached.get(digest)
    file_of(blobs, digest).unlink()
    assert [p.repaired for p in fsck(engine, cached, repair=True).problems] == [
        "written again from the cache"
    ]
    assert fsck(engine, blobs).is_sound


def test_an_altered_blob_that_no_row_names_is_removed_by_a_repair(engine, blobs, history):
    digest = blobs.put(adapter(9))
    alter(file_of(blobs, digest))
    assert kinds(fsck(engine, blobs)) == [("blob-corrupt", digest)]
    assert fsck(engine, blobs, repair=True).is_sound
    assert not file_of(blobs, digest).exists()


def test_what_a_dead_writer_left_is_garbage_and_no_problem(engine, blobs, history):
    orphan = blobs.put(adapter(9))
    draft = file_of(blobs, orphan).with_name(".cut-short")
    draft.write_bytes(b"half")
    young = draft.with_name(".being-written")
    young.write_bytes(b"half")
    os.utime(draft, (time.time() - 7200,) * 2)
    (Path(blobs.place.where()) / "README").write_text("mine")
    found = fsck(engine, blobs)
    assert found.is_sound
    assert found.orphans == (orphan,)
    assert [entry.name for entry in found.drafts] == [f"{orphan[:2]}/.cut-short"]
    assert found.strangers == ("README",)
    fsck(engine, blobs, repair=True)
    assert not draft.exists()
    assert young.exists()
    assert blobs.has(orphan)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE versions SET recipe = '{{}}' WHERE {second}", {"version"}),
        ("UPDATE versions SET recipe = 'not json' WHERE {second}", {"version"}),
        ("DELETE FROM version_parents", {"version"}),
        ("UPDATE version_parents SET kind = 'merge'", {"version"}),
        ("DELETE FROM versions WHERE {second}", {"reference", "version"}),
        ("DELETE FROM named_versions WHERE name = 'task-1' AND number = 2", {"name"}),
        ("UPDATE promotions SET number = 2", {"alias"}),
        ("DELETE FROM named_versions WHERE name = 'bot'", {"alias"}),
        ("DELETE FROM names WHERE name = 'bot'", {"reference"}),
        ("UPDATE runs SET round = 7", {"run"}),
        ("UPDATE runs SET labels = '?'", {"run"}),
        ("DELETE FROM events WHERE seq = 1", {"run"}),
        ("UPDATE events SET changes = '?' WHERE seq = 1", {"run"}),
    ],
)
def test_a_row_that_somebody_changed_is_found(engine, blobs, history, statement, expected):
    second = f"id = '{history[1]}'"
    unchecked(engine, statement.format(second=second))
    assert {kind for kind, _ in kinds(fsck(engine, blobs))} == expected


def test_a_cycle_of_parents_is_found_and_does_not_hang(engine, blobs, store, history):
    first, _, last = history
    edge = f"SELECT a.number, b.number, 'round' FROM versions a, versions b WHERE a.id = '{first}'"
    unchecked(engine, f"INSERT INTO version_parents {edge} AND b.id = '{last}'")
    found = {kind for kind, _ in kinds(fsck(engine, blobs))}
    assert found == {"edge", "version"}
    with pytest.raises(RuntimeError, match="does not hash to its id"):
        store.lineage(last)


def test_an_edge_to_a_version_without_a_row_is_told(engine, store, history):
    unchecked(engine, f"DELETE FROM versions WHERE id = '{history[1]}'")
    with pytest.raises(RuntimeError, match=r"the version of number \d+ is listed and has no row"):
        store.edges(history[2])
    with pytest.raises(RuntimeError, match="does not hash to its id"):
        store.lineage(history[2])


_KEYS = (key for table in metadata.sorted_tables for key in table.foreign_keys)
REFERENCES = sorted((key.parent for key in _KEYS), key=str)


@pytest.mark.parametrize("column", REFERENCES, ids=str)
def test_every_reference_of_every_table_is_checked(engine, blobs, history, ledger, column):
    """Also those that a later migration adds: it must add rows for them to the history here."""
    ledger.add_client(ClientRecord(name="north", data="jsonl:/x", population="ward"))
    metric = f"INSERT INTO metrics VALUES ('{history[0]}', 'loss', 0.5)"
    name, number = column.name, isinstance(column.type, Integer)
    other = f"{name} + 1000" if number else f"{name} || '-nowhere'"
    kept = f"INSERT INTO kept_updates VALUES ('d', 'run-1', 'north', 1, '{history[1]}', NULL)"
    unchecked(engine, metric, kept, f"UPDATE {column.table.name} SET {name} = {other}")
    assert ("reference", str(column)) in kinds(fsck(engine, blobs))


def test_a_version_that_is_not_found_by_its_clients_is_told(engine, blobs, history):
    second, third = (
        f"number = (SELECT number FROM versions WHERE id = '{i}')" for i in history[1:]
    )
    moved = f"UPDATE contributions SET client = 'south' WHERE {second}"
    unchecked(engine, f"DELETE FROM contributions WHERE {third}", moved)
    found = fsck(engine, blobs).problems
    assert [(p.kind, p.subject) for p in found] == [("contribution", id) for id in history[1:]]
    assert ["north, south" in p.text for p in found] == [True, False]


def test_a_check_tells_how_far_it_is(engine, blobs, history):
    seen: list[tuple[int, int]] = []
    fsck(engine, blobs, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_check_changes_nothing(engine, blobs, history):
    orphan = blobs.put(adapter(9))
    alter(file_of(blobs, orphan))
    before = sorted(blobs.place.entries(), key=lambda entry: entry.name)
    fsck(engine, blobs)
    assert sorted(blobs.place.entries(), key=lambda entry: entry.name) == before


def test_a_run_that_went_through_the_queue_is_sound(engine, blobs):
    ledger = Ledger(engine)
    ledger.create_run("run-1", "task-1", config={}, plan={}, rounds=3)
    claimed = ledger.queue.claim("me:1", 60)
    ledger.queue.renew("run-1", claimed.token, 60)
    ledger.record("run-1", "failed", {}, token=claimed.token, status="failed", error="oh")
    assert fsck(engine, blobs).problems == ()
