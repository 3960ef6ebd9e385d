"""``weft fsck``, ``gc`` and ``store`` as people use them."""

import os
import sqlite3
import time

import pytest
import torch
from alembic import command

from clients.site import Site
from orchestrator.federation import Federation
from orchestrator.replay import replay
from orchestrator.service import open_workspace
from orchestrator.upkeep import upgrade
from storage import database
from storage.ledger import ClientRecord
from storage.schema import HEAD


@pytest.fixture
def home(tmp_path):
    """A home with two versions and a name, in the folder that the command line uses."""
    workspace = open_workspace(tmp_path / "home")
    first = workspace.store.commit({"x": torch.zeros(2)}, parents={}, recipe={"round": 0})
    second = workspace.store.commit({"x": torch.ones(2)}, parents={first: "round"}, recipe={})
    workspace.store.name("bot", second)
    workspace.close()
    return tmp_path / "home"


def blob_files(home):
    return sorted(p for p in (home / "blobs").rglob("*") if p.is_file())


def test_a_sound_store_says_so(ok, read, home):
    assert "2 blobs, 0.0 MiB; sound" in ok("fsck")
    found = read("fsck")
    assert found["sound"]
    assert found["problems"] == []


def test_a_damaged_store_exits_with_1_and_is_mended_from_a_mirror(weft, ok, home, tmp_path):
    (home / "blobs").rename(tmp_path / "mirror")
    status, said, _ = weft("fsck")
    assert status == 1
    assert "2 problems" in said
    assert "versions.tensors names it" in said
    assert "2 repaired" in ok("fsck", "--repair", "--mirror", tmp_path / "mirror")
    assert ok("fsck").endswith("sound\n")


def test_what_a_killed_process_left_in_the_home_is_found_and_removed(ok, read, home):
    folder = home / "sites" / "abc"
    folder.mkdir(parents=True)
    old, young, key = (folder / name for name in ("tmpabcd1234", "tmpabcd5678", "key"))
    for path in (old, young, key):
        path.write_bytes(b"x")
    for path in (old, key):
        os.utime(path, (time.time() - 7200,) * 2)
    assert read("fsck")["home_drafts"] == [str(old)]
    assert old.exists()
    assert read("gc")["drafts"] == [str(old)]
    assert "removed 0 blobs and 1 drafts" in ok("gc", "--delete")
    assert sorted(folder.iterdir()) == [key, young]


def test_the_store_says_where_it_lies_and_how_full_its_cache_is(
    ok, read, refused, home, monkeypatch
):
    assert "2 versions, 1 names, 0 runs, 0 client updates kept" in ok("store", "show")
    assert read("store", "show")["cache"] is None
    monkeypatch.setenv("WEFT_BLOBS", "memory://shown")
    monkeypatch.setenv("WEFT_BLOB_CACHE", "2MiB")
    workspace = open_workspace(home)
    size = len(workspace.blobs.fetch(workspace.blobs.put({"x": torch.ones(3)})))
    workspace.close()
    assert f"{home / 'cache' / 'blobs'}, 0.0 of 2.0 MiB" in ok("store", "show")
    found = read("store", "show")
    assert (found["cache_bytes"], found["cache_limit_bytes"]) == (size, 2 * 2**20)
    monkeypatch.setenv("WEFT_BLOB_CACHE", "0")
    assert read("store", "show")["cache"] is None
    monkeypatch.setenv("WEFT_BLOB_CACHE", "lots")
    assert "got 'lots'; set WEFT_BLOB_CACHE" in refused("store", "show")


def test_gc_is_a_dry_run_unless_it_is_told_to_delete(ok, read, home):
    (home / "blobs" / "stray").write_text("not a blob")
    workspace = open_workspace(home)
    orphan = workspace.blobs.put({"x": torch.full((2,), 9.0)})
    workspace.close()
    said = ok("gc")
    assert f"condemned  {orphan[:12]}" in said
    assert "--delete does it" in said
    assert read("gc", "--delete")["removed"] == []
    assert [b["digest"] for b in read("gc", "--delete", "--grace-s", "0")["removed"]] == [orphan]
    assert len(blob_files(home)) == 3
    assert read("gc")["num_reached"] == 2


def test_blobs_lie_where_the_environment_says(ok, read, home, tmp_path, monkeypatch):
    (home / "blobs").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("WEFT_BLOBS", str(tmp_path / "elsewhere"))
    assert ok("fsck").endswith("sound\n")
    monkeypatch.setenv("WEFT_BLOBS", f"file://{tmp_path}/elsewhere")
    assert ok("fsck").endswith("sound\n")
    monkeypatch.setenv("WEFT_BLOBS", "memory://nothing")
    workspace = open_workspace()
    assert workspace.blobs.cache is not None
    workspace.close()


def test_a_blobs_url_with_a_password_is_refused_without_showing_it(refused, monkeypatch):
    monkeypatch.setenv("WEFT_BLOBS", "s3://me:hush@bucket/weft")
    said = refused("runs", "list")
    assert "may hold no password" in said
    assert "hush" not in said


def test_a_backup_is_restored_into_another_home_with_the_notes_on_base_models(
    ok, read, home, tmp_path, monkeypatch
):
    (home / "bases").mkdir()
    (home / "bases" / "abc.json").write_text('{"id": "somewhere"}')
    assert "2 blobs" in ok("store", "backup", tmp_path / "copy")
    wanted = read("show", "bot")
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "other"))
    said = ok("store", "restore", tmp_path / "copy")
    assert "restored 2 versions" in said
    assert said.endswith("2 blobs, 0.0 MiB; sound\n")
    assert read("show", "bot") == wanted
    assert (tmp_path / "other" / "bases" / "abc.json").read_text() == '{"id": "somewhere"}'


