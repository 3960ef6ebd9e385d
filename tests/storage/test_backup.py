import json
import shutil
from pathlib import Path

import pytest
import torch
from sqlalchemy import MetaData, event, select

from storage.backup import MANIFEST, BadBackup, back_up, read_backup
from storage.blobs import BlobStore
from storage.database import connect, migrate, open_database, revision, writing
from storage.fsck import fsck
from storage.garbage import collect
from storage.ledger import ClientRecord, Ledger, Queueing
from storage.restoring import StoreNotEmpty, restore
from storage.schema import HEAD
from storage.store import AdapterStore, YankedVersion

NORTH = {"population": "ward", "client": "north", "round": 1}


def adapter(value: float) -> dict[str, torch.Tensor]:
    return {"q.lora_A.weight": torch.full((2, 3), value)}


@pytest.fixture
def fill(spend):
    """Writes something into every table; returns the versions."""

    def write(store: AdapterStore, ledger: Ledger) -> list[str]:
        made: list[str] = []
        for value in range(3):
            parents = {made[-1]: "round"} if made else {}
            made.append(
                store.commit(
                    adapter(value),
                    auxiliary={"m": torch.ones(value + 1)},
                    parents=parents,
                    recipe={"round": value, "ε": "ü"},
                    metrics={"loss": value / 3},
                )
            )
            store.name("task-1", made[-1])
        store.promote("task-1", "production", made[1], who="me", why="good")
        ledger.add_client(ClientRecord("north", "jsonl:/x", "ward", epsilon=8.0, delta=1e-5))
        waiting = Queueing(owner="me:1", labels={"gpu": "a"})
        ledger.create_run("run-1", "task-1", {}, {"cohort": ["north"]}, 3, waiting)
        ledger.record("run-1", "committed", {"round": 1}, version=made[1], round=1)
        ledger.record_spend(spend("e1", **NORTH))
        return made

    return write


def facts(store: AdapterStore, ledger: Ledger) -> dict[str, object]:
    """All that a backup must bring back."""
    return {
        "versions": {v.id: v for v in store.versions()},
        "tensors": {v.id: str(store.tensors(v.id)) for v in store.versions()},
        "auxiliary": {v.id: str(store.auxiliary(v.id)) for v in store.versions()},
        "names": store.names(),
        "promotions": store.promotions("task-1", "production"),
        "clients": ledger.clients(),
        "budgets": ledger.budgets(),
        "spends": ledger.spends("ward"),
        "plan": ledger.plan("run-1"),
        "events": ledger.events("run-1")[:3],
    }


@pytest.fixture
def fresh(tmp_path):
    """An empty store on SQLite, elsewhere."""
    engine = open_database(f"sqlite:///{tmp_path}/fresh/weft.db")
    blobs = BlobStore(tmp_path / "fresh" / "blobs")
    yield engine, blobs, AdapterStore(engine, blobs), Ledger(engine)
    engine.dispose()


def test_a_backup_brings_everything_back_whatever_database_it_came_from(
    engine, blobs, store, ledger, fresh, tmp_path, fill
):
    fill(store, ledger)
    wanted = facts(store, ledger)
    found = back_up(engine, blobs, tmp_path / "backup")
    assert (found.num_blobs, found.missing, found.schema) == (6, (), HEAD)
    restored = restore(fresh[0], fresh[1], tmp_path / "backup")
    assert (restored.missing, restored.num_spends) == ((), 1)
    assert facts(*fresh[2:]) == wanted
    assert fsck(fresh[0], fresh[1]).problems == ()


def test_a_backup_is_restored_into_any_database(
    engine, blobs, store, ledger, fresh, tmp_path, fill
):
    fill(*fresh[2:])
    wanted = facts(*fresh[2:])
    back_up(fresh[0], fresh[1], tmp_path / "backup")
    restore(engine, blobs, tmp_path / "backup")
    assert facts(store, ledger) == wanted
    assert fsck(engine, blobs).problems == ()
    next_ = store.commit(adapter(7), parents={}, recipe={})  # numbers go on where they ended
    assert store.versions()[0].id == next_


