"""Many digests side by side, in the order in which they are compared."""

import hashlib

from storage.blobs import BlobStore, name_of
from storage.buckets import Bucket
from storage.inventory import Digests, inventory, together
from storage.places import Folder

DIGESTS = sorted(hashlib.sha256(bytes([n])).hexdigest() for n in range(40))


def test_digests_come_back_as_they_were_added_at_forty_bytes_each():
    kept = Digests()
    for number, digest in enumerate(DIGESTS):
        kept.add(digest, number * 2**40)
    assert len(kept) == 40
    assert list(kept) == [(d, n * 2**40) for n, d in enumerate(DIGESTS)]
    assert len(kept._names) + len(kept._numbers) * kept._numbers.itemsize == 40 * 40


def test_every_digest_is_told_once_with_what_each_source_has():
    a, b, c, d = DIGESTS[:4]
    stored, named = [(a, 1), (c, 2)], [(a, "x"), (b, "y")]
    known = iter([(b, 0), (d, 7)])
    assert list(together(stored, named, known)) == [
        (a, [1, "x", None]),
        (b, [None, "y", 0]),
        (c, [2, None, None]),
        (d, [None, None, 7]),
    ]
    assert list(together([], [])) == []


def test_any_place_lists_its_blobs_in_order_and_whatever_else_lies_there(tmp_path):
    for number, place in enumerate((Folder(tmp_path), Bucket("memory://inventory"))):
        for digest in reversed(DIGESTS):
            place.write(name_of(digest), b"x" * (number + 1))
        for name in ("README", "abc/def", f"{DIGESTS[0][:2]}/.draft", "zz/1/2"):
            place.write(name, b"")
        blobs, others = inventory(BlobStore(place).place.entries())
        assert list(blobs) == [(digest, number + 1) for digest in DIGESTS]
        assert sorted(entry.name for entry in others) == sorted(
            ["README", "abc/def", f"{DIGESTS[0][:2]}/.draft", "zz/1/2"]
        )
