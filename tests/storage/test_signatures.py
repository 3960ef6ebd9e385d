"""Signatures are kept by what they are over."""

from storage.keys import Signature
from storage.signatures import SignatureStore


def test_signatures_are_kept_by_kind_and_subject(engine):
    kept = SignatureStore(engine)
    kept.add("version", "733e", Signature("k2", "two"))
    kept.add("version", "733e", Signature("k1", "one"))
    kept.add("alias", "733e", Signature("k1", "three"))

    assert kept.of("version", "733e") == [Signature("k1", "one"), Signature("k2", "two")]
    assert kept.of("alias", "733e") == [Signature("k1", "three")]
    assert kept.of("version", "0000") == []


def test_a_key_s_new_signature_replaces_its_old_one(engine):
    kept = SignatureStore(engine)
    kept.add("version", "733e", Signature("k1", "damaged"))
    kept.add("version", "733e", Signature("k1", "one"))
    assert kept.of("version", "733e") == [Signature("k1", "one")]