def test_a_run_that_was_going_on_is_paused_and_its_driver_may_write_no_more(
    engine, blobs, store, ledger, fresh, tmp_path, fill
):
    fill(store, ledger)
    token = ledger.run("run-1").token
    back_up(engine, blobs, tmp_path / "backup")
    assert restore(fresh[0], fresh[1], tmp_path / "backup").paused == ("run-1",)
    run = fresh[3].run("run-1")
    assert (run.status, run.owner) == ("paused", None)
    assert run.token > token
    assert fresh[3].queue.claim("you:1", 60) is None


def test_restoring_never_lowers_what_was_spent(engine, blobs, store, ledger, tmp_path, fill, spend):
    fill(store, ledger)
    ledger.record_spend(spend("e2", **NORTH))
    ledger.void_spend("e2", "never sent")
    ledger.record_spend(spend("e3", **NORTH))
    back_up(engine, blobs, tmp_path / "backup")
    ledger.void_spend("e1", "not sent either")  # the backup counts it
    ledger.void_spend("e3", "nor this")
    ledger.record_spend(spend("e2", **NORTH))  # counts again, the backup has it void
    ledger.record_spend(spend("e4", **NORTH | {"round": 2}))  # the backup has it not
    restored = restore(engine, blobs, tmp_path / "backup")
    assert sorted(row.event for row in ledger.spends("ward")) == ["e1", "e2", "e3", "e4"]
    assert restored.num_spends == 4


def test_a_client_that_withdrew_since_the_backup_does_not_come_back(
    engine, blobs, store, ledger, tmp_path, fill
):
    fill(store, ledger)
    back_up(engine, blobs, tmp_path / "backup")
    ledger.withdrawals.add("north", "me", "asked to")
    ledger.remove_client("north")
    restore(engine, blobs, tmp_path / "backup")
    assert ledger.clients() == []
    assert list(ledger.withdrawals.all()) == ["north"]
    assert len(ledger.spends("ward")) == 1


def test_a_yank_since_the_backup_survives_it_and_so_does_one_that_was_taken_back(
    engine, blobs, store, ledger, tmp_path, fill
):
    made = fill(store, ledger)
    store.yank(made[2], who="ann", why="it repeats itself")
    back_up(engine, blobs, tmp_path / "backup")
    store.yank(made[1], who="ann", why="it leaks")
    store.unyank(made[2], who="bob", why="it was the prompt")
    store.name("task-1", store.commit(adapter(9), parents={}, recipe={}))
    before = {version: store.yanks(version) for version in made}
    for _ in range(2):
        restore(engine, blobs, tmp_path / "backup", replace=True)
        assert {version: store.yanks(version) for version in made} == before
    assert [yank.yanked for yank in store.yanks(made[2])] == [False, True]
    assert store.resolve("task-1@production") == made[1]  # aliases are the backup's
    assert store.resolve("task-1") == made[2]
    with pytest.raises(YankedVersion, match="it leaks"):
        store.promote("task-1", "production", made[1], who="ann", why="")


def test_yanks_come_back_with_a_backup(engine, blobs, store, ledger, fresh, tmp_path, fill):
    made = fill(store, ledger)
    store.yank(made[2], who="ann", why="it leaks")
    back_up(engine, blobs, tmp_path / "backup")
    restore(fresh[0], fresh[1], tmp_path / "backup")
    assert fresh[2].yanks(made[2]) == store.yanks(made[2])


def test_one_event_that_is_two_spends_is_refused(
    engine, blobs, store, ledger, fresh, tmp_path, fill, spend
):
    fill(store, ledger)
    back_up(engine, blobs, tmp_path / "backup")
    fresh[3].record_spend(spend("e1", **NORTH, parameters={"steps": 9}))
    with pytest.raises(BadBackup, match="the spend e1 of 'ward' is another one in this store"):
        restore(fresh[0], fresh[1], tmp_path / "backup")
    assert fresh[2].versions() == []


