"""``weft node init``, ``join`` and ``rotate``: a site's side of being let in."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.terminal import Fields, err, out, pairs

if TYPE_CHECKING:
    from clients.node.identity import Identity
    from clients.node.settings import Settings

Where = Annotated[Path, typer.Argument(help="The node's settings.")]
Expires = Annotated[int, typer.Option(min=1, help="Days for which the key is good from now on.")]


def init(  # noqa: PLR0913  (one option each)
    folder: Annotated[Path, typer.Argument(help="Of the node; new, or without one.")],
    name: Annotated[str, typer.Option(help="Of the node, such as clinic-north.")],
    superlink: Annotated[str, typer.Option(help="Where it dials in: HOST:PORT.")],
    certificates: Annotated[
        Path | None, typer.Option("--root-certificates", help="PEM file; the system's by default.")
    ] = None,
    data: Annotated[
        list[str],
        typer.Option("--data", help="NAME=URI of a data set, such as notes=jsonl:/data/n.jsonl."),
    ] = [],  # noqa: B006
    fields: Fields = "",
    model: Annotated[
        list[str],
        typer.Option(
            "--model", help="Folder of a base model that runs may use, or builtin:minilm."
        ),
    ] = [],  # noqa: B006
    label: Annotated[list[str], typer.Option("--label", help="key=value")] = [],  # noqa: B006
    epsilon: Annotated[float | None, typer.Option(help="What all runs may spend of them.")] = None,
    delta: Annotated[float, typer.Option(help="δ of the budget.")] = 1e-5,
    public: Annotated[bool, typer.Option("--public", help="Everyone may have the data.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, on this machine.")] = False,
    expires: Expires = 365,
    wheelhouse: Annotated[
        Path | None, typer.Option(help="Install weft into FOLDER/venv from these wheels alone.")
    ] = None,
) -> None:
    """Make a node: its folder, node.yaml, key and join file. Nothing is ever written over."""
    from clients.assignment import ModelSpec
    from clients.node import founding
    from clients.node.joining import write_join
    from clients.node.settings import BadSettings
    from clients.node.template import Plans
    from clients.sources import absolute

    if data and (epsilon is None) != public:
        raise BadSettings(
            "give --epsilon, what all runs together may spend of the data, or --public for data "
            "that everyone may have"
        )
    hashes = {}
    for place in model:
        from clients.weights import base_hash, locate

        spec = ModelSpec(place, "classification")
        hashes[base_hash(spec)] = locate(place).absolute()
    plans = Plans(
        name=name,
        superlink=superlink,
        root_certificates=certificates,
        data={key: absolute(uri) for key, uri in pairs(data, "--data").items()},
        fields=pairs(fields.split(",") if fields else [], "--fields"),
        models=hashes,
        labels=pairs(label, "--label"),
        epsilon=epsilon,
        delta=delta,
        insecure=insecure,
    )
    settings = founding.planned(folder, plans)
    offered = founding.offers(settings) if plans.are_whole else {}
    if wheelhouse is not None:
        founding.refuse_wheelhouse(wheelhouse)
    identity = founding.found(folder, plans)
    lines = [f"made {folder / founding.SETTINGS}", f"key {identity.public.fingerprint}"]
    if plans.are_whole:
        said = founding.statement(settings, offered, [identity.public], timedelta(days=expires))
        (folder / founding.JOIN).write_text(write_join(said, identity), "utf-8")
        lines.append(
            f"give {folder / founding.JOIN} to whoever runs the coordinator, and tell them the key "
            "by another way"
        )
    else:
        lines.append(
            f"write your data and models into it, then: weft node join {folder / founding.SETTINGS}"
        )
    if wheelhouse is not None:
        command = founding.install(folder, wheelhouse)
        lines.append(f"installed {command}")
    for line in lines:
        out.print(line, markup=False, highlight=False)


def join(settings: Where = Path("node.yaml"), expires: Expires = 365) -> None:
    """Print the node's join file, as its settings are now, for whoever runs the coordinator."""
    from clients.node.identity import read_key
    from clients.node.settings import load_settings

    read = load_settings(settings)
    identity = read_key(read.key)
    sys.stdout.write(_joined(read, identity, expires))
    err.print(f"key {identity.public.fingerprint}", markup=False, highlight=False)


def rotate(
    settings: Where = Path("node.yaml"),
    expires: Expires = 365,
    finish: Annotated[
        bool, typer.Option("--finish", help="Use the new key, once the coordinator knows it.")
    ] = False,
) -> None:
    """Make a new key, and print a join file that it and the old one sign; then use it."""
    from clients.node import founding
    from clients.node.settings import load_settings

    read = load_settings(settings)
    if finish:
        public, kept = founding.take_next(read)
        line = f"key {public.fingerprint}; the old one is in {kept}. Start the node again"
        out.print(line, markup=False, highlight=False)
        return
    current, coming = founding.next_key(read)
    sys.stdout.write(_joined(read, coming, expires, current))
    line = (
        f"key {coming.public.fingerprint} takes the place of {current.public.fingerprint}: give "
        "the join file to whoever runs the coordinator, and when they have done weft clients "
        f"rotate: weft node rotate --finish {settings}"
    )
    err.print(line, markup=False, highlight=False)


def _joined(
    settings: Settings, identity: Identity, days: int, previous: Identity | None = None
) -> str:
    from clients.node.founding import offers, statement
    from clients.node.joining import write_join

    keys = [identity.public, *([previous.public] if previous else [])]
    said = statement(settings, offers(settings), keys, timedelta(days=days))
    return write_join(said, identity, previous)
