"""Files that a crash leaves whole or not there at all."""

import errno
import os

import pytest

from clients.files import sync, write_durably


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file"
    write_durably(path, b"old")

    with pytest.raises(TypeError):
        write_durably(path, "not bytes")

    assert path.read_bytes() == b"old"
    write_durably(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_named_by_the_file_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_durably(tmp_path / "update", b"first")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/update'"):
        write_durably(tmp_path / "update", b"second")
    assert [p.name for p in tmp_path.iterdir()] == ["update"]
    assert (tmp_path / "update").read_bytes() == b"first"


def test_a_full_disk_at_the_names_of_a_folder_names_the_folder(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        sync(tmp_path)
