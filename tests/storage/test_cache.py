"""The cache of blobs stays within its limit, and what it lost comes from where the blobs are."""

import os
import time

import pytest

from storage.blobs import BlobStore, name_of
from storage.cache import BadCacheLimit, Cache, parse_limit
from storage.places import Folder

OLD = time.time() - 86_400


def names(cache):
    return sorted(entry.name for entry in cache.entries())


def age(tmp_path, name, seconds):
    os.utime(tmp_path / name, (OLD + seconds,) * 2)


def test_what_was_not_read_for_longest_gives_way(tmp_path):
    cache = Cache(tmp_path, 40)
    for number, name in enumerate(("a", "b", "c", "d")):
        cache.write(name, b"0123456789")
        age(tmp_path, name, number)
    assert cache.read("a") == b"0123456789"
    Cache(tmp_path, 40).write("e", b"0123456789")
    assert names(cache) == ["a", "c", "d", "e"]
    assert cache.read("b") is None
    assert cache.used_bytes() == 40


def test_it_never_holds_more_than_its_limit(tmp_path):
    cache = Cache(tmp_path, 1000)
    for number in range(50):
        cache.write(f"{number:02}", bytes(7 * number))
        assert cache.used_bytes() <= 1000
    assert "49" in names(cache)


def test_what_is_larger_than_all_of_it_is_not_kept_and_nothing_gives_way(tmp_path):
    cache = Cache(tmp_path, 20)
    cache.write("a", bytes(20))
    cache.write("b", bytes(21))
    assert names(cache) == ["a"]


def test_what_is_being_written_is_left_alone_and_counts_until_its_writer_is_dead(tmp_path):
    cache = Cache(tmp_path, 30)
    for name in (".young", ".dead", "a"):
        (tmp_path / name).write_bytes(bytes(10))
    age(tmp_path, ".dead", 0)
    age(tmp_path, "a", 0)
    cache.write("b", bytes(10))
    assert names(cache) == [".young", "a", "b"]
    Cache(tmp_path, 30).write("c", bytes(20))
    assert names(cache) == [".young", "c"]


def test_processes_that_share_it_stay_near_its_limit(tmp_path):
    caches = [Cache(tmp_path, 1600) for _ in range(4)]
    for number in range(400):
        caches[number % 4].write(f"{number:03}", bytes(20))
        assert caches[0].used_bytes() <= 1600 + 4 * 100


def test_what_gave_way_or_was_altered_is_read_from_where_it_is_and_kept_again(tmp_path):
    cache = Cache(tmp_path / "cache", 100)
    blobs = BlobStore(Folder(tmp_path / "far"), cache)
    digests = [blobs.put_bytes(bytes([number]) * 60) for number in range(2)]
    assert names(cache) == [name_of(digests[1])]
    assert blobs.get_bytes(digests[0]) == bytes(60)
    assert names(cache) == [name_of(digests[0])]
    (tmp_path / "cache" / name_of(digests[0])).write_bytes(b"x" * 60)  # of the same length
    for _ in range(2):
        assert blobs.get_bytes(digests[0]) == bytes(60)
    assert cache.read(name_of(digests[0])) == bytes(60)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("20GiB", 20 * 2**30), ("1.5 MB", 1_500_000), ("7k", 7000), ("12B", 12)],
)
def test_a_limit_is_read_as_people_write_sizes(text, size):
    assert parse_limit(text) == size


@pytest.mark.parametrize("text", ["much", "-1", "1 XiB", "20 gigs", "1e9"])
def test_a_limit_that_is_no_size_is_refused_with_what_is_allowed(text):
    with pytest.raises(BadCacheLimit, match="such as 20GiB or 500MB, or 0 for no cache, got"):
        parse_limit(text)