def test_what_the_backup_lacks_is_lost_only_if_that_is_asked_for(
    engine, blobs, store, ledger, tmp_path, fill
):
    made = fill(store, ledger)
    back_up(engine, blobs, tmp_path / "backup")
    newer = store.commit(adapter(9), parents={made[-1]: "round"}, recipe={})
    store.name("bot", newer)
    store.promote("task-1", "production", made[2], who="me", why="better")
    with pytest.raises(StoreNotEmpty, match=r"has 1 rows in \w+ that .*--replace"):
        restore(engine, blobs, tmp_path / "backup")
    assert store.resolve("task-1@production") == made[2]
    restore(engine, blobs, tmp_path / "backup", replace=True)
    assert store.resolve("task-1@production") == made[1]
    assert [row.name for row in store.names()] == ["task-1"]
    assert store.tensors(newer)  # versions are never lost
    assert fsck(engine, blobs).problems == ()


def test_restoring_twice_changes_nothing(engine, blobs, store, ledger, fresh, tmp_path, fill):
    fill(store, ledger)
    back_up(engine, blobs, tmp_path / "backup")
    restore(fresh[0], fresh[1], tmp_path / "backup")
    before = facts(*fresh[2:])
    restore(fresh[0], fresh[1], tmp_path / "backup", replace=True)
    assert facts(*fresh[2:]) == before


def test_a_second_backup_into_the_same_folder_adds_what_is_new(
    engine, blobs, store, ledger, fresh, tmp_path, fill
):
    folder = tmp_path / "backup"
    made = fill(store, ledger)
    back_up(engine, blobs, folder)
    kept = {
        path: path.stat().st_mtime_ns for path in (folder / "blobs").rglob("*") if path.is_file()
    }
    store.commit(adapter(9), parents={made[-1]: "round"}, recipe={})
    assert back_up(engine, blobs, folder).num_blobs == 7
    assert len(list(folder.glob("rows-*"))) == 1
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    restore(fresh[0], fresh[1], folder)
    assert len(fresh[2].versions()) == 4


def test_a_backup_without_room_leaves_the_earlier_one_whole(
    engine, blobs, store, ledger, tmp_path, monkeypatch, fill
):
    folder = tmp_path / "backup"
    made = fill(store, ledger)
    first = back_up(engine, blobs, folder)
    store.commit(adapter(9), parents={made[-1]: "round"}, recipe={})

    def full(*_):
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            back_up(engine, blobs, folder)
    assert read_backup(folder) == first
    assert [path.name for path in folder.glob("rows-*")] == [first.rows]


def test_a_restore_that_fails_in_the_middle_leaves_no_row(
    engine, blobs, store, ledger, fresh, tmp_path, fill
):
    fill(*fresh[2:])
    back_up(fresh[0], fresh[1], tmp_path / "backup")

    def fail(connection, cursor, statement, *rest):
        if statement.startswith("INSERT INTO events"):
            raise KeyError("the process died")

    event.listen(engine, "before_cursor_execute", fail)
    with pytest.raises(KeyError):
        restore(engine, blobs, tmp_path / "backup")
    event.remove(engine, "before_cursor_execute", fail)
    assert store.versions() == []
    assert ledger.spends("ward") == []
    assert fsck(engine, blobs).problems == ()
    restore(engine, blobs, tmp_path / "backup")
    assert facts(store, ledger) == facts(*fresh[2:])


def test_a_blob_that_gc_took_before_a_backup_comes_back_is_put_again(
    engine, blobs, store, ledger, tmp_path, fill
):
    made = fill(store, ledger)
    back_up(engine, blobs, tmp_path / "backup")
    other = open_database(f"sqlite:///{tmp_path}/other.db")
    collect(other, blobs, delete_them=True, grace_s=0)  # nothing in this database reaches them
    restored = restore(other, blobs, tmp_path / "backup")
    assert restored.missing == ()
    assert AdapterStore(other, blobs).tensors(made[0])
    assert collect(other, blobs, delete_them=True, grace_s=0).waiting == ()
    other.dispose()


