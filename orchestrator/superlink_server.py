"""A home's SuperLink: Flower's own program, started so that it gives nothing to who has no right.

It asks for a secret before it hands out a run, lets registered keys in alone, keeps what it knows
in a database, tells nobody of its start, installs nothing, and speaks TLS, which Flower demands of
it even behind a proxy. Its control interface asks nobody who they are, so whoever reaches it rules
every site: it listens on this machine, or on a private network whose other members are trusted, and
the world reaches what sites call through a proxy (:mod:`orchestrator.deployment.proxy`).

The program ends with this process, which keeps the keys that it lets in those of the ledger.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from clients import flower_program
from clients.files import write_durably
from orchestrator.deployment.certificates import Names, make_certificates
from orchestrator.deployment.proxy import is_host
from orchestrator.superlink_home import PORT, SuperLinkHome

if TYPE_CHECKING:
    from orchestrator.backends.superlink import SuperLink

STEP_S = 3.0
"""Seconds between two looks at which keys are to be let in."""

_LOG = logging.getLogger(__name__)
_QUIET = {"FLWR_LOG_LEVEL": "WARNING"}  # else it tells each request, of every site, for ever
_PROGRAM = "flower-superlink"
_UP_WITHIN_S = 120.0
_GRACE_S = 10.0
_LONGEST_PAUSE_S = 30.0


class BadListening(ValueError):
    """A SuperLink that would listen where it must not, or with half of its certificates."""


class SuperLinkFailed(RuntimeError):
    """Flower's program cannot be started, or does not stay."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a SuperLink listens, and as whom.

    Attributes:
        host: address of this machine's own, or of it on a private network.
        port: of all its interfaces.
        names: host names and addresses that its certificate is for, besides its host's and this
            machine's; used where it is made here.
        certificate: with its chain, PEM; None to have one made and signed here.
        key: of the certificate.
        authority: who signed the certificate, PEM.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    names: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None

    def __post_init__(self) -> None:
        files = (self.certificate, self.key, self.authority)
        if any(files) and not all(files):
            raise BadListening(
                "a certificate needs all of --certificate, --key and --authority; give the rest, "
                "or none to have one made"
            )
        if not 1 <= self.port <= 65535:
            raise BadListening(f"--port must be between 1 and 65535, got {self.port}")
        for name in self.names:
            if not is_host(name):
                raise BadListening(
                    f"--name must be a host name in lower case, or an address, got {name!r}"
                )
        try:
            host = ip_address(self.host)
        except ValueError as error:
            raise BadListening(
                f"--host is an address of this machine such as 127.0.0.1, got {self.host!r}"
            ) from error
        if host.is_global:
            raise BadListening(
                f"--host {self.host} is reached by the whole world, and so would be the control "
                "interface, which asks nobody who they are; listen on 127.0.0.1 or a private "
                "address, and expose what sites call by a proxy (weft proxy)"
            )

    @property
    def address(self) -> str:
        """Host and port, as who is on this machine dials it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


@dataclass(slots=True)
class SuperLinkServer:
    """Runs a home's SuperLink until it is stopped, again where it ends by itself.

    Args:
        own: the home's files.
        listening: where it listens.
        stop: when set, it is ended.
    """

    own: SuperLinkHome
    listening: Listening
    stop: threading.Event
    _child: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def serve(
        self, step: Callable[[SuperLink], object], up: Callable[[], None] = lambda: None
    ) -> None:
        """Serve until stopped.

        Args:
            step: brings the keys into step; called when it answers, and every few seconds.
            up: called when it answers for the first time.

        Raises:
            SuperLinkFailed: if its port is taken, or it does not come up.
        """
        from orchestrator.backends.superlink import Endpoint, SuperLink

        _check_free(self.listening)
        tls = self.prepare()
        endpoint = Endpoint(self.listening.address, tls[2].read_bytes())
        link = SuperLink(endpoint, self.own.secret.read_bytes(), self.own.database)
        try:
            self._keep(link, tls, step, up)
        finally:
            link.close()

    def _keep(
        self,
        link: SuperLink,
        tls: tuple[Path, Path, Path],
        step: Callable[[SuperLink], object],
        up: Callable[[], None],
    ) -> None:
        """Start the program, and start it again where it ends, until stopped."""
        pause, told = 1.0, False
        while not self.stop.is_set():
            began = time.monotonic()
            self._child = self._started(tls)
            try:
                self._wait(link, first=not told)
                if not told:
                    up()
                told = True
                self._tend(partial(step, link))
            finally:
                self._end()
            if self.stop.is_set():
                return
            lasted = time.monotonic() - began
            pause = 1.0 if lasted > _UP_WITHIN_S else min(2 * pause, _LONGEST_PAUSE_S)
            _LOG.warning("the SuperLink ended; it is started again in %.0f s: %s", pause, self.log)
            self.stop.wait(pause)

    @property
    def log(self) -> Path:
        """What the program says."""
        return self.own.folder / "superlink.log"

    def prepare(self) -> tuple[Path, Path, Path]:
        """Make what is missing; return certificate, key and authority.

        Raises:
            BadListening: if a certificate cannot be read.
        """
        folder, listening = self.own.folder, self.listening
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.own.secret.exists():
            write_durably(self.own.secret, secrets.token_hex(32).encode())  # nobody else's to read
        write_durably(self.own.address, listening.address.encode())
        if listening.certificate and listening.key and listening.authority:
            files = listening.certificate, listening.key, listening.authority
            _check_pair(files)
            if self.own.authority.resolve() != listening.authority.resolve():
                self.own.authority.parent.mkdir(mode=0o700, exist_ok=True)
                write_durably(self.own.authority, listening.authority.read_bytes())
            return files
        host = () if ip_address(listening.host).is_unspecified else (listening.host,)
        return make_certificates(self.own.authority.parent, Names((*host, *listening.names)))

    def command(self, tls: tuple[Path, Path, Path]) -> list[str]:
        """Return the program's command line; its secrets are in files."""
        try:
            program = flower_program.path_of(_PROGRAM)
        except FileNotFoundError as error:
            raise SuperLinkFailed(str(error)) from None
        certificate, key, authority = (str(path) for path in tls)
        return [
            *(str(program), "--host", self.listening.host, "--port", str(self.listening.port)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self.own.secret)),
            *("--database", str(self.own.database), "--enable-supernode-auth"),
            *("--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certfile", authority),
        ]

    def _started(self, tls: tuple[Path, Path, Path]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                flower_program.bound(self.command(tls)),
                env=_QUIET | flower_program.environment(self.own.folder / "flwr"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=0o077,
                start_new_session=True,  # Ctrl-C is for this process, which ends it
            )

    def _wait(self, link: SuperLink, first: bool) -> None:
        """Wait until it answers.

        Raises:
            SuperLinkFailed: if it ends instead, or takes too long, when it is started first.
        """
        until = time.monotonic() + _UP_WITHIN_S
        while not self.stop.is_set() and not _answers(link):
            ended = self._child is None or self._child.poll() is not None
            if ended and not first:
                return
            if ended or time.monotonic() > until:
                what = "ended at once" if ended else f"did not answer within {_UP_WITHIN_S:.0f} s"
                raise SuperLinkFailed(
                    f"the SuperLink {what}; is {self.listening.address} taken? It says why at the "
                    f"end of {self.log}"
                )
            self.stop.wait(0.2)

    def _tend(self, step: Callable[[], object]) -> None:
        """Keep the keys in step until the program ends, or is to."""
        while not self.stop.is_set() and self._child is not None and self._child.poll() is None:
            try:
                step()
            except Exception as error:  # a ledger that is locked, say: sites are served on
                _LOG.warning("keys could not be brought into step, next try soon: %s", error)
            self.stop.wait(STEP_S)

    def _end(self) -> None:
        if self._child is not None:
            flower_program.end(self._child, _GRACE_S)


def only_one(own: SuperLinkHome) -> AbstractContextManager[None]:
    """Hold a home's SuperLink for this process.

    Raises:
        SuperLinkFailed: on entry, if another process has it.
    """
    taken = SuperLinkFailed(
        f"the SuperLink of {own.folder.parent} runs already; see weft superlink status"
    )
    return flower_program.held(own.folder / "lock", taken)


def _check_free(listening: Listening) -> None:
    """Raise SuperLinkFailed if nothing can listen there, such as where something does."""
    family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((listening.host, listening.port))
        except OSError as error:
            raise SuperLinkFailed(
                f"a SuperLink cannot listen at {listening.address} ({error.strerror}); end what "
                "does, or choose another --port or --host"
            ) from error


def _answers(link: SuperLink) -> bool:
    try:
        link.nodes()
    except ConnectionError:
        return False
    return True


def _check_pair(files: tuple[Path, Path, Path]) -> None:
    certificate, key, authority = files
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")  # asks nobody for one
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise BadListening(
            f"{certificate}, {key} and {authority} are no certificate, its key and who signed it "
            f"({error}); give PEM files of one another"
        ) from error
