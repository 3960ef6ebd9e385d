"""What stays at a client stays private, whole, and the same for everyone who asks at once."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from clients.site import Site, UpdateGone


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path / "sites")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_and_folders_are_readable_by_their_owner_alone(site, tmp_path):
    site.run_key("run", "a")
    site.data_key()
    site.store_update("run", "a", "digest", b"bytes", private=True)
    site.store_state("run", "a", 1, {"x": torch.ones(2)})

    everything = list((tmp_path / "sites").rglob("*"))

    assert mode(tmp_path / "sites") == 0o700
    assert len([p for p in everything if p.is_file()]) == 4
    assert all(mode(p) == (0o700 if p.is_dir() else 0o600) for p in everything)


def test_a_key_is_drawn_once_and_kept(site, tmp_path):
    key = site.run_key("run", "a")

    assert len(key) == 32
    assert site.run_key("run", "a") == key
    assert Site(tmp_path / "sites").run_key("run", "a") == key


def test_every_run_and_client_has_a_key_of_its_own(site):
    keys = {site.run_key(run, client) for run in ("1", "2") for client in ("a", "b")}

    assert len(keys | {site.data_key()}) == 5


def test_names_that_run_together_do_not_share_a_folder(site):
    assert site.run_key("ab", "c") != site.run_key("a", "bc")


def test_an_insecure_seed_is_the_same_everywhere_and_writes_no_key(site, tmp_path):
    other = Site(tmp_path / "other")

    assert site.run_key("run", "a", 7) == other.run_key("run-2", "a", 7)
    assert site.run_key("run", "a", 7) != site.run_key("run", "b", 7)
    assert site.data_key(7) == other.data_key(7)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_two_who_ask_at_once_get_one_key(tmp_path):
    for number in range(20):
        sites = [Site(tmp_path / "sites") for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            keys = set(pool.map(lambda s, n=number: s.run_key(f"run-{n}", "a"), sites))
        assert len(keys) == 1

    assert {p.name for p in (tmp_path / "sites").rglob("*") if p.is_file()} == {"key"}


def test_an_update_is_kept_until_the_next_assignment_s(site):
    assert site.stored_update("run", "a", "first") is None
    site.store_update("run", "a", "first", b"one", private=False)
    site.store_update("run", "b", "first", b"two", private=False)
    assert site.stored_update("run", "a", "first") == b"one"

    site.store_update("run", "a", "second", b"three", private=False)

    assert site.stored_update("run", "a", "first") is None
    assert site.stored_update("run", "a", "second") == b"three"
    assert site.stored_update("run", "b", "first") == b"two"


def test_state_is_read_as_of_the_newest_round_that_is_not_later(site):
    for round_ in (1, 4):
        site.store_state("run", "a", round_, {"x": torch.tensor(round_)})

    def value(round_):
        return {k: int(v) for k, v in site.state("run", "a", round_).items()}

    assert value(0) == {}
    assert [value(r)["x"] for r in (1, 2, 3, 4, 2**62)] == [1, 1, 1, 4, 4]
    assert site.state("run", "b", 4) == {}


def test_a_state_that_is_written_again_is_replaced(site):
    site.store_state("run", "a", 1, {"x": torch.tensor(1)})
    site.store_state("run", "a", 1, {"x": torch.tensor(2)})

    assert int(site.state("run", "a", 1)["x"]) == 2


def test_a_private_update_that_was_dropped_may_not_be_made_again(site):
    site.store_update("run", "a", "first", b"one", private=True)
    site.store_update("run", "a", "second", b"two", private=True)

    assert site.stored_update("run", "a", "second") == b"two"
    with pytest.raises(UpdateGone, match="already sent an update"):
        site.stored_update("run", "a", "first")
