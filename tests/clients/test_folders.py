"""Folders appear whole or not at all."""

import pytest

from clients.folders import FolderTaken, whole_folder


def test_nobody_sees_a_part_of_a_folder(tmp_path):
    folder = tmp_path / "deep" / "out"
    with whole_folder(folder) as made:
        (made / "a").write_text("a")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_block_that_fails_leaves_nothing(tmp_path):
    def interrupted():
        with whole_folder(tmp_path / "out") as made:
            (made / "a").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FolderTaken, match="is not empty"), whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_somebody_fills_meanwhile_is_not_overwritten(tmp_path):
    def race():
        with whole_folder(tmp_path / "out") as made:
            (made / "a").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "b").write_text("theirs")

    with pytest.raises(OSError, match="not empty"):
        race()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["b"]
