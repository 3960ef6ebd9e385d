"""Looks at a SuperLink from outside: TLS, clocks, and what must not be answered."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from orchestrator.deployment.findings import Finding, fail, ok, warn

TIMEOUT_S = 10.0
AHEAD_S, BEHIND_S, WORTH_A_WORD_S = 5.0, 300.0, 2.5
"""How far a site's clock may be from the SuperLink's, which refuses what it signs beyond that."""

SOON_DAYS = 30
KNOCKS = (
    "/docs",
    "/openapi.json",
    "/v1/control/list-nodes",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/runtime/responses",
    "/v1/fleet/register-node",
)
"""What a SuperLink answers, and a proxy must not; of every interface one or two."""

_ADDRESS = re.compile(r"([\w.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}")
_NOTHING_THERE = (0, 403, 404)
_LOST = (OSError, http.client.HTTPException)


class BadAddress(ValueError):
    """Nobody can be dialled there."""


@dataclass(frozen=True, slots=True)
class Front:
    """Where somebody dials.

    Attributes:
        address: ``HOST:PORT``.
        authority: file of who may have signed its certificate; None for whom the system trusts.
        insecure: without TLS.
    """

    address: str
    authority: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if not _ADDRESS.fullmatch(self.address) or not 0 < self.port < 65536:
            raise BadAddress(
                f"{self.address!r} is no place to dial; write HOST:PORT, such as "
                "weft.example.org:443"
            )

    @property
    def host(self) -> str:
        """Name or address, without an IPv6 address' brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port."""
        return int(self.address.rpartition(":")[2])

    def context(self) -> ssl.SSLContext:
        """Return how its certificate is checked.

        Raises:
            OSError: if the authority's file cannot be read.
        """
        return ssl.create_default_context(cafile=str(self.authority) if self.authority else None)

    def ask(self, method: str, path: str) -> Reply:
        """Ask one thing; what has no answer has status 0."""
        kind: Any = http.client.HTTPConnection
        options: dict[str, Any] = {"timeout": TIMEOUT_S}
        if not self.insecure:
            kind, options["context"] = http.client.HTTPSConnection, self.context()
        connection = kind(self.host, self.port, **options)
        try:
            # of a type that no call takes: an open SuperLink says so, and does nothing
            connection.request(method, path, headers={"Content-Type": "text/plain"})
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.getheaders()), answer.read(1 << 20))
        except _LOST:
            return Reply(0, {}, b"")
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back.

    Attributes:
        status: of HTTP; 0 if nothing came.
        headers: by name, as they were written.
        body: at most a MiB.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


def reached(front: Front) -> Iterator[Finding]:
    """Look whether somebody answers, under the right name, with a certificate that lasts."""
    try:
        with socket.create_connection((front.host, front.port), TIMEOUT_S) as plain:
            if front.insecure:
                says = f"{front.address} is dialled without TLS, which is for one machine alone"
                yield warn("tls", says, "leave insecure out, and dial the proxy")
                return
            with front.context().wrap_socket(plain, server_hostname=front.host) as secured:
                yield _lasting(front, secured.getpeercert() or {})
    except ssl.SSLCertVerificationError as error:
        yield _distrusted(front, error)
    except ssl.SSLError as error:
        says = f"{front.address} speaks no TLS that this machine does ({error.reason})"
        yield fail("tls", says, "look whether the proxy is what listens there, and not a SuperLink")
    except OSError as error:
        reason = error.strerror or str(error)
        yield fail(
            "reachable",
            f"nobody answers at {front.address} ({reason})",
            "look whether it runs, and whether a firewall is between; sites only dial out",
        )


def _lasting(front: Front, shown: Mapping[str, Any]) -> Finding:
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(shown["notAfter"]), UTC)
    days = (ends - datetime.now(UTC)).days
    says = f"the certificate of {front.address} is good for {days} days more, until {ends:%Y-%m-%d}"
    if days < SOON_DAYS:
        return warn("tls", says, "have it renewed, and restart the proxy")
    return ok("tls", says)


def _distrusted(front: Front, error: ssl.SSLCertVerificationError) -> Finding:
    expired, own, unknown, wrong_name, wrong_address = 10, (18, 19), (20, 21), 62, 64
    says = f"the certificate of {front.address} is not believed: {error.verify_message}"
    if error.verify_code == expired:
        return fail("tls", says, "have it renewed, and restart the proxy; check this clock, too")
    if error.verify_code in (wrong_name, wrong_address):
        do = f"dial a name that is in it, or have one made for {front.host}"
        return fail("tls", says, do)
    if error.verify_code in (*own, *unknown):
        do = "name the file of who signed it as root_certificates, or by --proxy-ca"
        return fail("tls", f"{says}; {front.authority or 'no authority of this system'}", do)
    return fail("tls", says, "have another one made")


def answers(front: Front, who: str) -> Iterator[Finding]:
    """Look whether a SuperLink is there, and whether its clock is as ours."""
    before = time.time()
    reply = front.ask("GET", "/health")
    here = (before + time.time()) / 2
    if reply.status != 200:
        yield fail(
            "reachable",
            f"no SuperLink answers behind {front.address} "
            f"({f'status {reply.status}' if reply.status else 'the connection was closed'})",
            "look whether weft superlink start runs, and whether the proxy reaches it",
        )
        return
    yield ok("reachable", f"{who} answers at {front.address}")
    date = next((v for k, v in reply.headers.items() if k.lower() == "date"), None)
    if date is None:
        return
    ahead = here - parsedate_to_datetime(date).timestamp() - 0.5  # it is cut to whole seconds
    says = f"this clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} {who}'s"
    do = "have both clocks set by NTP, for example by systemd-timesyncd or chrony"
    if ahead > AHEAD_S or ahead < -BEHIND_S:
        yield fail("clock", f"{says}, which refuses what is signed that far off", do)
    elif abs(ahead) > WORTH_A_WORD_S:
        yield warn("clock", says, do)
    else:
        yield ok("clock", f"this clock and {who}'s agree")


def refuses(front: Front, paths: Iterable[str] = KNOCKS) -> Iterator[Finding]:
    """Look whether what only the coordinator may ask is refused there, by asking it."""
    found = []
    asked = sorted(set(paths))
    for path in asked:
        for method in ("GET", "POST"):
            status = front.ask(method, path).status
            if status not in _NOTHING_THERE:
                found.append(f"{method} {path} ({status})")
    if found:
        yield fail(
            "exposure",
            f"{front.address} answers what only the coordinator may ask: {', '.join(found[:4])}"
            f"{f' and {len(found) - 4} more' if len(found) > 4 else ''}; whoever reaches this runs "
            "code at every site",
            "close that port at once, and put the proxy before the SuperLink (weft proxy)",
        )
    else:
        yield ok("exposure", f"{front.address} refuses {len(asked)} paths of control and runtime")


def interfaces(superlink: Front) -> tuple[str, list[str]]:
    """Return a SuperLink's version of Flower, and the paths it serves that no site calls.

    Both are empty where it does not tell.
    """
    reply = superlink.ask("GET", "/openapi.json")
    if reply.status != 200:
        return "", []
    try:
        told = json.loads(reply.body)
        version, paths = str(told["info"]["version"]), [*told["paths"]]
    except (ValueError, KeyError, TypeError):
        return "", []
    return version, [p for p in paths if not p.startswith("/v1/fleet/") and p != "/health"]
