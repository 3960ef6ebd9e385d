"""A key is destroyed for good, and a crash on the way leaves it whole or not there."""

import os
from pathlib import Path

import pytest

from clients.assignment import Privacy
from clients.keys import destroy_key, has_key, run_folder, site_mark
from clients.site import Site, UpdateGone
from clients.trainer import train

PRIVATE = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5)
CALLS = (("fsync", os), ("rename", Path), ("unlink", Path))


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def kill_at(monkeypatch):
    """Return a function that makes the n-th call that changes the disk the last."""

    def install(number):
        made = []

        def hooked(name, call):
            def last(*args, **kwargs):
                made.append(name)
                if len(made) == number:
                    raise Killed
                return call(*args, **kwargs)

            return last

        for name, owner in CALLS:
            monkeypatch.setattr(owner, name, hooked(name, getattr(owner, name)))
        return made

    return install


def left(site, secret):
    """Return the files of the site that hold the key."""
    return [path for path in site.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_a_destroyed_key_is_nowhere_and_the_next_is_another(tmp_path):
    site = Site(tmp_path)
    key, other = site.run_key("run", "a"), site.run_key("run", "b")

    destroy_key(tmp_path, "run", "a")
    destroy_key(tmp_path, "run", "a")

    assert left(tmp_path, key) == []
    assert not has_key(tmp_path, "run", "a")
    assert site.run_key("run", "a") != key
    assert site.run_key("run", "b") == other


def test_its_bytes_are_overwritten_before_they_are_let_go(tmp_path):
    site = Site(tmp_path)
    key = site.run_key("run", "a")
    kept = tmp_path / "kept"
    kept.hardlink_to(run_folder(tmp_path, "run", "a") / "key")

    destroy_key(tmp_path, "run", "a")

    assert len(kept.read_bytes()) == len(key)
    assert kept.read_bytes() not in (key, bytes(len(key)))


@pytest.mark.parametrize("number", range(1, 6))
def test_killed_at_any_point_it_leaves_the_key_or_none_and_is_finished_later(
    tmp_path, kill_at, monkeypatch, number
):
    site = Site(tmp_path)
    key = site.run_key("run", "a")
    with monkeypatch.context():
        made = kill_at(number)
        with pytest.raises(Killed):
            destroy_key(tmp_path, "run", "a")
        monkeypatch.undo()

    assert len(made) == number
    path = run_folder(tmp_path, "run", "a") / "key"
    assert not path.exists() or path.read_bytes() == key
    destroy_key(tmp_path, "run", "a")
    assert left(tmp_path, key) == []
    assert [p.name for p in path.parent.iterdir()] == []


@pytest.mark.parametrize("first", ["open", "unlink"])
def test_two_may_destroy_a_key_at_once(tmp_path, monkeypatch, first):
    Site(tmp_path).run_key("run", "a")
    change, unlink = getattr(Path, first), Path.unlink

    def late(path, *given, **named):
        if path.name.startswith(".doomed-"):
            unlink(path)
        return change(path, *given, **named)

    monkeypatch.setattr(Path, first, late)
    destroy_key(tmp_path, "run", "a")
    assert list(run_folder(tmp_path, "run", "a").iterdir()) == []


def test_there_are_no_more_points_to_be_killed_at(tmp_path, kill_at, monkeypatch):
    Site(tmp_path).run_key("run", "a")
    made = kill_at(0)
    destroy_key(tmp_path, "run", "a")
    monkeypatch.undo()
    assert made == ["rename", "fsync", "fsync", "unlink", "fsync"]


def test_what_was_sent_is_sent_again_without_a_key_and_never_made_again(assign):
    assignment = assign(privacy=PRIVATE)
    first = train(assignment)
    site = Path(assignment.site)

    destroy_key(site, assignment.run, assignment.client)

    assert not has_key(site, assignment.run, assignment.client)
    again = train(assignment)
    assert all(bool((again.tensors[n] == t).all()) for n, t in first.tensors.items())
    assert not has_key(site, assignment.run, assignment.client)

    later = assign(privacy=PRIVATE, round=2)
    train(later)
    destroy_key(site, assignment.run, assignment.client)
    with pytest.raises(UpdateGone):
        train(assignment)


def test_another_key_gives_the_same_assignment_other_noise(assign, tmp_path):
    sent = []
    for name in ("before", "after"):
        assignment = assign(privacy=PRIVATE, site=str(tmp_path / name))
        sent.append(train(assignment).tensors)

    for name, tensor in sent[0].items():
        assert not bool((sent[1][name] == tensor).all()), name


def test_a_site_is_known_by_its_keys_and_shows_none_of_them(tmp_path):
    key = Site(tmp_path / "site").data_key()
    mark = site_mark(tmp_path / "site")

    assert mark == site_mark(tmp_path / "site") != ""
    assert mark not in key.hex()
    (tmp_path / "site" / "data.key").unlink()
    assert site_mark(tmp_path / "site") == ""
    Site(tmp_path / "site").data_key()
    assert site_mark(tmp_path / "site") not in ("", mark)
