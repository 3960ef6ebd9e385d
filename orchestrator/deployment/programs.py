"""Looks at Flower's and Ray's programs that run on this machine: how they were started."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from orchestrator.deployment.findings import Finding, fail, ok, warn
from orchestrator.deployment.machine import secrets
from orchestrator.deployment.reaching import Front

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": ("0", "tells its maker of every start"),
    "FLWR_DISABLE_UPDATE_CHECK": ("1", "asks its maker for updates at every start"),
}
"""Environment of Flower's programs, and what they do without."""

_OURS = {"clients.flower_supernode": "flower-supernode"}
"""Modules that are such a program, and its name."""

_NO_INSTALLATION = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
_RESTART = "start it by weft superlink start, or weft node start, which do"


@dataclass(frozen=True, slots=True)
class Program:
    """A program that runs.

    Attributes:
        name: such as ``flower-superlink``.
        pid: its process.
        words: its command line.
        environment: that it was started with; None if it is somebody else's.
        folder: where it runs.
        addresses: that it listens on.
        ports: that it listens on, or dials by its command line.
    """

    name: str
    pid: int
    words: Sequence[str]
    environment: Mapping[str, str] | None
    folder: Path
    addresses: frozenset[str]
    ports: frozenset[int] = frozenset()

    def option(self, name: str) -> str | None:
        """Return what follows an option on the command line."""
        for word, value in zip(self.words, [*self.words[1:], ""], strict=True):
            if word == name:
                return value
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        return None

    def __str__(self) -> str:
        """Return how people find it."""
        return f"{self.name} (process {self.pid})"


def running(*names: str) -> list[Program]:
    """Return the programs of these names that run here, oldest first.

    Args:
        names: of programs, such as ``flower-superlink``.
    """
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            called = (_OURS.get(word, Path(word).name) for word in words[:4])
            name = next((name for name in called if name in names), None)
            if name is not None:
                found.append(_program(name, process, words))
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        except psutil.AccessDenied:
            continue  # not even its command line is ours to read
    return sorted(found, key=lambda one: one.pid)


def of_deployment(programs: Sequence[Program], ends: Sequence[Front]) -> list[Program]:
    """Return the programs that listen where a deployment is dialed, or dial there.

    Others, such as those of another deployment on this machine, are none of its business. Another
    user's are: nobody knows what they are for.

    Args:
        programs: of Flower's.
        ends: where the deployment's SuperLink is dialed; none if that is not known, which may be
            anywhere.
    """
    ports = {end.port for end in ends}
    return [one for one in programs if not ends or one.environment is None or one.ports & ports]


def _program(name: str, process: psutil.Process, words: Sequence[str]) -> Program:
    try:
        environment = process.environ()
        folder = Path(process.cwd())
        listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:
        return Program(name, process.pid, words, None, Path("/"), frozenset())
    addresses = frozenset(c.laddr.ip for c in listening)
    ports = frozenset(c.laddr.port for c in listening)
    made = Program(name, process.pid, words, environment, folder, addresses, ports)
    dialed = (made.option("--superlink") or "").rpartition(":")[2]
    return replace(made, ports=ports | {int(dialed)}) if dialed.isdecimal() else made


def flower(programs: Sequence[Program]) -> Iterator[Finding]:
    """Look at SuperLinks and SuperNodes that run here."""
    for program in programs:
        if program.environment is None:
            yield warn(
                "flower",
                f"{program} is another user's, and cannot be looked into",
                "run weft doctor as the user who started it",
            )
            continue
        found = [*_switches(program), *_closed(program)]
        if program.name == "flower-superlink":
            found += _superlink(program)
        yield from found
        if not found:
            yield ok("flower", f"{program} asks for secrets and tells nobody")
        secret = program.option("--superexec-auth-secret-file")
        files = [secret, program.option("--ssl-keyfile")]
        files.append(program.option("--auth-supernode-private-key"))
        yield from secrets(program.folder / file for file in files if file)


def _switches(program: Program) -> Iterator[Finding]:
    environment = program.environment or {}
    for name, (wanted, otherwise) in SWITCHES.items():
        if environment.get(name) != wanted:
            says = f"{program} runs without {name}={wanted}, and {otherwise}"
            yield warn("flower", says, f"set {name}={wanted} and restart it; or {_RESTART}")
    off = environment.get(_NO_INSTALLATION, "").lower() in ("1", "true")
    on = "--allow-runtime-dependency-installation" in program.words
    wanted_off = program.name == "flower-superlink" and not off
    if on or (wanted_off and "--disable-runtime-dependency-installation" not in program.words):
        says = f"{program} installs what an app asks for, from the network, at every run"
        yield warn("flower", says, f"set {_NO_INSTALLATION}=1 and restart it; or {_RESTART}")


def _closed(program: Program) -> Iterator[Finding]:
    secret = program.option("--superexec-auth-secret-file")
    if program.option("--isolation") != "process" or secret is None:
        yield fail(
            "flower",
            f"{program} gives its tasks to whoever asks, without a secret",
            f"it needs --isolation process and --superexec-auth-secret-file FILE; {_RESTART}",
        )
    if "--insecure" in program.words:
        says = f"{program} speaks without TLS: whoever is between reads and changes what is said"
        yield fail("flower", says, f"give it certificates; {_RESTART}")


def _superlink(program: Program) -> Iterator[Finding]:
    if "--enable-supernode-auth" not in program.words:
        says = f"{program} lets every node in, with or without a key"
        yield fail("flower", says, f"it needs --enable-supernode-auth; {_RESTART}")
    if program.option("--database") is None:
        says = f"{program} keeps what it knows in memory: a restart forgets every node and message"
        yield warn("flower", says, f"it needs --database FILE; {_RESTART}")
    yield from _exposed(
        program,
        "whoever reaches its control interface runs code at every site",
        "bind it to 127.0.0.1 and put the proxy before it (weft proxy)",
    )


def ray(programs: Sequence[Program]) -> Iterator[Finding]:
    """Look at Ray heads that run here."""
    for program in programs:
        if program.environment is None:
            yield warn(
                "ray",
                f"{program} is another user's, and cannot be looked into",
                "run weft doctor as the user who started it",
            )
        elif program.environment.get("RAY_AUTH_MODE") == "token":
            yield ok("ray", f"{program} asks for a token")
        else:
            open_to = list(_exposed(program, "", "", "ray"))
            says = f"{program} asks nobody for a token, and whoever reaches it runs code on it"
            do = "restart it with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
            yield (fail if open_to else warn)("ray", says, do)


def _exposed(program: Program, so: str, do: str, check: str = "ports") -> Iterator[Finding]:
    """Say where a program listens, if not on loopback alone."""
    beyond = {a for a in program.addresses if not ipaddress.ip_address(a).is_loopback}
    if not beyond:
        return
    reached = {a for one in beyond for a in _reachable(one)}
    public = sorted(a for a in reached if ipaddress.ip_address(a).is_global)
    says = f"{program} listens on {', '.join(sorted(beyond))}"
    if public:
        yield fail(check, f"{says}, which is {', '.join(public)} to the world: {so}", do)
    else:
        yield warn(
            check, f"{says}, a private network: {so}", f"{do}; or let only the proxy in there"
        )


def _reachable(address: str) -> set[str]:
    """Return the addresses of this machine that an address to listen on stands for."""
    found = ipaddress.ip_address(address)
    if not found.is_unspecified:
        return {address}
    own = {a.address.partition("%")[0] for each in psutil.net_if_addrs().values() for a in each}
    return {a for a in own if _is_address(a) and not ipaddress.ip_address(a).is_loopback}


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
