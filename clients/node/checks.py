"""What keeps a node from starting: looked at before it dials, each with what to do about it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from clients.assignment import ModelSpec
from clients.node.ledger import Ledger, LedgerUnavailable
from clients.node.settings import DataSet, Settings, refuse_shown_key
from clients.sources import BadDataURI, BadRecord, DataNotFound, MissingExtra, open_source
from clients.weights import ModelNotFound, UnsupportedBase, base_hash

_QUANTIZATIONS = ("none", "nf4", "int8")
_DTYPES = ("float32", "bf16", "fp16")


class NotReady(ValueError):
    """A node cannot start as its node.yaml stands; the message has a line for each reason."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        key: of node.yaml.
        good: whether it is as it must be.
        text: what was found, and if it is not good what to do.
    """

    key: str
    good: bool
    text: str


def checks(settings: Settings) -> Iterator[Check]:
    """Yield what node.yaml names, looked at one after the other. Base models are read whole."""
    yield _key(settings)
    yield _certificates(settings)
    for digest, folder in settings.models.items():
        yield _model(digest, folder)
    for name, data in settings.data.items():
        yield _data(name, data)
    yield _state(settings)


def refuse_unready(settings: Settings) -> None:
    """Refuse settings with which a node could not answer.

    Raises:
        NotReady: with a line for each reason.
    """
    wrong = [f"{settings.file}: {c.key}: {c.text}" for c in checks(settings) if not c.good]
    if wrong:
        raise NotReady("\n".join(wrong))


def _key(settings: Settings) -> Check:
    if settings.insecure:
        return Check("key", True, "not used without TLS")
    if not settings.key.is_file():
        return Check("key", False, f"there is no file {settings.key}; weft node init makes one")
    refuse_shown_key(settings.key, f"{settings.file}: key")
    return Check("key", True, f"{settings.key}, which only its owner can read")


def _certificates(settings: Settings) -> Check:
    from cryptography import x509

    file = settings.root_certificates
    if file is None:
        told = "nobody is asked who they are" if settings.insecure else "those the system trusts"
        return Check("root_certificates", True, told)
    try:
        found = x509.load_pem_x509_certificates(file.read_bytes())
    except OSError as error:
        text = f"{file} cannot be read ({error.strerror}); ask the coordinator for its certificate"
        return Check("root_certificates", False, text)
    except ValueError:
        return Check("root_certificates", False, f"{file} holds no certificate in PEM format")
    until = max(one.not_valid_after_utc for one in found)
    good = until > datetime.now(UTC)
    hint = "" if good else "; ask the coordinator for the one that it has now"
    return Check("root_certificates", good, f"{file}, valid until {until:%Y-%m-%d}{hint}")


def _model(digest: str, folder: Path) -> Check:
    key = f"models.{digest[:12]}…"
    if not folder.is_dir():
        return Check(key, False, f"there is no folder {folder}")
    try:
        for quantization, dtype in itertools.product(_QUANTIZATIONS, _DTYPES):
            spec = ModelSpec(
                str(folder), "classification", quantization=quantization, compute_dtype=dtype
            )
            if base_hash(spec) == digest:
                how = dtype if quantization == "none" else f"{dtype}, {quantization}"
                return Check(key, True, f"{folder} ({how})")
    except (ModelNotFound, UnsupportedBase) as error:
        return Check(key, False, str(error))
    text = (
        f"{folder} holds another base model; write the line that weft node models {folder} prints"
    )
    return Check(key, False, text)


def _data(name: str, data: DataSet) -> Check:
    key, count, bad = f"data.{name}", 0, ""
    try:
        source = open_source(data.uri)
        for record in source.records:
            count += 1
            bad = bad or (
                f"{source.unit} {record.number}: {record.problem}" if record.problem else ""
            )
            bad = bad or _lacking(data, list(record.fields))
    except (BadDataURI, BadRecord, DataNotFound, MissingExtra) as error:
        return Check(key, False, str(error))
    if bad:
        return Check(key, False, bad)
    if not count:
        return Check(key, False, f"{data.uri} holds no record")
    return Check(key, True, f"{count} records")


def _lacking(data: DataSet, columns: list[str]) -> str:
    """Return what is wrong with the columns of a record; empty if nothing."""
    wanted = [*data.fields.values(), *([data.unit] if data.unit else [])]
    missing = [column for column in wanted if column not in columns]
    if not missing:
        return ""
    return f"there is no column {missing[0]!r} (it has {', '.join(sorted(columns))})"


def _state(settings: Settings) -> Check:
    try:
        Ledger(settings.state)
    except (LedgerUnavailable, OSError) as error:
        return Check("state", False, str(error))
    return Check("state", True, f"{settings.state}, which only its owner can read")
