"""A node's key pair: who it is to a coordinator, and to a SuperLink that lets only such nodes in.

EC P-384, which is what Flower's node authentication takes; the private half in OpenSSH's format,
which ``flower-supernode --auth-supernode-private-key`` reads. It never leaves its file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clients.files import sync

_ALGORITHM = "ecdsa-sha2-nistp384"
_LONGEST = 600  # characters of a public key; it has 204, and perhaps a comment


class BadNodeKey(ValueError):
    """A key that is none, or that others may read."""


class NodeKeyExists(FileExistsError):
    """A key is there already, and would be lost."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The public half of a node's key.

    Attributes:
        text: as OpenSSH writes it, without a comment: ``ecdsa-sha2-nistp384 AAAA…``.
    """

    text: str

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -lf`` prints it: ``SHA256:`` and 43 characters."""
        digest = hashlib.sha256(base64.b64decode(self.text.split(" ")[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")

    @property
    def pem(self) -> bytes:
        """As a SuperLink registers it, and compares it byte by byte with what a node sends."""
        return self._loaded().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def made(self, signature: str, message: bytes) -> bool:
        """Return whether this key made a signature (base64) over ``message``."""
        try:
            given = base64.b64decode(signature, validate=True)
            self._loaded().verify(given, message, ec.ECDSA(hashes.SHA384()))
        except (InvalidSignature, binascii.Error, ValueError):
            return False
        return True

    def _loaded(self) -> ec.EllipticCurvePublicKey:
        loaded = serialization.load_ssh_public_key(self.text.encode("ascii"))
        assert isinstance(loaded, ec.EllipticCurvePublicKey)
        return loaded


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's key pair.

    Attributes:
        public: its public half.
    """

    public: PublicKey
    _private: ec.EllipticCurvePrivateKey = field(repr=False, compare=False)

    def sign(self, message: bytes) -> str:
        """Return a signature over ``message``, base64."""
        return _encoded(self._private.sign(message, ec.ECDSA(hashes.SHA384())))


def parsed_key(text: str) -> PublicKey:
    """Return the public key that a text is, whoever wrote it; a comment is left out.

    Raises:
        BadNodeKey: if it is no EC P-384 key in OpenSSH's format.
    """
    try:
        if len(text) > _LONGEST:
            raise ValueError
        loaded = serialization.load_ssh_public_key(text.strip().encode("ascii"))
    except (ValueError, UnsupportedAlgorithm):
        loaded = None
    if not isinstance(loaded, ec.EllipticCurvePublicKey) or loaded.curve.name != "secp384r1":
        raise BadNodeKey(
            f"a node's public key is '{_ALGORITHM}' and base64, as weft node join prints it; "
            f"got {text[:60]!r}"
        )
    return _public(loaded)


def new_key(path: Path) -> Identity:
    """Draw a key pair and write its private half, which only this user may read.

    Raises:
        NodeKeyExists: if something is at ``path``.
    """
    private = ec.generate_private_key(ec.SECP384R1())
    data = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise NodeKeyExists(
            f"there is a key at {path} already, and a lost key is a lost node; for a new one run: "
            "weft node rotate"
        ) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink()
        error.filename = str(path)  # the system names none
        raise
    sync(path.parent)
    return Identity(_public(private.public_key()), private)


def read_key(path: Path) -> Identity:
    """Return the key pair whose private half is at ``path``.

    Raises:
        FileNotFoundError: if there is none.
        BadNodeKey: if it is no such key, or others may read it.
    """
    if path.stat().st_mode & 0o077:
        raise BadNodeKey(f"others may read {path}; run: chmod 600 {path}")
    try:
        private = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private = None  # what the file holds stays out of messages
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name != "secp384r1":
        raise BadNodeKey(
            f"{path} holds no private key of a node (EC P-384 in OpenSSH's format, no passphrase); "
            "weft node init makes one"
        )
    return Identity(_public(private.public_key()), private)


def _public(key: ec.EllipticCurvePublicKey) -> PublicKey:
    written = key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode("ascii")
    return PublicKey(" ".join(written.split(" ")[:2]))


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
