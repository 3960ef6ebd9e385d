"""A node's key is one that ssh-keygen and Flower read, that nobody else can, and is never lost."""

import argparse
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from clients.node.identity import BadNodeKey, NodeKeyExists, new_key, parsed_key, read_key


def test_ssh_keygen_reads_it_and_prints_the_same_fingerprint(tmp_path):
    made = new_key(tmp_path / "node.key")

    printed = subprocess.run(
        ["ssh-keygen", "-lf", tmp_path / "node.key"], capture_output=True, text=True, check=True
    ).stdout

    assert made.public.fingerprint in printed.split()
    assert printed.startswith("384 ")
    derived = subprocess.run(
        ["ssh-keygen", "-y", "-f", tmp_path / "node.key"], capture_output=True, text=True
    ).stdout
    assert derived.split()[:2] == made.public.text.split()


def test_a_supernode_takes_it_and_shows_a_superlink_the_same_public_key(tmp_path):
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    made = new_key(tmp_path / "node.key")
    options = argparse.Namespace(
        auth_supernode_private_key=str(tmp_path / "node.key"), auth_supernode_public_key=None
    )

    _, public = _try_setup_client_authentication(options)

    assert public_key_to_bytes(public) == made.public.pem


def test_only_its_owner_may_read_it(tmp_path):
    path = tmp_path / "node.key"
    made = new_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key(path).public == made.public

    path.chmod(0o640)
    with pytest.raises(BadNodeKey, match=r"others may read .*; run: chmod 600"):
        read_key(path)


def test_a_key_that_is_there_is_never_written_over(tmp_path):
    path = tmp_path / "node.key"
    made = new_key(path)
    with pytest.raises(NodeKeyExists, match="weft node rotate"):
        new_key(path)
    assert read_key(path).public == made.public


def test_it_does_not_show_its_private_half(tmp_path):
    assert "private" not in repr(new_key(tmp_path / "node.key")).lower()


@pytest.mark.parametrize("kind", ["another curve", "another kind", "nothing"])
def test_a_file_with_another_key_is_refused_and_not_shown(tmp_path, kind):
    path = tmp_path / "node.key"
    another = ed25519.Ed25519PrivateKey.generate()
    private = ec.generate_private_key(ec.SECP256R1()) if kind == "another curve" else another
    data = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    path.write_bytes(b"hunter2" if kind == "nothing" else data)
    path.chmod(0o600)

    with pytest.raises(BadNodeKey, match="holds no private key of a node") as raised:
        read_key(path)
    assert "hunter2" not in str(raised.value)


def test_a_key_under_a_passphrase_is_refused_as_a_supernode_would(tmp_path):
    path = tmp_path / "node.key"
    make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", path]
    subprocess.run(make, check=True)
    with pytest.raises(BadNodeKey, match="no passphrase"):
        read_key(path)


def test_a_public_key_is_told_by_what_it_is_and_not_by_its_comment(tmp_path):
    made = new_key(tmp_path / "node.key").public
    assert parsed_key(f"{made.text} somebody@somewhere\n") == made


@pytest.mark.parametrize(
    "text",
    ["", "é", "ecdsa-sha2-nistp384 AAAA", "ssh-ed25519 " + "A" * 68, "x" * 10_000, "a\0b"],
)
def test_what_is_no_public_key_is_refused(text):
    with pytest.raises(BadNodeKey, match="a node's public key is"):
        parsed_key(text)


def test_a_signature_is_of_one_key_and_one_message(tmp_path):
    one, other = new_key(tmp_path / "a"), new_key(tmp_path / "b")
    signature = one.sign(b"message")

    assert one.public.made(signature, b"message")
    assert not one.public.made(signature, b"massage")
    assert not other.public.made(signature, b"message")
    assert not one.public.made("not base64!", b"message")
    assert not one.public.made("", b"message")
