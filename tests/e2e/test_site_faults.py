"""What goes wrong between a coordinator and its sites, each thing done to real processes mid-round.

A run ends at the version that nothing went wrong at, or by quorum without whom it lost, or with a
sentence. The sites' own ledgers say who trained, and how often.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clients.flower_site import Answering, serve
from clients.node import resident, running
from clients.node.settings import load_settings
from clients.orders import Order, Reply, pack_reply, unpack_reply
from orchestrator import service
from orchestrator.collecting import RoundFailed
from orchestrator.config import parse_config
from orchestrator.retention import folder_of
from strategies.base import Update

CORE = ("north", "south", "west")
VERSION = version("weft")
LIMIT_S = 300.0  # for what takes seconds on an idle machine
CUT_S = 30.0

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]


@dataclass
class Site:
    """The node of one site, in a process and network of its own.

    Attributes:
        federation: whose.
        name: of the node.
    """

    federation: Any
    name: str
    _stack: ExitStack = field(default_factory=ExitStack)
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._stack.enter_context(self.federation.node(self.name))

    def lose_power(self) -> None:
        """Kill the node and its SuperNode at once: nobody says goodbye."""
        assert self._process is not None
        family = Path(f"/proc/{self._process.pid}/task").glob("*/children")
        children = [int(pid) for file in family for pid in file.read_text().split()]
        for pid in (self._process.pid, *children):
            os.kill(pid, signal.SIGSTOP)
        for pid in (*children, self._process.pid):
            os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def answers(self, run: str, round_: int) -> list[str | None]:
        """Return the outcomes of what a run asked in a round; None for what goes on."""
        database = self.federation.folder / self.name / "state" / "ledger.db"
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as ledger:
            query = "SELECT outcome FROM answers WHERE run = ? AND round = ? AND action = 'train'"
            return [outcome for (outcome,) in ledger.execute(query, (run, round_))]

    def wait_for(self, run: str, round_: int, outcome: str | None = None) -> None:
        """Wait until it has begun with what a round asks; with an outcome, until it has that."""

        def there() -> bool:
            found = self.answers(run, round_)
            return outcome in found if outcome else bool(found)

        self.federation.servers.until(there, LIMIT_S)

    def spent(self, run: str) -> int:
        """Return how many charges of a run are on its ledger."""
        database = self.federation.folder / self.name / "state" / "ledger.db"
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as ledger:
            [(count,)] = ledger.execute("SELECT count(*) FROM spends WHERE run = ?", (run,))
            return int(count)

    def close(self) -> None:
        self._stack.close()


@dataclass
class Guest:
    """A node within this process, whose answers a test chooses; its SuperNode is a real one.

    Attributes:
        federation: whose.
        name: of the node.
        answer: does what an order says.
        problem: why it was not let in.
    """

    federation: Any
    name: str
    answer: Callable[[Order], bytes] = field(init=False)
    problem: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.settings = load_settings(self.federation.folder / self.name / "node.yaml")
        self.settings.state.mkdir(mode=0o700, exist_ok=True)
        self.answer = resident.Resident(self.settings, self._stop).answer

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        def listen(address: str, secret: bytes, answer: Any, stop: threading.Event) -> None:
            serve(Answering(address, secret), answer, stop)

        try:
            running.start(self.settings, listen, self._stop, lambda order: self.answer(order))
        except running.NotLetIn as error:
            self.problem = str(error)

    def wait(self) -> None:
        """Wait until it has ended by itself."""
        assert self._thread is not None
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


@dataclass(frozen=True)
class Done:
    """How a run ended.

    Attributes:
        id: of the run.
        status: of it.
        version: its last; None for none.
        events: its log.
    """

    id: str
    status: str
    version: str | None
    events: list[tuple[str, Mapping[str, Any]]]

    def all(self, kind: str) -> list[Mapping[str, Any]]:
        return [data for one, data in self.events if one == kind]

    def accepted(self) -> Counter[str]:
        """Return how many updates of each client were accepted."""
        return Counter(data["client"] for data in self.all("accepted"))

    def reason(self, client: str) -> str:
        """Return why the one update of a client was refused."""
        [said] = [data["reason"] for data in self.all("refused") if data["client"] == client]
        return str(said)


class Scene:
    """Three sites that are there, and runs over them in which something goes wrong."""

    def __init__(self, federation: Any) -> None:
        self.federation = federation
        self.sites = {name: Site(federation, name) for name in CORE}
        self._count = 0

    def document(self, **changes: Any) -> dict[str, Any]:
        """Return a run of two rounds that waits for all three sites."""
        self._count += 1
        backend = {
            "name": "superlink",
            "superlink": f"localhost:{self.federation.port}",
            "certificates": str(self.federation.servers.authority.certificate),
            "secret_file": str(self.federation.folder / "superexec.secret"),
            "away_s": LIMIT_S,  # a node takes minutes to begin where everybody wants the CPU
        }
        given: dict[str, Any] = {"clients": {"names": list(CORE)}, "rounds": 2, "backend": backend}
        given["name"] = f"scene-{self._count}"
        file: Path = self.federation.config(**(given | changes))
        document: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
        return document

    def start(self, *names: str) -> None:
        for name in names or CORE:
            self.sites[name].start()

    def run(
        self,
        document: dict[str, Any],
        seen: Callable[[str, str, Mapping[str, Any]], None] = lambda run, kind, data: None,
        resume: str | None = None,
    ) -> Done:
        """Drive a run to its end; ``seen`` is shown its id, and each event as it happens."""
        workspace = service.open_workspace(self.federation.home)
        known = {record.id for record in workspace.ledger.runs()} - {resume}

        def observe(kind: str, data: Mapping[str, Any]) -> None:
            [run] = {record.id for record in workspace.ledger.runs()} - known
            seen(run, kind, data)

        try:
            if resume:
                service.resume(workspace, resume, observe)
            else:
                service.launch(workspace, parse_config(document), observe)
        except RoundFailed:
            pass
        [run] = {record.id for record in workspace.ledger.runs()} - known
        record = workspace.ledger.run(run)
        events = [(event.kind, event.data) for event in workspace.ledger.events(run)]
        done = Done(run, record.status, record.version, events)
        workspace.close()
        return done

    def close(self) -> None:
        for site in self.sites.values():
            site.close()


@pytest.fixture(scope="module")
def scene(federation: Any) -> Iterator[Scene]:
    made = Scene(federation)
    yield made
    made.close()


@pytest.fixture(scope="module")
def wanted(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The version that the run ends at where nothing goes wrong, trained here."""
    workspace = service.open_workspace(tmp_path_factory.mktemp("inline"))
    federation = scene.federation
    for name in CORE:
        federation.weft(
            *("clients", "add", name, "--data", f"jsonl:{federation.data(name)}"),
            *("--examples", "24", "--public", "--label", f"region={name}"),
            home=workspace.home,
        )
    document = scene.document(backend="inline")
    version = service.launch(workspace, parse_config(document))
    workspace.close()
    return version


