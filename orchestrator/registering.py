"""Registering client nodes: one, or as many as a file lists."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from clients.assignment import DataSpec
from clients.holdout import BadHoldout, Holdout
from clients.inspection import check as checked
from clients.inspection import rounded
from clients.sources import (
    BadDataURI,
    BadRecord,
    DataNotFound,
    MissingExtra,
    absolute,
    is_elsewhere,
    is_public,
)
from orchestrator.config import BadConfig
from orchestrator.policy import Strict
from orchestrator.relating import relate_registered
from orchestrator.workspace import Workspace
from storage.ledger import ClientRecord
from storage.withdrawals import Withdrawal

_GROUPS = ("labels", "fields")


class BadClientFile(BadConfig):
    """A file of clients that cannot be read, or a line of it that is none."""


class ClientWithdrew(ValueError):
    """A client of this name withdrew, and cannot be registered again."""


class Line(Strict):
    """A client as a line of a file describes it."""

    name: str
    data: str = Field(min_length=1)
    population: str | None = None
    num_examples: int | None = Field(default=None, ge=1)
    epsilon: float | None = None
    delta: float | None = None
    public: bool = False
    labels: dict[str, str] = Field(default_factory=dict)
    fields: dict[str, str] = Field(default_factory=dict)
    holdout: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _grouped(cls, value: Any) -> Any:
        """Take ``labels.site: north`` for ``labels: {site: north}``, and an empty cell for none."""
        if not isinstance(value, Mapping):
            return value
        found: dict[str, Any] = {}
        for key, cell in value.items():
            group, dot, name = key.partition(".")
            if cell in ("", None):
                continue
            if dot and group in _GROUPS:
                found.setdefault(group, {})[name] = cell
            else:
                found[key] = cell
        return found

    def record(self) -> ClientRecord:
        """Return the client to register."""
        given = self.model_dump() | {"population": self.population or self.name}
        return ClientRecord(**given)


_OF_ONE = (
    BadConfig,
    ClientWithdrew,
    DataNotFound,
    BadDataURI,
    BadHoldout,
    BadRecord,
    MissingExtra,
)


def register_client(workspace: Workspace, record: ClientRecord, check: bool = True) -> ClientRecord:
    """Register a client node; without a declared size, it is counted and rounded.

    Args:
        workspace: where.
        record: the client.
        check: whether to look at its data set.

    Raises:
        ClientExists: if the name is taken.
        ClientWithdrew: if a client of this name withdrew.
        DataNotFound: if its data set is not there.
        BadConfig: if its data set holds no readable record, or is a site's to offer.
    """
    record = _checked(record, check, workspace.ledger.withdrawals.all())
    workspace.ledger.add_client(record)
    if check:
        relate_registered([record], workspace.ledger, workspace.sites)
    return record


def register_clients(workspace: Workspace, file: Path, check: bool = True) -> list[ClientRecord]:
    """Register all clients that a file lists, or where one cannot be, none.

    Args:
        workspace: where.
        file: ``.jsonl``: an object a line, with the keys of :class:`Line`; or ``.csv``, whose
            header has those keys, ``labels.KEY`` and ``fields.KEY``.
        check: whether to look at their data sets, as :func:`register_client`.

    Returns:
        The clients as they were registered.

    Raises:
        BadClientFile: if the file cannot be read, or a line is no client; it names the line.
        ClientExists, BadClient, BadBudget: if the ledger refuses one; likewise.
    """
    records, places = [], []
    withdrawn = workspace.ledger.withdrawals.all()
    for number, content in _lines(file):
        place = f"{file} line {number}"
        try:
            records.append(_checked(Line.model_validate(content).record(), check, withdrawn))
        except ValidationError as error:
            raise BadClientFile(f"{place}: {_sentence(error)}") from None
        except _OF_ONE as error:
            raise BadClientFile(f"{place}: {error}") from error
        places.append(place)
    if not records:
        raise BadClientFile(f"{file} lists no client; give one a line, as CSV or as JSON")
    workspace.ledger.add_clients(records, places)
    if check:
        relate_registered(records, workspace.ledger, workspace.sites)
    return records


def _sentence(error: ValidationError) -> str:
    """Return the first of pydantic's complaints as one of ours."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{key!r} is nothing that a client has; it has {', '.join(Line.model_fields)}"
    if first["type"] == "missing":
        return f"{key} is required"
    reason = first["msg"][:1].lower() + first["msg"][1:]
    return f"{key + ': ' if key else ''}{reason}, got {first['input']!r}"


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield a file's clients, each with the number of its line.

    Raises:
        BadClientFile: if the file is neither CSV nor JSON lines.
    """
    read = {".csv": _csv, ".jsonl": _json_lines}.get(file.suffix.lower())
    if read is None:
        raise BadClientFile(
            f"{file} must be a .csv or .jsonl file, got {file.suffix or 'no suffix'!r}"
        )
    try:
        yield from read(file)
    except UnicodeDecodeError:
        raise BadClientFile(f"{file} is not UTF-8 text; save it as UTF-8") from None


def _csv(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    raise BadClientFile(
                        f"{file} line {rows.line_num}: it has more or fewer cells than the header "
                        f"({len(rows.fieldnames or ())}); quote cells that hold a comma"
                    )
                yield rows.line_num, row
        except csv.Error as error:
            raise BadClientFile(
                f"{file} after line {rows.line_num}: it is no CSV: {error}"
            ) from None


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open(encoding="utf-8") as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadClientFile(f"{file} line {number}: it is no JSON: {error}") from None
            yield number, content


def _checked(
    record: ClientRecord, check: bool, withdrawn: Mapping[str, Withdrawal]
) -> ClientRecord:
    """Return the client with its data's place made absolute, their size counted, if it was not."""
    if record.name in withdrawn:
        raise ClientWithdrew(
            f"a client called {record.name!r} withdrew on "
            f"{withdrawn[record.name].created_at:%Y-%m-%d}, and is used no more; register another "
            "under another name"
        )
    record = replace(record, data=absolute(record.data))
    if record.holdout is not None:
        record = replace(record, holdout=str(Holdout.of(record.holdout).anchored()))
    if is_elsewhere(record.data):
        raise BadConfig(
            f"{record.data} is what a site's node offers, and no node would answer for "
            f"{record.name}: name data that are here, or let the node in with the file that its "
            "owner makes (weft node join): weft clients add --join FILE"
        )
    if check:
        report = checked(DataSpec(record.data, dict(record.fields)), None, None)
        if report.total == report.num_bad:
            why = f" ({report.problems[0]})" if report.problems else ""
            raise BadConfig(f"{record.data} holds no readable record{why}")
        if record.num_examples is None:
            record = replace(record, num_examples=rounded(report.total))
        _check_holdout(record)
    if is_public(record.data):
        record = replace(record, public=True)
    return record


def _check_holdout(record: ClientRecord) -> None:
    """Refuse a holdout that cannot be read.

    Raises:
        BadConfig: if it holds no readable record, or nothing says whose its records are.
        DataNotFound, BadDataURI, BadRecord, MissingExtra: if another data set is not there.
    """
    if record.holdout is None:
        return
    held = Holdout.of(record.holdout)
    _, out = held.parts(DataSpec(record.data, dict(record.fields)))
    report = checked(out, None, None)
    if report.total == report.num_bad:
        why = f" ({report.problems[0]})" if report.problems else ""
        raise BadConfig(
            f"the holdout {record.holdout} of {record.name} has no readable record{why}"
        )
