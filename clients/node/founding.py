"""Making a node: its folder, its node.yaml, its key, and what its join file says."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml

from clients.assignment import DataSpec
from clients.files import write_durably
from clients.inspection import rounded
from clients.node.identity import Identity, PublicKey, new_key, read_key
from clients.node.joining import LONGEST_LIFE, BadJoin, Offer, Statement
from clients.node.settings import Settings, parse_settings
from clients.node.template import Plans, written
from clients.records import COLUMNS, validated
from clients.sources import open_source

SETTINGS, KEY, JOIN = "node.yaml", "node.key", "join.json"
_NEXT, _OLD = ".next", ".old"


class NodeExists(FileExistsError):
    """A folder is a node's already."""


class BadWheelhouse(ValueError):
    """Weft cannot be installed from a folder of wheels."""


class NoNextKey(LookupError):
    """No new key waits to take a node's key's place."""


def planned(folder: Path, plans: Plans) -> Settings:
    """Return what a node's node.yaml will say; where plans are not whole, with one of each.

    Raises:
        BadSettings: if it would be none.
        NodeExists: if there is a node.yaml or a key already.
    """
    for name in (SETTINGS, KEY, JOIN):
        if (folder / name).exists():
            raise NodeExists(
                f"{folder / name} is there already, and is not written over; choose another folder"
            )
    document = yaml.safe_load(written(plans))
    document["data"] = document["data"] or {
        "data": {"uri": "builtin:parameter-types", "public": True}
    }
    document["models"] = document["models"] or {"0" * 64: "model"}
    return parse_settings(document, (folder / SETTINGS).absolute())


def found(folder: Path, plans: Plans) -> Identity:
    """Make a node's folder with its node.yaml and its key, and return the key pair.

    Raises:
        NodeKeyExists: if there is a key already; nothing is written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    identity = new_key(folder / KEY)
    write_durably(folder / SETTINGS, written(plans).encode())
    return identity


def offers(settings: Settings) -> dict[str, Offer]:
    """Return what a node offers, by its data sets' names; reads them, to count them.

    Raises:
        BadJoin: if one has no readable record.
        DataNotFound, BadRecord, MissingExtra: if one cannot be read.
    """
    return {name: _offer(settings, name) for name in settings.data}


def statement(
    settings: Settings, offered: Mapping[str, Offer], keys: Sequence[PublicKey], life: timedelta
) -> Statement:
    """Return what a node says of itself to the coordinator that it asks to let it in.

    Args:
        settings: the node's.
        offered: what it offers.
        keys: its public key; then, if it takes another one's place, that one.
        life: how long the key is good from now on.

    Raises:
        BadJoin: if no key is good for so long.
    """
    if not timedelta() < life <= LONGEST_LIFE:
        raise BadJoin(f"a key is good for 1 to {LONGEST_LIFE.days} days, got {life.days}")
    key, *before = keys
    moment = datetime.now(UTC)  # to the microsecond: of two files the newer counts
    return Statement(
        format="weft-join-1",
        name=settings.name,
        public_key=key.text,
        previous=before[0].text if before else None,
        data=dict(offered),
        labels=settings.labels,
        models=tuple(sorted(settings.models)),
        weft=importlib.metadata.version("weft"),
        flwr=importlib.metadata.version("flwr"),
        made=moment,
        expires=moment + life,
    )


def _offer(settings: Settings, name: str) -> Offer:
    data = settings.data[name]
    good, units, problem = 0, set(), ""
    for record in validated(DataSpec(data.uri, data.fields, unit=data.unit), None):
        if record.example is None:
            problem = problem or f" ({record.place}: {record.problem})"
            continue
        good += 1
        units.add(record.example.unit)
    if good == 0:
        raise BadJoin(f"data.{name}: {data.uri} holds no readable record{problem}")

    def told(count: int) -> int:
        return rounded(max(1, round(count * (1 - data.holdout))))

    return Offer(
        examples=told(good),
        fields=_columns(data.uri, data.fields),
        unit=data.unit,
        units=told(len(units)) if data.unit else None,
        population=settings.population(name),
        public=data.public,
        holdout=data.holdout,
        epsilon=data.epsilon,
        delta=None if data.epsilon is None else data.delta,
    )


def _columns(uri: str, fields: Mapping[str, str]) -> tuple[str, ...]:
    """Return which of weft's columns a data set has, by its first readable record."""
    for record in open_source(uri).records:
        if not record.problem:
            return tuple(name for name in COLUMNS if fields.get(name, name) in record.fields)
    return ()


def next_key(settings: Settings) -> tuple[Identity, Identity]:
    """Return a node's key pair, and the one that is to take its place; the same each time.

    The old one stays in use until :func:`take_next`, for the coordinator must know the new one
    first.

    Raises:
        BadNodeKey: if one of the files holds another thing.
    """
    waiting = settings.key.with_name(settings.key.name + _NEXT)
    current = read_key(settings.key)
    return current, read_key(waiting) if waiting.exists() else new_key(waiting)


def take_next(settings: Settings) -> tuple[PublicKey, Path]:
    """Put the new key in the old one's place; return it, and where the old one is kept.

    Raises:
        NoNextKey: if there is none.
    """
    waiting = settings.key.with_name(settings.key.name + _NEXT)
    kept = settings.key.with_name(settings.key.name + _OLD)
    if not waiting.exists():
        raise NoNextKey(f"no new key waits at {waiting}; make one with: weft node rotate")
    public = read_key(waiting).public
    settings.key.replace(kept)
    waiting.replace(settings.key)
    return public, kept


def install(folder: Path, wheelhouse: Path) -> Path:
    """Install weft into an environment of a node's own, without network; return its command.

    Args:
        folder: the node's; the environment is its ``venv``.
        wheelhouse: a folder with the wheels of weft and of all that it needs.

    Raises:
        BadWheelhouse: if weft, or something that it needs, is not in the wheelhouse.
    """
    refuse_wheelhouse(wheelhouse)
    _run([sys.executable, "-m", "venv", str(folder / "venv")], "make an environment")
    _run(install_command(folder, wheelhouse), "install weft")
    return folder / "venv" / "bin" / "weft"


def refuse_wheelhouse(wheelhouse: Path) -> None:
    """Refuse a folder from which weft cannot be installed.

    Raises:
        BadWheelhouse: if there is no wheel of weft.
    """
    if not list(wheelhouse.glob("weft-*.whl")):
        raise BadWheelhouse(
            f"{wheelhouse} has no wheel of weft; where there is a network, make it with: pip wheel "
            f"--wheel-dir {wheelhouse} weft"
        )


def install_command(folder: Path, wheelhouse: Path) -> list[str]:
    """Return what installs weft into a node's environment, and reaches for no network."""
    python = str(folder / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "--isolated", "--disable-pip-version-check", "install"]
    return [*pip, "--no-index", "--find-links", str(wheelhouse), "weft"]


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        last = " ".join(lines[-2:])[:600]
        raise BadWheelhouse(f"cannot {what} with {' '.join(command)}: {last}")
