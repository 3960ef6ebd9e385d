"""Giving a name a gate, and asking which it has: what needs neither a model nor tensors."""

from __future__ import annotations

from collections.abc import Mapping

from clients import data
from orchestrator.gate_file import Asked, GateFile, parse_gate
from orchestrator.relating import held_by
from orchestrator.workspace import Workspace
from storage.gates import GateRow, Gates
from storage.ledger import Ledger


class PrivateData(ValueError):
    """A suite has data of a client, whose scores would tell of them without being charged."""


def set_gate(workspace: Workspace, name: str, gate: GateFile, who: str, why: str = "") -> GateRow:
    """Give a name a gate from now on; its history keeps the one before.

    Raises:
        BadName: if the name cannot be one.
        PrivateData: if the suite has data of a client.
        DataNotFound, BadDataURI: if a data set is not there.
    """
    refuse_private(gate.places, workspace.ledger)
    document = gate.model_dump(mode="json", exclude_defaults=True)
    return Gates(workspace.engine).set(name, document, who=who, why=why)


def gate_for(workspace: Workspace, name: str, alias: str) -> tuple[GateRow, Asked] | None:
    """Return a name's gate and what it asks for an alias; None where it asks nothing.

    Raises:
        BadConfig: if the gate that is kept cannot be read.
    """
    row = Gates(workspace.engine).find(name)
    if row is None or row.document is None:
        return None
    asked = parse_gate(row.document, f"the gate of {name}").asked(alias)
    return None if asked is None else (row, asked)


def refuse_private(suite: Mapping[str, str], ledger: Ledger) -> None:
    """Refuse a suite that holds the data of a client that are not public, or that it holds out.

    Clients may be asked themselves, which is charged: :mod:`orchestrator.asking_clients`. What a
    model scores on someone's data tells of them, and no ε counts it. Recognised are a
    client's own files, by their place and by their content.

    Args:
        suite: where its data sets are, by name.
        ledger: who the clients are.

    Raises:
        PrivateData: naming the data set and the client.
        DataNotFound, BadDataURI: if a data set is not there.
    """
    for name, owner in owners_of(suite, ledger).items():
        raise PrivateData(
            f"the suite's {name!r} has the data of client {owner!r}, and scores"
            " on them tell of them without being counted in any ε; give data that were "
            "held back for this, or register the client with --public if they are"
        )


def owners_of(places: Mapping[str, str], ledger: Ledger) -> dict[str, str]:
    """Return whose data that are not public some data sets are, by the names of those sets.

    Args:
        places: where they are, by name.
        ledger: who the clients are.

    Raises:
        DataNotFound, BadDataURI: if a data set is not there.
    """
    owners: dict[str, str] = {}
    for record in ledger.clients():
        if record.public:
            continue
        for uri in (part for place in held_by(record) for part in data.parts_of(place)):
            owners[data.absolute(uri)] = record.name
            if data.is_there(uri):
                owners[data.content_of(uri)] = record.name
    found: dict[str, str] = {}
    for name, place in places.items():
        for uri in data.parts_of(place):
            for known in (data.absolute(uri), data.content_of(uri)):
                if known in owners:
                    found[name] = owners[known]
    return found
