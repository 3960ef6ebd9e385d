"""Whole runs: small federations of real processes on real text."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from clients.flower_runtime import Endpoint
from orchestrator.backends.superlink import SuperLink
from orchestrator.cli import app
from orchestrator.node_keys import keys_in_step
from orchestrator.workspace import open_workspace

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the real data sets and models."""
    if not SHARED.is_dir():
        pytest.skip("the real data sets and models of ../shared/data are not here")
    return SHARED


@pytest.fixture(scope="session")
def killed() -> Iterator[Callable[..., None]]:
    """Runs a federation, or a stream of them, in a process of its own until it is killed."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("die_at.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout

        def run(home: Path, document: Mapping[str, Any], kind: str, count: int) -> None:
            what = "stream" if "tasks" in document else "config"
            job = {"folder": str(Path.cwd()), "home": str(home), what: document}
            process.stdin.write(json.dumps({**job, "kind": kind, "count": count}) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{-signal.SIGKILL}\n"

        yield run


class Authority:
    """A site's certificate authority, which signs what a test asks for.

    Attributes:
        certificate: file of its own certificate, which clients trust.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        signed = (
            self._begin(self._name, self._key.public_key(), 30)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = folder / "ca.crt"
        self.certificate.write_bytes(signed.public_bytes(Encoding.PEM))

    def issue(self, *names: str, days: float = 30) -> tuple[Path, Path]:
        """Return the files of a certificate for names and addresses, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        signed = (
            self._begin(subject, key.public_key(), days)
            .add_extension(x509.SubjectAlternativeName(map(_san, names)), critical=False)
            .add_extension(_usage(digital_signature=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        stem = f"{names[0]}-{signed.serial_number:x}"
        certificate, private = self._folder / f"{stem}.crt", self._folder / f"{stem}.key"
        certificate.write_bytes(signed.public_bytes(Encoding.PEM))
        private.touch(0o600)
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, private

    def _begin(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: float
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=60))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )


def _usage(**chosen: bool) -> x509.KeyUsage:
    kinds = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment")
    kinds += ("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**(dict.fromkeys(kinds, False) | chosen))


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


SCRIPTS = Path(sysconfig.get_path("scripts"))
CADDYFILE = Path(__file__).resolve().parents[2] / "orchestrator" / "deployment" / "Caddyfile"


class Servers:
    """Starts the servers of a deployment on loopback.

    Attributes:
        authority: who signed what they show.
    """

    def __init__(self, authority: Authority) -> None:
        self.authority = authority

    @contextmanager
    def running(
        self,
        command: Sequence[str | Path],
        port: int | None,
        environment: Mapping[str, str],
        log: Path,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a server until the end of the block.

        It begins when the server listens on a port of loopback; for None, at once.
        """
        with (
            log.open("ab") as sink,
            subprocess.Popen(
                [*map(str, command)],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
            ) as process,
        ):
            try:
                if port is not None:
                    self.until(lambda: process.poll() is not None or listens(port))
                    assert process.poll() is None, log.read_text()
                yield process
            finally:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()

    def free_port(self) -> int:
        """Return a port of loopback that nobody listens on."""
        return free_port()

    def until(self, true: Callable[[], bool], limit_s: float = 60) -> None:
        """Wait until something is true; fails if that takes too long."""
        end = time.monotonic() + limit_s
        while not true():
            assert time.monotonic() < end, "what was waited for has not come"
            time.sleep(0.05)

    @contextmanager
    def proxy(
        self, superlink: int, folder: Path, name: str = "localhost", authority: Path | None = None
    ) -> Iterator[int]:
        """Run the shipped proxy before a SuperLink; yields the port it listens on.

        Args:
            superlink: port that it listens on.
            folder: for the log.
            name: that sites dial, or several; it listens on those that are addresses, too.
            authority: who signed the SuperLink's certificate; by default who signs all here.
        """
        port = free_port()
        certificate, key = self.authority.issue(*name.split())
        addresses = [n for n in name.split() if isinstance(_san(n), x509.IPAddress)]
        addresses = [a for a in addresses if not ipaddress.ip_address(a).is_loopback]
        environment = {
            "WEFT_PROXY_NAME": name,
            "WEFT_PROXY_PORT": str(port),
            "WEFT_PROXY_BIND": " ".join(["127.0.0.1", *addresses]),
            "WEFT_PROXY_TLS": f"{certificate} {key}",
            "WEFT_SUPERLINK": f"127.0.0.1:{superlink}",
            "WEFT_SUPERLINK_CA": str(authority or self.authority.certificate),
            "XDG_DATA_HOME": str(folder / "caddy"),
            "XDG_CONFIG_HOME": str(folder / "caddy"),
        }
        command = [SCRIPTS / "caddy", "run", "--config", CADDYFILE, "--adapter", "caddyfile"]
        with self.running(command, port, environment, folder / "caddy.log"):
            yield port

    @contextmanager
    def superlink(self, folder: Path) -> Iterator[int]:
        """Run a SuperLink that asks sites for keys; yields the port it listens on."""
        port = free_port()
        with self.superlink_at(port, folder):
            yield port

    @contextmanager
    def superlink_at(
        self, port: int, folder: Path, isolation: str = "process"
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a SuperLink at a port, with the database that is in the folder.

        Args:
            port: of loopback.
            folder: for its files.
            isolation: ``process`` for one that runs no app, ``subprocess`` for one that does.
        """
        certificate, key = self.authority.issue("localhost", "127.0.0.1")
        secret = folder / "superexec.secret"
        secret.touch(0o600)
        secret.write_text("a secret of these tests, and of nothing else")
        command = [SCRIPTS / "flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--ssl-ca-certfile", self.authority.certificate, "--ssl-keyfile", key]
        command += ["--ssl-certfile", certificate, "--enable-supernode-auth"]
        command += ["--isolation", isolation, "--database", folder / "state.db"]
        if isolation == "process":
            command += ["--superexec-auth-secret-file", secret]
        environment, log = flower_environment(folder), folder / "superlink.log"
        with self.running(command, port, environment, log) as process:
            yield process

    @contextmanager
    def supernode(
        self, address: str, key: Path, folder: Path, where: Sequence[str] = ()
    ) -> Iterator[Path]:
        """Run a SuperNode that dials ``address``; yields its log.

        Args:
            address: of a proxy, or a SuperLink.
            key: file of its private key.
            folder: for its log and state.
            where: what a command that runs in its network begins with.
        """
        log = folder / "supernode.log"
        command = [*where, SCRIPTS / "flower-supernode", "--superlink", address]
        command += ["--port", str(free_port()), "--isolation", "process"]
        command += ["--root-certificates", self.authority.certificate]
        command += ["--auth-supernode-private-key", key]
        with self.running(command, None, flower_environment(folder), log):
            yield log

    def flwr(self, superlink: int, folder: Path) -> Callable[..., str]:
        """Return Flower's command line, to which a SuperLink is called ``test``."""
        home = folder / "admin"
        home.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "test"\n[superlink.test]\n'
            f'address = "localhost:{superlink}"\n'
            f'root-certificates = "{self.authority.certificate}"\n'
        )

        def run(*words: str | Path) -> str:
            done = subprocess.run(
                [SCRIPTS / "flwr", *words],
                env={**os.environ, **flower_environment(folder), "FLWR_HOME": str(home)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        return run

    def admin(self, superlink: int, folder: Path) -> Callable[..., str]:
        """Return Flower's command line for a SuperLink's nodes."""
        return partial(self.flwr(superlink, folder), "supernode")


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether somebody listens on a port of loopback."""
    with socket.socket() as trial:
        trial.settimeout(5)
        return trial.connect_ex(("127.0.0.1", port)) == 0


def flower_environment(folder: Path) -> dict[str, str]:
    """Return what keeps Flower's programs from the network and from each other's homes."""
    return {
        "PATH": os.pathsep.join([str(SCRIPTS), os.environ["PATH"]]),  # it starts others by name
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Servers:
    """Starts SuperLinks and proxies whose certificates one authority signed."""
    return Servers(Authority(tmp_path_factory.mktemp("authority")))


class SiteNetworks:
    """A network of its own for each site, which reaches the servers' machine alone.

    A namespace is a machine's network without a machine: its processes see one cable, which ends at
    a bridge here and can be pulled. Where namespaces cannot be made, sites are plain processes and
    no cable can be pulled.

    Attributes:
        address: of this end, which sites dial.
        separate: whether sites have networks of their own.
    """

    def __init__(self) -> None:
        self._tag = f"weft{os.getpid() % 100_000}"
        self._sites: list[str] = []
        third = os.getpid() % 250
        self._net = f"10.231.{third}"
        self.separate = os.geteuid() == 0 and shutil.which("ip") is not None
        self.separate = self.separate and self._ip("link", "add", self._tag, "type", "bridge")
        self.address = f"{self._net}.1" if self.separate else "127.0.0.1"
        if self.separate:
            assert self._ip("addr", "add", f"{self.address}/24", "dev", self._tag)
            assert self._ip("link", "set", self._tag, "up")

    def add(self, site: str) -> list[str]:
        """Give a site a network; returns what commands that run in it begin with."""
        if not self.separate:
            return []
        number, name = len(self._sites) + 2, self._name(site)
        self._sites.append(site)
        cable, end = self._cable(site), f"{self._tag}n{number}"
        assert self._ip("netns", "add", name)
        assert self._ip("link", "add", cable, "type", "veth", "peer", "name", end, "netns", name)
        assert self._ip("link", "set", cable, "master", self._tag)
        # sites do not see each other
        assert self._ip("link", "set", cable, "type", "bridge_slave", "isolated", "on")
        assert self._ip("link", "set", cable, "up")
        assert self._ip("-n", name, "link", "set", "lo", "up")
        assert self._ip("-n", name, "addr", "add", f"{self._net}.{number}/24", "dev", end)
        assert self._ip("-n", name, "link", "set", end, "up")
        return ["ip", "netns", "exec", name]

    def cut(self, site: str) -> None:
        """Pull a site's cable."""
        if not self.separate:
            pytest.skip("there are no network namespaces here, so that none can be cut off")
        assert self._ip("link", "set", self._cable(site), "down")

    def restore(self, site: str) -> None:
        """Plug it in again."""
        assert self._ip("link", "set", self._cable(site), "up")

    def close(self) -> None:
        """Take everything down."""
        for site in self._sites:
            self._ip("netns", "delete", self._name(site))
        if self.separate:
            self._ip("link", "delete", self._tag)

    def _name(self, site: str) -> str:
        return f"{self._tag}-{site}"

    def _cable(self, site: str) -> str:
        return f"{self._tag}c{self._sites.index(site) + 2}"

    def _ip(self, *words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def networks() -> Iterator[SiteNetworks]:
    """A network for each site that is added, where the machine allows that."""
    made = SiteNetworks()
    yield made
    made.close()


SITES = ("north", "south", "west")
LABELS = ("question", "order", "greeting")
WORDS = "where who what when bring go tell leave good hello welcome how dog cat data thread"


class Federation:
    """A coordinator's home, its SuperLink and proxy, and three sites that may come and go.

    Attributes:
        home: the coordinator's.
        folder: that has a folder for each site.
        address: where sites dial.
        port: of the SuperLink itself.
        networks: the sites' cables.
        isolation: of the SuperLink.
    """

    def __init__(
        self, servers: Any, networks: Any, folder: Path, model: Path, isolation: str = "process"
    ) -> None:
        self.servers, self.networks, self.folder, self.model = servers, networks, folder, model
        self.isolation = isolation
        self.home = folder / "coordinator"
        self.address = ""
        self.port = 0
        self.environment: dict[str, str] = {}
        self._where: dict[str, list[str]] = {}

    def weft(self, *words: str | Path, home: Path | None = None) -> str:
        """Run a command of weft's to its end, in this process; returns what it printed."""
        given = {**self.environment, "WEFT_HOME": str(home or self.home)}
        done = CliRunner().invoke(app, [*map(str, words)], env=given)
        assert done.exit_code == 0, f"{words}\n{done.output}\n{done.exception!r}"
        return done.stdout

    def begin(self, stack: ExitStack) -> None:
        """Start what the coordinator has, and let three nodes in."""
        self.port = self.servers.free_port()
        started = self.servers.superlink_at(self.port, self.folder, self.isolation)
        self.superlink = stack.enter_context(started)
        self._stack = stack
        authority, secret = self.servers.authority.certificate, self.folder / "superexec.secret"
        self.environment = {
            "WEFT_SUPERLINK": f"localhost:{self.port}",
            "WEFT_SUPERLINK_CA": str(authority),
            "WEFT_SUPERLINK_SECRET_FILE": str(secret),
        }
        names = f"localhost {self.networks.address}"
        proxy = stack.enter_context(self.servers.proxy(self.port, self.folder, names))
        self.address = f"{self.networks.address}:{proxy}"
        for name in SITES:
            self.join(name)
        self.step()

    def step(self) -> None:
        """Bring the keys that the SuperLink lets in into step, as weft superlink start does."""
        secret = (self.folder / "superexec.secret").read_bytes()
        authority = self.servers.authority.certificate.read_bytes()
        endpoint = Endpoint(f"localhost:{self.port}", authority)
        superlink = SuperLink(endpoint, secret, self.folder / "state.db")
        workspace = open_workspace(self.home)
        keys_in_step(superlink, workspace.ledger)
        superlink.close()
        workspace.close()

    def lose_superlink(self) -> None:
        """Kill the SuperLink, and start it again with the database that it left."""
        self.superlink.kill()
        self.superlink.wait()
        again = self.servers.superlink_at(self.port, self.folder, self.isolation)
        self.superlink = self._stack.enter_context(again)

    def found(self, name: str, private: bool = False, holdout: float = 0.0) -> None:
        """Make a site: its data, its node, and a policy that lets tests choose its noise."""
        whose = ("--epsilon", "100", "--delta", "1e-3") if private else ("--public",)
        self.weft(
            *("node", "init", self.folder / name, "--name", name, "--superlink", self.address),
            *("--root-certificates", self.servers.authority.certificate, *whose),
            *("--data", f"notes=jsonl:{self.data(name)}", "--model", self.model),
            *("--label", f"region={name}"),
        )
        file = self.folder / name / "node.yaml"
        settings = yaml.safe_load(file.read_text("utf-8"))
        settings["policy"] = {"insecure_seed": True}
        settings["data"]["notes"]["holdout"] = holdout
        file.write_text(yaml.safe_dump(settings), "utf-8")
        join = self.weft("node", "join", file)
        (self.folder / name / "join.json").write_text(join, "utf-8")

    def join(self, name: str, **kind: Any) -> None:
        """Make a site with a network of its own, and let it in."""
        self._where[name] = self.networks.add(name)
        self.found(name, **kind)
        self.weft("clients", "add", "--join", self.folder / name / "join.json")

    def until_online(self, *names: str) -> None:
        """Wait until nodes have dialled in."""

        def there() -> bool:
            nodes = json.loads(self.weft("superlink", "status", "--json"))["nodes"]
            return set(names) <= {one["name"] for one in nodes if one["status"] == "online"}

        self.servers.until(there, 900)

    def data(self, name: str) -> Path:
        """Write a site's records; returns their file."""
        file = self.folder / f"{name}.jsonl"
        words = WORDS.split()
        rows = [
            {"text": f"{words[n % 7]} {name} {words[(3 * n) % 16]}", "label": LABELS[n % 3]}
            for n in range(24)
        ]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return file

    def running(
        self, words: list[Any], port: int | None, name: str, **environment: str | Path
    ) -> Any:
        """Run a server of weft's."""
        where = self._where.get(name, [])
        command = [*where, sys.executable, "-m", "orchestrator.cli", *map(str, words)]
        given = {key: str(value) for key, value in environment.items()}
        return self.servers.running(command, port, given, self.folder / f"{name}.log")

    def node(self, name: str) -> Any:
        """Run a site's node, in its network."""
        return self.running(["node", "start", self.folder / name / "node.yaml"], None, name)

    def config(self, **changes: Any) -> Path:
        """Write a run's file."""
        document = {
            "name": "notes",
            "model": str(self.model),
            "labels": list(LABELS),
            "adapter": {"name": "lora", "r": 4, "target_modules": ["query", "value"]},
            "strategy": "fedsvd",
            "optimizer": {"name": "adamw", "lr": 0.01},
            "clients": {"select": {}},
            "privacy": {"epsilon": 8, "delta": 1e-3, "insecure_seed": 7},
            "rounds": 3,
            "steps": 2,
            "batch_size": 8,
            "deadline_s": 900,  # nodes take minutes to begin where everybody wants the CPU
            "quorum": 3,
            "backend": "superlink",
        }
        file = self.folder / f"{changes.get('name', 'notes')}.yaml"
        file.write_text(yaml.safe_dump(document | changes), "utf-8")
        return file

    def version(self, ref: str, home: Path | None = None) -> Mapping[str, Any]:
        """Return a version as JSON."""
        shown: Mapping[str, Any] = json.loads(self.weft("show", ref, "--json", home=home))
        return shown


@pytest.fixture(scope="module")
def isolation() -> str:
    """How the SuperLink of the federation runs apps: not at all."""
    return "process"


@pytest.fixture(scope="module")
def federation(
    servers: Any,
    networks: Any,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_encoder: Path,
    isolation: str,
) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("sites")
    made = Federation(servers, networks, folder, tiny_encoder, isolation)
    with ExitStack() as stack:
        made.begin(stack)
        yield made
