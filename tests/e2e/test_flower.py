"""The app of docs/flower.md, as it stands there, on Flower's deployment engine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from safetensors.torch import load_file
from torch import Tensor, equal
from torch.testing import assert_close

from orchestrator import service
from orchestrator.config import parse_config
from storage.ledger import ClientRecord

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "flower.md").read_text("utf-8")
TOML, CLIENT, SERVER, FEDAVG = re.findall(r"```(?:toml|python)\n(.*?)```", PAGE, re.DOTALL)
[OURS] = re.findall(r"^ +strategy = WeftStrategy.*\n", SERVER, re.MULTILINE)
LABELS = ["cat", "dog", "model", "rank"]
WORDS = ("the", "a", "learns", "weaves", "thread", "adapter", "private", "data", "round")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    """Return as soon as a server answers; fail where it ends, or answers nothing in a minute."""
    for _ in range(600):
        with suppress(OSError), urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        with suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"the server ended with code {process.wait(0.1)}")
    raise AssertionError(f"{url} does not answer")


@dataclass(frozen=True)
class Site:
    """Where Flower runs: its commands, their environment, and the clients' data."""

    folder: Path
    environment: dict[str, str]
    data: dict[str, str]

    def argv(self, name: str, *arguments: str) -> list[str]:
        """A command of the environment that this interpreter is of."""
        return [str(Path(sys.executable).with_name(name)), *arguments]

    @contextmanager
    def kept_running(self, name: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a server with all that it starts until the end of the block."""
        with (self.folder / f"{name}-{free_port()}.log").open("wb") as log:
            process = subprocess.Popen(
                self.argv(name, *arguments),
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(10)
                finally:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def flwr(self, *arguments: str) -> str:
        """Run Flower's command line and return what it prints."""
        done = subprocess.run(
            self.argv("flwr", *arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Site]:
    """A SuperLink and two SuperNodes on this machine, each with the data of a client."""
    folder = tmp_path_factory.mktemp("flower")
    (folder / "home").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "OMP_NUM_THREADS": "1",
        "WEFT_CACHE": str(cache),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    data = {}
    for shift, client in enumerate("ab"):
        words = [" ".join(WORDS[(i + shift + j) % len(WORDS)] for j in range(3)) for i in range(12)]
        rows = [
            {"text": f"{LABELS[i % 4]} {w}", "label": LABELS[i % 4]} for i, w in enumerate(words)
        ]
        path = folder / f"{client}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data[client] = f"jsonl:{path}"
    made = Site(folder, environment, data)
    link = f"127.0.0.1:{free_port()}"
    connection = (
        f'[superlink]\ndefault = "site"\n[superlink.site]\naddress = "{link}"\ninsecure = true\n'
    )
    (folder / "home" / "config.toml").write_text(connection)
    with ExitStack() as running:
        where = ("--host", "127.0.0.1", "--port", link.rpartition(":")[2])
        server = running.enter_context(made.kept_running("flower-superlink", "--insecure", *where))
        until_healthy(server, f"http://{link}/health")
        for client, uri in data.items():
            words_ = f'client="{client}" data="{uri}" site="{folder / "sites"}"'
            options = ("--superlink", link, "--port", str(free_port()), "--node-config", words_)
            running.enter_context(made.kept_running("flower-supernode", "--insecure", *options))
        yield made


@pytest.fixture
def flown(site: Site, tmp_path: Path, tiny_encoder: Path) -> Callable[[str], dict[str, Tensor]]:
    """Run the app with another server, and return the arrays it ends with."""

    def run(server: str) -> dict[str, Tensor]:
        app, result = tmp_path / "app", tmp_path / "result.safetensors"
        (app / "tickets").mkdir(parents=True)
        (app / "pyproject.toml").write_text(TOML)
        for name, text in (("__init__", ""), ("client", CLIENT), ("server", server)):
            (app / "tickets" / f"{name}.py").write_text(text)
        config = f'model="{tiny_encoder}" result="{result}"'
        said = site.flwr("run", str(app), "site", "--run-config", config, "--stream")
        assert result.exists(), said
        return load_file(result)

    return run


@pytest.fixture
def woven(site: Site, tmp_path: Path, tiny_encoder: Path) -> Callable[..., dict[str, Tensor]]:
    """Run weft itself on the same data, and return its result."""

    def run(strategy: Any, rounds: int) -> dict[str, Tensor]:
        workspace = service.open_workspace(tmp_path / "home")
        for client, uri in site.data.items():
            workspace.ledger.add_client(ClientRecord(client, uri, client, num_examples=12))
        config = {
            "name": "tickets",
            "model": {"id": str(tiny_encoder), "max_length": 16},
            "labels": LABELS,
            "adapter": {"name": "lora", "r": 2, "layers": [0]},
            "optimizer": {"name": "adamw", "lr": 0.05},
            "strategy": strategy,
            "clients": {"select": {}},
            "batch_size": 4,
            "steps": 2,
            "rounds": rounds,
            "seed": 5,
            "backend": "inline",
        }
        version = service.launch(workspace, parse_config(config))
        return dict(workspace.store.tensors(version))

    return run


def test_the_documented_app_ends_with_the_version_that_weft_makes(
    flown: Callable[[str], dict[str, Tensor]], woven: Callable[..., dict[str, Tensor]]
) -> None:
    theirs, ours = flown(SERVER), woven({"name": "fedsvd", "every": 1}, 2)
    assert theirs.keys() == ours.keys()
    assert all(equal(theirs[n], ours[n]) for n in ours)


def test_the_documented_client_trains_under_flowers_own_fedavg(
    flown: Callable[[str], dict[str, Tensor]], woven: Callable[..., dict[str, Tensor]]
) -> None:
    server = SERVER.replace(OURS, FEDAVG).replace("num_rounds=2", "num_rounds=1")
    theirs, ours = flown(server), woven("fedavg", 1)
    assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
