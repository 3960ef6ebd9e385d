"""Keys sign and verify, stay private, and are refused when they are not what they should be."""

import base64
import errno
import os
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.canonical import canonical_json
from storage.keys import (
    BadKey,
    KeyExists,
    KeyRing,
    Signature,
    UnknownKey,
    public_key,
    trusted_signer,
)
from storage.refs import BadName


@pytest.fixture
def ring(tmp_path):
    return KeyRing(tmp_path / "keys")


def test_a_signature_holds_for_what_was_signed_and_nothing_else(ring):
    alice = ring.new("alice")
    made = ring.sign("version", "733e")

    assert ring.signer("version", "733e", [made]) == alice
    assert ring.signer("version", "733f", [made]) is None
    assert ring.signer("alias", "733e", [made]) is None
    assert ring.signer("version", "733e", []) is None


def test_a_signature_is_plain_ed25519_over_canonical_json(ring):
    key, made = ring.new("alice"), ring.sign("version", "733e")
    raw = base64.b64decode(key.public.removeprefix("ed25519:"))
    message = b'{"kind":"version","subject":"733e","weft":"signature-1"}'

    Ed25519PublicKey.from_public_bytes(raw).verify(base64.b64decode(made.signature), message)
    document = {"weft": "signature-1", "kind": "version", "subject": "733e"}
    assert canonical_json(document, "it").encode() == message


@settings(max_examples=50, deadline=None)
@given(position=st.integers(0, 85), letter=st.sampled_from("AZaz09+/=é\0"))
def test_an_altered_signature_is_none(position, letter, tmp_path_factory):
    ring = KeyRing(tmp_path_factory.mktemp("keys"))
    ring.new("alice")
    made = ring.sign("version", "733e")
    altered = made.signature[:position] + letter + made.signature[position + 1 :]

    good = altered == made.signature
    assert (ring.signer("version", "733e", [Signature(made.key, altered)]) is not None) == good


def test_another_s_signature_counts_when_the_key_is_trusted(ring, tmp_path):
    other = KeyRing(tmp_path / "other")
    made = (other.new("bob"), other.sign("version", "733e"))[1]
    assert ring.signer("version", "733e", [made]) is None

    trusted = ring.trust("robert", other.key("bob").public)
    assert ring.signer("version", "733e", [made]) == trusted
    assert (trusted.name, trusted.private) == ("robert", False)

    ring.distrust("robert")
    assert ring.signer("version", "733e", [made]) is None


def test_a_signature_that_names_another_s_key_is_none(ring, tmp_path):
    mallory = KeyRing(tmp_path / "mallory")
    mallory.new("m")
    forged = Signature(ring.new("alice").id, mallory.sign("version", "733e").signature)
    assert ring.signer("version", "733e", [forged]) is None


def test_private_keys_are_for_their_owner_alone(ring, tmp_path):
    ring.new("alice")
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    path = tmp_path / "keys" / "alice.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    path.chmod(0o640)
    with pytest.raises(BadKey, match=r"others may read .*chmod 600"):
        ring.sign("version", "733e")


def test_no_error_shows_a_private_key(ring, tmp_path):
    ring.new("alice")
    path = tmp_path / "keys" / "alice.pem"
    secret = path.read_text().splitlines()[1]
    path.write_text(path.read_text().replace("BEGIN PRIVATE", "BEGIN PIRATE"))
    with pytest.raises(BadKey, match="holds no private key") as caught:
        ring.sign("version", "733e")
    assert secret[:20] not in str(caught.value)
    assert caught.value.__suppress_context__


def test_the_private_half_of_another_key_is_refused(ring, tmp_path):
    ring.new("alice")
    ring.new("bob")
    (tmp_path / "keys" / "alice.pem").write_bytes((tmp_path / "keys" / "bob.pem").read_bytes())
    with pytest.raises(BadKey, match=r"is not the private half of alice\.pub"):
        ring.sign("version", "733e", "alice")


def test_which_key_signs_is_said_where_there_are_several(ring):
    with pytest.raises(UnknownKey, match="no key can sign here; make one with: weft keys new"):
        ring.sign("version", "733e")
    ring.new("alice")
    ring.new("bob")
    with pytest.raises(UnknownKey, match=r"choose a key with --key \(alice, bob\)"):
        ring.sign("version", "733e")
    assert ring.sign("version", "733e", "bob").key == ring.key("bob").id
    with pytest.raises(UnknownKey, match="'bobb'; did you mean 'bob'"):
        ring.sign("version", "733e", "bobb")


def test_a_trusted_key_alone_cannot_sign(ring, tmp_path):
    ring.trust("bob", KeyRing(tmp_path / "other").new("bob").public)
    with pytest.raises(BadKey, match="the private half of key 'bob' is not here"):
        ring.sign("version", "733e", "bob")


def test_a_name_is_given_once(ring, tmp_path):
    ring.new("alice")
    with pytest.raises(KeyExists):
        ring.new("alice")
    with pytest.raises(KeyExists):
        ring.trust("alice", KeyRing(tmp_path / "other").new("x").public)
    for name in ("../alice", "", "Alice", "a" * 200):
        with pytest.raises(BadName):
            ring.new(name)


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:AAAA", "ssh-ed25519 AAAA", "ed25519:é"])
def test_what_is_no_public_key_is_refused(ring, text):
    with pytest.raises(BadKey, match="a public key is 'ed25519:' and 44"):
        ring.trust("x", text)
    assert ring.keys() == []


def test_public_keys_alone_verify(ring):
    ring.new("alice")
    made = ring.sign("manifest", "ab")
    key = public_key(ring.key("alice").public)
    assert trusted_signer([key], "manifest", "ab", [made]) == key
    assert key.name == key.id == ring.key("alice").id


def test_a_full_disk_is_named_and_leaves_half_a_key_of_neither_kind(ring, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/keys/alice"):
            ring.new("alice")
    assert list((tmp_path / "keys").iterdir()) == []
    assert ring.new("alice").id
