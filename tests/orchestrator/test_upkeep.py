"""``weft fsck``, ``gc`` and ``store`` as people use them."""

import os
import time

import pytest
import torch

from orchestrator.service import open_workspace


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
