"""``weft proxy`` and ``weft doctor``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.terminal import JsonFlag, out, print_json

if TYPE_CHECKING:
    from orchestrator.deployment.findings import Finding


def proxy(  # noqa: PLR0913  (one option each)
    name: Annotated[
        list[str], typer.Option("--name", help="Host name or address that sites dial; repeatable.")
    ],
    certificate: Annotated[
        Path | None, typer.Option(help="Its certificate, with the chain; PEM.")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", help="The certificate's key.")] = None,
    acme: Annotated[
        str, typer.Option("--acme", help="In place of files: e-mail address, for Let's Encrypt.")
    ] = "",
    superlink: Annotated[
        str, typer.Option(help="HOST:PORT of the SuperLink; by default where it was started last.")
    ] = "",
    authority: Annotated[
        Path | None,
        typer.Option("--superlink-ca", help="Who signed its certificate; by default as weft made."),
    ] = None,
    port: Annotated[int, typer.Option(help="That sites dial.")] = 443,
    bind: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
) -> None:
    """Print a Caddyfile that exposes a SuperLink to registered sites, and nothing else of it."""
    from orchestrator.deployment.proxy import BadProxy, Exposure, caddyfile
    from orchestrator.superlink_home import SuperLinkHome
    from orchestrator.workspace import home_folder

    by_files = certificate is not None and key is not None and not acme
    if not by_files and not (acme and certificate is None and key is None):
        raise BadProxy(
            "the proxy's certificate comes by --certificate FILE --key FILE, or by --acme E-MAIL; "
            "give either"
        )
    tls = (
        (acme,)
        if acme
        else (str(certificate and certificate.absolute()), str(key and key.absolute()))
    )
    own = SuperLinkHome.of(home_folder())
    signer = (authority or own.authority).absolute()
    exposure = Exposure(
        tuple(name), tls, superlink or own.last() or "127.0.0.1:9092", signer, port=port, bind=bind
    )
    sys.stdout.write(caddyfile(exposure))


def doctor(
    node: Annotated[Path | None, typer.Option("--node", help="At a site: its node.yaml.")] = None,
    proxy: Annotated[str, typer.Option("--proxy", help="HOST:PORT that sites dial.")] = "",
    proxy_authority: Annotated[
        Path | None, typer.Option("--proxy-ca", help="Who signed the proxy's certificate.")
    ] = None,
    superlink: Annotated[
        str, typer.Option(help="HOST:PORT of the SuperLink; by default as weft starts it here.")
    ] = "",
    authority: Annotated[
        Path | None, typer.Option("--superlink-ca", help="Who signed its certificate.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Look at a deployment, here or at a site; exit code 1 if something must not stay so."""
    from orchestrator.deployment import doctor as looking
    from orchestrator.deployment.findings import any_fails

    if node is not None:
        findings = list(looking.at_site(node))
    else:
        from orchestrator.deployment.reaching import Front
        from orchestrator.superlink_home import PLAIN, SuperLinkHome
        from orchestrator.workspace import place_of

        home, database = place_of()
        own = SuperLinkHome.of(home)
        superlink = superlink or os.environ.get("WEFT_SUPERLINK", "") or own.last()
        trusted = authority or os.environ.get("WEFT_SUPERLINK_CA") or own.authority
        plain = superlink.startswith(PLAIN)
        signer = None if plain else Path(trusted)
        parts = looking.Parts(
            home,
            database,
            Front(superlink.removeprefix(PLAIN), signer, plain) if superlink else None,
            Front(proxy, proxy_authority) if proxy else None,
        )
        findings = list(looking.at_coordinator(parts))
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        for finding in findings:
            _print_finding(finding)
    if any_fails(findings):
        raise typer.Exit(1)


def _print_finding(finding: Finding) -> None:
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}[finding.verdict]
    out.print(f"[{colour}]{finding.verdict:4}[/]  {finding.check:10} ", end="", highlight=False)
    out.print(finding.says, markup=False, highlight=False)
    if finding.do:
        out.print(f"{'':17} {finding.do}", style="bold", markup=False, highlight=False)