def test_rounds_over_sites_where_nothing_goes_wrong(scene: Scene, wanted: str) -> None:
    scene.start()
    times: list[float] = []

    def seen(run: str, kind: str, data: Mapping[str, Any]) -> None:
        if kind in ("round", "committed"):
            times.append(time.monotonic())

    done = scene.run(scene.document(), seen)
    assert (done.status, done.version) == ("completed", wanted)
    print("rounds:", [f"{b - a:.1f} s" for a, b in zip(times[::2], times[1::2], strict=False)])


def test_a_site_that_loses_power_and_comes_back_answers_what_it_was_asked(
    scene: Scene, wanted: str
) -> None:
    scene.start()
    lost = []

    def seen(run: str, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "training" and data["client"] == "north" and not lost:
            scene.sites["north"].wait_for(run, 1)
            scene.sites["north"].lose_power()
            lost.append(run)
            scene.start("north")

    done = scene.run(scene.document(), seen)
    assert lost == [done.id]
    assert (done.status, done.version) == ("completed", wanted)
    assert done.accepted() == dict.fromkeys(CORE, 2)
    assert scene.sites["north"].spent(done.id) == 2  # asked twice, charged once


def test_a_coordinator_that_is_killed_goes_on_with_what_it_had_asked(
    scene: Scene, wanted: str, killed: Callable[..., None]
) -> None:
    scene.start()
    document = scene.document()
    home = scene.federation.home
    workspace = service.open_workspace(home)
    known = {record.id for record in workspace.ledger.runs()}
    killed(home, document, "accepted", 4)  # the first of the second round
    [run] = {record.id for record in workspace.ledger.runs()} - known
    workspace.close()
    left = json.loads((folder_of(home, run) / "sites.json").read_text())
    waiting = [key.split()[1] for key in left["sent"]]
    assert waiting
    begun = flower_runs(scene.federation)
    done = scene.run(document, resume=run)
    assert (done.status, done.version) == ("completed", wanted)
    assert flower_runs(scene.federation) == begun  # it went on with the one that it had
    for name in waiting:
        # an answer that was on its way into the dead coordinator is asked for once more, and is
        # then the bytes that were kept: nothing is charged for it below
        assert scene.sites[name].answers(run, 2) in (["update"], ["update"] * 2)
    assert all(site.spent(run) == 2 for site in scene.sites.values())


def flower_runs(federation: Any) -> int:
    with closing(sqlite3.connect(federation.folder / "state.db")) as database:
        [(count,)] = database.execute("SELECT count(*) FROM run")
        return int(count)


def test_a_superlink_that_is_killed_and_started_again_loses_no_update(
    scene: Scene, wanted: str
) -> None:
    scene.start()
    lost = []

    def seen(run: str, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "training" and data["client"] == "west" and not lost:
            lost.append(run)
            scene.federation.lose_superlink()

    begun = flower_runs(scene.federation)
    done = scene.run(scene.document(), seen)
    assert lost == [done.id]
    assert (done.status, done.version) == ("completed", wanted)
    assert flower_runs(scene.federation) == begun + 1  # it came back in time for the same one
    assert all(site.spent(done.id) == 2 for site in scene.sites.values())


def test_sites_that_are_cut_off_before_an_order_or_an_answer_are_waited_for(
    scene: Scene, wanted: str
) -> None:
    scene.start()
    networks, sites = scene.federation.networks, scene.sites
    accepted: list[str] = []
    then: list[Any] = []

    def restore(run: str) -> None:
        try:
            sites["south"].wait_for(run, 1, "update")
            then.extend((list(accepted), sites["west"].answers(run, 1)))
        finally:
            networks.restore("west")
            networks.restore("south")

    def seen(run: str, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "accepted":
            accepted.append(data["client"])
        if kind == "assigned" and not then:
            networks.cut("west")  # its order waits for it
        if kind == "training" and data["client"] == "south" and not then:
            sites["south"].wait_for(run, 1)
            networks.cut("south")  # its answer waits in it
            threading.Timer(CUT_S, restore, (run,)).start()

    done = scene.run(scene.document(), seen)
    while_cut_off, west = then
    assert set(while_cut_off) <= {"north"}
    assert west == []
    assert (done.status, done.version) == ("completed", wanted)
    assert all(site.spent(done.id) == 2 for site in sites.values())


def test_a_site_that_does_not_come_back_is_done_without(scene: Scene) -> None:
    scene.start()
    lost = []

    def seen(run: str, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "training" and data["client"] == "south":
            scene.sites["south"].wait_for(run, 1)
            scene.sites["south"].lose_power()
            lost.append(run)

    changes = {"rounds": 1, "quorum": 2, "deadline_s": 20, "retries": 0, "steps": 40}
    done = scene.run(scene.document(**changes), seen)
    assert lost
    assert done.status == "completed"
    assert done.accepted() == {"north": 1, "west": 1}


@pytest.fixture(scope="module")
def east(scene: Scene) -> Iterator[Guest]:
    """A fourth site that takes part, whose answers a test chooses."""
    made = founded(scene, "east")
    made.start()
    yield made
    made.close()


@pytest.fixture
def shut(scene: Scene) -> Iterator[Guest]:
    """A site of one test, which is let in no more after it."""
    made = founded(scene, "shut")
    made.start()
    yield made
    made.close()


def founded(scene: Scene, name: str) -> Guest:
    scene.federation.found(name)
    scene.federation.weft("clients", "add", "--join", scene.federation.folder / name / "join.json")
    scene.federation.step()
    return Guest(scene.federation, name)


def another_flower(east: Guest, patch: pytest.MonkeyPatch) -> Callable[[Order], bytes]:
    """Have the site find another minor version of Flower installed."""
    patch.setattr(resident, "version", lambda package: {"flwr": "1.42.0"}.get(package, VERSION))
    return resident.Resident(east.settings).answer


def another_policy(east: Guest, patch: pytest.MonkeyPatch) -> Callable[[Order], bytes]:
    """Have its owner allow another strategy alone."""
    policy = east.settings.policy.model_copy(update={"strategies": ["fedavg"]})
    return resident.Resident(east.settings.model_copy(update={"policy": policy})).answer


def not_finite(east: Guest, patch: pytest.MonkeyPatch) -> Callable[[Order], bytes]:
    """Have it train, and spoil one value of what it sends."""
    honest = resident.Resident(east.settings).answer

    def answer(order: Order) -> bytes:
        reply = unpack_reply(honest(order))
        assert isinstance(reply.result, Update)
        [name, *_] = reply.result.tensors
        spoilt = reply.result.tensors[name].clone()
        spoilt.view(-1)[0] = torch.nan
        tensors = {**reply.result.tensors, name: spoilt}
        return pack_reply(Reply(replace(reply.result, tensors=tensors), reply.node))

    return answer


@pytest.mark.parametrize(
    ("spoil", "quorum", "why"),
    [
        (another_flower, 2, "the coordinator has flwr 1.41 and this site 1.42.0, which must be"),
        (another_policy, 2, "east does not do this: node.yaml does not allow the strategy"),
        (not_finite, 2, "non-finite values"),
        (another_policy, 3, "east does not do this: node.yaml does not allow the strategy"),
    ],
)
def test_whom_a_site_refuses_or_sends_what_is_no_update_goes_on_by_quorum_or_stops(
    scene: Scene,
    east: Guest,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Guest, pytest.MonkeyPatch], Callable[[Order], bytes]],
    quorum: int,
    why: str,
) -> None:
    scene.start("north", "west")
    east.answer = spoil(east, monkeypatch)
    names = {"names": ["north", "west", "east"]}
    done = scene.run(scene.document(clients=names, rounds=1, quorum=quorum, retries=0))
    assert why in done.reason("east")
    assert done.accepted() == {"north": 1, "west": 1}
    assert done.status == ("completed" if quorum == 2 else "failed")
    if quorum == 3:
        [failed] = done.all("failed")
        assert "2 of the 3 updates that it needs" in failed["reason"]
        assert why in failed["reason"]


def test_a_key_that_is_not_registered_is_not_let_in(scene: Scene) -> None:
    scene.federation.found("stranger")
    stranger = Guest(scene.federation, "stranger")
    stranger.start()
    stranger.wait()
    assert "does not let stranger in: its key is not registered" in stranger.problem


def test_a_key_that_has_expired_is_not_let_in_and_no_round_asks_its_clients(scene: Scene) -> None:
    scene.start("north", "west")
    late = founded(scene, "late")
    with closing(sqlite3.connect(scene.federation.home / "weft.db")) as database, database:
        database.execute("UPDATE nodes SET expires_at = created_at WHERE name = 'late'")
    scene.federation.step()
    late.start()
    late.wait()
    assert "does not let late in: its key is not registered there (yet), has" in late.problem
    names = {"names": ["north", "west", "late"]}
    done = scene.run(scene.document(clients=names, rounds=1, quorum=2))
    assert done.status == "completed"
    assert done.accepted() == {"north": 1, "west": 1}
    [barred] = done.all("barred")
    assert "the key of node late expired on" in barred["clients"]["late"]


def test_a_node_that_is_disabled_while_it_works_is_done_without_at_once(
    scene: Scene, shut: Guest
) -> None:
    scene.start("north", "west")
    honest, disabled = resident.Resident(shut.settings).answer, threading.Event()

    def answer(order: Order) -> bytes:
        assert disabled.wait(LIMIT_S)
        return honest(order)

    def seen(run: str, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "training" and data["client"] == "shut":
            scene.federation.weft("clients", "disable", "shut", "--why", "a test of it")
            scene.federation.step()
            disabled.set()

    shut.answer = answer
    names = {"names": ["north", "west", "shut"]}
    done = scene.run(scene.document(clients=names, quorum=2, retries=0), seen)
    assert disabled.is_set()
    assert done.status == "completed"
    assert done.accepted() == {"north": 2, "west": 2}
    assert "node shut takes no part: it is disabled" in done.reason("shut")
    [barred] = done.all("barred")
    assert (barred["round"], list(barred["clients"])) == (2, ["shut"])
    shut.wait()
    assert "does not let shut in" in shut.problem