def test_blobs_that_are_gone_are_named_and_the_rest_comes_back(
    engine, blobs, store, ledger, fresh, tmp_path, fill
):
    made = fill(store, ledger)
    lost = store.version(made[0]).tensors
    blobs.remove(lost)
    assert back_up(engine, blobs, tmp_path / "backup").missing == (lost,)
    assert restore(fresh[0], fresh[1], tmp_path / "backup").missing == (lost,)
    assert fresh[2].tensors(made[1])


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{}"),
        lambda folder: change(folder, rows="../../etc/passwd"),
        lambda folder: change(folder, format=2),
        lambda folder: next(folder.glob("rows-*")).write_bytes(b"other"),
        lambda folder: next(folder.glob("rows-*")).unlink(),
        lambda folder: shutil.rmtree(folder),
    ],
)
def test_a_folder_that_is_no_whole_backup_is_refused(whole, tmp_path, harm):
    shutil.copytree(whole, tmp_path / "backup")
    harm(tmp_path / "backup")
    with pytest.raises(BadBackup, match="backup"):
        read_backup(tmp_path / "backup")


@pytest.fixture(scope="module")
def whole(migrated_sqlite, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "backup"
    engine = open_database(f"sqlite:///{migrated_sqlite}")
    back_up(engine, BlobStore(folder / "none"), folder)
    engine.dispose()
    return folder


def change(folder: Path, **values: object) -> None:
    document = json.loads((folder / MANIFEST).read_text()) | values
    (folder / MANIFEST).write_text(json.dumps(document))


def test_a_folder_of_something_else_is_not_written_into(fresh, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    with pytest.raises(BadBackup, match="not empty and no backup"):
        back_up(fresh[0], fresh[1], tmp_path / "thesis")


@pytest.mark.parametrize("schema", ["0001", "0002", "0005"])
def test_a_backup_of_an_older_schema_is_brought_up_to_date_on_the_way_back(
    empty_url, tmp_path, schema, fresh, fill
):
    """With data in it, on both databases: ids, tensors, logs and spends are the same after."""
    made = fill(*fresh[2:])
    wanted = facts(*fresh[2:])
    old = connect(empty_url)
    migrate(old, schema)
    copy_as(fresh[0], old)
    back_up(old, None, tmp_path / "old")
    assert revision(old) == schema
    migrate(old)
    old.dispose()
    upgraded = open_database(empty_url)
    assert {v.id for v in AdapterStore(upgraded, fresh[1]).versions()} == set(made)
    assert fsck(upgraded, fresh[1]).problems == ()
    assert facts(AdapterStore(upgraded, fresh[1]), Ledger(upgraded)).keys() == wanted.keys()
    upgraded.dispose()

    other = open_database(f"sqlite:///{tmp_path}/other.db")
    assert restore(other, fresh[1], tmp_path / "old").missing == ()
    found = facts(AdapterStore(other, fresh[1]), Ledger(other))
    assert {k: v for k, v in found.items() if k != "events"} == {
        k: v for k, v in wanted.items() if k != "events"
    }
    assert fsck(other, fresh[1]).problems == ()
    other.dispose()


def copy_as(new, old) -> None:
    """Write a store's rows into the tables of an older schema, as that weft would have."""
    theirs, ours = MetaData(), MetaData()
    theirs.reflect(old)
    ours.reflect(new)
    with new.connect() as source, writing(old) as target:
        plans = dict(source.execute(select(ours.tables["plans"])).all())
        versions = ours.tables["versions"].c
        ids = dict(source.execute(select(versions.number, versions.id)).all())
        for table in ours.sorted_tables:
            if table.name not in theirs.tables or table.name == "weft_revision":
                continue
            there = theirs.tables[table.name]
            for row in source.execute(table.select()).mappings():
                if table.name == "runs":
                    row = {**row, "plan": plans[row["id"]]}
                if table.name == "version_parents":  # by id until 0008
                    row = {**row, "child": ids[row["child"]], "parent": ids[row["parent"]]}
                target.execute(there.insert(), {k: v for k, v in row.items() if k in there.c})