def test_restoring_heals_a_damaged_home(ok, home, tmp_path, weft):
    ok("store", "backup", tmp_path / "copy")
    for path in blob_files(home):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert weft("fsck")[0] == 1
    assert "2 repaired" in ok("store", "restore", tmp_path / "copy")
    assert ok("fsck").endswith("sound\n")


def test_restoring_over_something_newer_is_refused_unless_it_is_asked_for(
    ok, refused, read, home, tmp_path
):
    ok("store", "backup", tmp_path / "copy")
    ok("promote", "bot", "--to", "production")
    assert "--replace" in refused("store", "restore", tmp_path / "copy")
    ok("store", "restore", tmp_path / "copy", "--replace")
    assert read("show", "bot")["aliases"] == []


def test_an_unfinished_private_run_is_cancelled_where_its_clients_keys_are_not(
    ok, read, home, tmp_path, monkeypatch, spend
):
    """With new keys, clients would answer the same assignment twice, and the ledger count once."""
    workspace = open_workspace(home)
    for run, privacy in (("private", {"epsilon": 8}), ("plain", None)):
        config = {"privacy": privacy}
        workspace.ledger.create_run(run, run, config=config, plan={}, rounds=3)
        workspace.ledger.record_spend(spend(run, run=run, client="north"))
    Site(home / "sites").run_key("private", "north")
    workspace.close()
    ok("store", "backup", tmp_path / "copy")
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "other"))
    found = read("store", "restore", tmp_path / "copy")
    assert (found["paused"], found["cancelled"]) == (["private", "plain"], ["private"])
    assert {r["id"]: r["status"] for r in read("runs", "list")} == {
        "private": "cancelled",
        "plain": "paused",
    }
    monkeypatch.setenv("WEFT_HOME", str(home))  # where the keys are
    assert read("store", "restore", tmp_path / "copy", "--replace")["cancelled"] == []


def test_an_unfinished_private_run_goes_on_where_a_site_keeps_the_keys(
    ok, read, home, tmp_path, monkeypatch, spend
):
    workspace = open_workspace(home)
    workspace.ledger.add_client(ClientRecord("north", "site:notes", "north", num_examples=500))
    config = {"privacy": {"epsilon": 8}}
    workspace.ledger.create_run("private", "private", config=config, plan={}, rounds=3)
    workspace.ledger.record_spend(spend("private", run="private", client="north"))
    workspace.close()
    ok("store", "backup", tmp_path / "copy")
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "other"))

    found = read("store", "restore", tmp_path / "copy")

    assert (found["paused"], found["cancelled"]) == (["private"], [])


def downgrade(home, schema):
    """Make a home's database one of an older weft."""
    engine, config = database.connect(f"sqlite:///{home / 'weft.db'}"), database._alembic()
    with database.writing(engine) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, schema)
    engine.dispose()


def test_an_older_store_is_refused_by_all_but_upgrade_which_backs_it_up(
    ok, refused, read, home, tmp_path, monkeypatch
):
    wanted = read("show", "bot")
    downgrade(home, "0002")
    for argv in (("runs", "list"), ("fsck",), ("show", "bot"), ("store", "backup", "x")):
        assert "older weft (schema 0002)" in refused(*argv)
    found = read("store", "upgrade")
    assert found["from"] == "0002"
    assert found["check"]["sound"]
    assert read("show", "bot") == wanted
    assert "is up to date" in ok("store", "upgrade")
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("WEFT_BLOBS", str(home / "blobs"))
    ok("store", "restore", found["backup"])
    assert read("show", "bot") == wanted


def test_updates_that_an_older_weft_kept_in_folders_become_blobs_of_the_store(
    workspace, make_plan, imagined, kept
):
    plan = make_plan(rounds=2, retention="all")
    workspace.ledger.create_run("run-1", "task-1", plan.config.model_dump(mode="json"), {})
    made = (plan, workspace.store, workspace.ledger, imagined(), workspace.home)
    version = Federation(*made).run()
    wanted, folder = kept(workspace), workspace.home / "runs" / "run-1"
    for (round_, client), digest in wanted.items():
        path = folder / f"round-{round_}" / f"{client}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(workspace.store.updates.read(digest))
    (folder / "round-2" / "c.safetensors").rename(folder / "round-2" / "c.withdrawn.json")
    (folder / "round-3").mkdir()
    (folder / "round-3" / "a.safetensors").write_bytes(b"of a round that is not decided")
    workspace.store.updates.drop("run-1")
    workspace.ledger.withdrawals.add("c", "me", "")
    workspace.close()
    downgrade(workspace.home, "0005")

    for schema in ("0005", HEAD):
        before, _, found = upgrade(workspace.home)
        assert before == schema
        assert found.store.problems == found.store.orphans == ()
        here = open_workspace(workspace.home)
        assert (len(kept(here)), len(kept(here, buried=True))) == (4, 2)
        assert {**kept(here), **kept(here, buried=True)} == wanted
        [found] = replay(here, version)
        assert found.why.endswith("of c in round 2 was withdrawn")
        assert [p.name for p in folder.rglob("*.*")] == ["a.safetensors"]
        here.close()


def test_a_newer_store_is_not_upgraded(refused, ok, home):
    with sqlite3.connect(home / "weft.db") as rows:
        rows.execute("UPDATE weft_revision SET version_num = '9999'")
    rows.close()
    assert "newer weft (schema 9999)" in refused("store", "upgrade")
    assert not (home / "backups").exists()
