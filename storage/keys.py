"""Keys that sign, ed25519, in a folder: private ones that are ours, public ones that are trusted.

A signature is over a kind and a subject, such as (``version``, its id), as canonical JSON, so that
one that was made for one thing is none for another. Nothing here needs a database.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from storage.canonical import canonical_json
from storage.refs import check_name, did_you_mean, quoted

_PREFIX = "ed25519:"


class BadKey(ValueError):
    """A key that cannot be used."""


class UnknownKey(LookupError):
    """No key is called this."""


class KeyExists(ValueError):
    """A key of this name is there already."""


class Signature(NamedTuple):
    """A signature.

    Attributes:
        key: id of the key that made it.
        signature: base64.
    """

    key: str
    signature: str


@dataclass(frozen=True, slots=True)
class Key:
    """A public key that is trusted here.

    Attributes:
        name: what it is called here.
        id: the first 32 hex digits of the sha256 of its 32 bytes.
        public: ``ed25519:`` and its bytes in base64; how it is given to others.
        private: whether its private half is here too, so that it can sign.
    """

    name: str
    id: str
    public: str
    private: bool


class KeyRing:
    """The keys in a folder: ``NAME.pub`` are trusted, ``NAME.pem`` (mode 0600) can sign.

    Args:
        folder: made with mode 0700 by the first key.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)

    def new(self, name: str) -> Key:
        """Draw a key, keep it, and trust it here.

        Raises:
            BadName: if it is no name.
            KeyExists: if the name is taken.
        """
        check_name("key", name)
        self._refuse_taken(name)
        made = Ed25519PrivateKey.generate()
        pem = made.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        self._write(f"{name}.pem", pem, 0o600)
        return self.trust(name, _text(made.public_key()))

    def trust(self, name: str, public: str) -> Key:
        """Trust a public key under a name.

        Raises:
            BadName, KeyExists: as :meth:`new`.
            BadKey: if it is no public key.
        """
        check_name("key", name)
        key = _parsed(name, public.strip(), self._pem(name).exists())
        self._refuse_taken(name, public=True)
        self._write(f"{name}.pub", f"{key.public}\n".encode(), 0o644)
        return key

    def distrust(self, name: str) -> None:
        """Trust a key no more; its private half, if it is here, stays and signs no more.

        Raises:
            UnknownKey: if there is none.
        """
        self.key(name)
        (self._folder / f"{name}.pub").unlink()

    def keys(self) -> list[Key]:
        """Return the trusted keys, by name.

        Raises:
            BadKey: if a file holds none.
        """
        files = sorted(self._folder.glob("*.pub"))
        return [
            _parsed(f.stem, f.read_text("utf-8").strip(), self._pem(f.stem).exists()) for f in files
        ]

    def key(self, name: str) -> Key:
        """Return a trusted key.

        Raises:
            UnknownKey: if there is none.
        """
        known = {key.name: key for key in self.keys()}
        if name not in known:
            raise UnknownKey(
                f"no key is called {quoted(name)}{did_you_mean(name, list(known))}; weft keys list "
                "shows those that are here"
            )
        return known[name]

    def sign(self, kind: str, subject: str, name: str | None = None) -> Signature:
        """Sign a subject.

        Args:
            kind: what it is, such as ``version``.
            subject: what names it and covers all of it.
            name: of the key; None is the only one that can sign here.

        Raises:
            UnknownKey: if there is no such key, or none or several to choose from.
            BadKey: if its private half is not here, or others may read it.
        """
        key, private = self._signing(name)
        return Signature(key.id, _encoded(private.sign(_message(kind, subject))))

    def check(self, name: str | None = None) -> Key:
        """Return the key that :meth:`sign` would use, if it can sign here. Raises as that does."""
        return self._signing(name)[0]

    def signer(self, kind: str, subject: str, signatures: Iterable[Signature]) -> Key | None:
        """Return the trusted key that made one of ``signatures`` over this subject, or None."""
        return trusted_signer(self.keys(), kind, subject, signatures)

    def _signing(self, name: str | None) -> tuple[Key, Ed25519PrivateKey]:
        """Return a key and its private half. Raises as :meth:`sign`."""
        key = self.key(name) if name else self._only()
        path = self._pem(key.name)
        if not path.exists():
            raise BadKey(f"the private half of key {key.name!r} is not here; sign with another")
        if path.stat().st_mode & 0o077:
            raise BadKey(f"others may read {path}; run: chmod 600 {path}")
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), None)
        except (ValueError, TypeError):
            raise BadKey(f"{path} holds no private key") from None  # its text stays out of messages
        if not isinstance(private, Ed25519PrivateKey) or _text(private.public_key()) != key.public:
            raise BadKey(f"{path} is not the private half of {key.name}.pub")
        return key, private

    def _only(self) -> Key:
        own = [key for key in self.keys() if key.private]
        if len(own) != 1:
            names = ", ".join(key.name for key in own)
            raise UnknownKey(
                f"choose a key with --key ({names})"
                if own
                else "no key can sign here; make one with: weft keys new NAME"
            )
        return own[0]

    def _refuse_taken(self, name: str, public: bool = False) -> None:
        taken = [self._folder / f"{name}.pub", *([] if public else [self._pem(name)])]
        if any(path.exists() for path in taken):
            raise KeyExists(f"a key called {name!r} is there already; choose another name")

    def _pem(self, name: str) -> Path:
        return self._folder / f"{name}.pem"

    def _write(self, name: str, data: bytes, mode: int) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            (self._folder / name).unlink()
            error.filename = str(self._folder / name)  # the system names none
            raise


def public_key(public: str) -> Key:
    """Return the key that a text is, called by its id.

    Raises:
        BadKey: if it is no public key.
    """
    key = _parsed("", public.strip(), False)
    return Key(key.id, key.id, key.public, False)


def trusted_signer(
    trusted: Iterable[Key], kind: str, subject: str, signatures: Iterable[Signature]
) -> Key | None:
    """Return the first of the trusted keys that made one of ``signatures``, or None."""
    by_id = {key.id: key for key in trusted}
    for one in signatures:
        key = by_id.get(one.key)
        if key is not None and _made(key, one, _message(kind, subject)):
            return key
    return None


def _made(key: Key, one: Signature, message: bytes) -> bool:
    public = Ed25519PublicKey.from_public_bytes(_decoded(key.public))
    try:
        public.verify(base64.b64decode(one.signature, validate=True), message)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def _message(kind: str, subject: str) -> bytes:
    document = {"weft": "signature-1", "kind": kind, "subject": subject}
    return canonical_json(document, "what is signed").encode()


def _parsed(name: str, public: str, private: bool) -> Key:
    raw = _decoded(public)
    return Key(name, hashlib.sha256(raw).hexdigest()[:32], public, private)


def _decoded(public: str) -> bytes:
    try:
        raw = base64.b64decode(public.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not public.startswith(_PREFIX) or len(raw) != 32:
        raise BadKey(
            "a public key is 'ed25519:' and 44 characters of base64, as weft keys show prints it; "
            f"got {public[:60]!r}"
        )
    return raw


def _text(public: Ed25519PublicKey) -> str:
    return _PREFIX + _encoded(public.public_bytes_raw())


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
