"""Fixtures of the shell's tests: a workspace, plans without a model, and small data sets."""

import json
import re
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
import torch
import yaml
from sqlalchemy import select

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import DataSpec, ModelSpec, PluginChoice
from clients.evaluate import Evaluation
from clients.node.identity import new_key
from clients.node.joining import Statement, write_join
from clients.reading import wanted
from orchestrator import cli
from orchestrator.backends.base import Failure
from orchestrator.bases import remember_base
from orchestrator.config import parse_config
from orchestrator.federation import Federation
from orchestrator.plan import Participant, Plan, Start
from orchestrator.recipes import import_recipe
from orchestrator.service import open_workspace
from storage.ledger import ClientRecord
from storage.schema import kept_updates
from strategies.base import Update
from strategies.tensors import lora_layers

LABELS = ("cat", "dog", "model", "rank")
LABELS_OF = {"classification": ("cat", "dog", "model"), "token-classification": ("O", "B-T", "I-T")}
SMALL = {
    "name": "task-1",
    "labels": ["cat", "dog", "model", "rank"],
    "strategy": "fedsvd",
    "adapter": {"name": "lora", "r": 2, "layers": [0]},
    "rounds": 2,
    "steps": 2,
    "batch_size": 4,
    "backend": "inline",
}
WORDS = ("the", "a", "learns", "weaves", "thread", "adapter", "private", "data", "round")


@pytest.fixture
def workspace(tmp_path):
    """Return an empty workspace under the test's folder."""
    return open_workspace(tmp_path / "home")


@pytest.fixture
def products():
    """Return a function: every layer's product of all its adapters together, dense."""

    def summed(*adapters):
        found = {}
        for adapter in adapters:
            for name, f in lora_layers(adapter).items() if adapter else ():
                dense = f.scaling.double() * f.b.double() @ f.a.double()
                found[name] = found.get(name, 0) + dense
        return found

    return summed


@pytest.fixture
def kept():
    """Return a function that lists the updates a store keeps: (round, client), with each digest.

    ``buried`` lists the tombstones instead.
    """

    def read(workspace, buried=False):
        query = select(kept_updates).where(kept_updates.c.blob.is_(None) == buried)
        with workspace.engine.connect() as connection:
            rows = connection.execute(query.order_by(kept_updates.c.round, kept_updates.c.client))
            found = {(row.round, row.client): row.digest for row in rows}
        assert all(workspace.blobs.has(digest) != buried for digest in found.values())
        return found

    return read


@pytest.fixture
def document():
    """Return a function that makes a whole config's YAML document, with changes on top."""

    def make(**changes):
        base = {
            "name": "task-1",
            "model": "some-model",
            "labels": list(LABELS),
            "strategy": "fedavg",
            "rounds": 2,
            "batch_size": 4,
            "clients": {"select": {}},
            "backend": "inline",
        }
        return {k: v for k, v in (base | changes).items() if v is not None}

    return make


@pytest.fixture
def make_plan(document):
    """Return a function that makes a plan of imagined clients: nothing is loaded or read."""

    def make(clients=("a", "b", "c"), noise=None, start=None, **changes):
        config = parse_config(document(**changes))
        chosen = config.checked_plugins()
        people = tuple(
            Participant(c, DataSpec(f"jsonl:/{c}.jsonl"), f"people-{c}", 100, privacy=noise)
            for c in clients
        )
        model = config.model_spec("0" * 64)
        return Plan("run-1", config, model, participants=people, start=start or Start(), **chosen)

    return make


@pytest.fixture
def tensors():
    """Return a function that makes a small adapter with a head, drawn from ``seed``."""

    def make(seed=0, rank=2, layers=("q",), labels=4, scaling=1.0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        made = {}
        for layer in layers:
            made[f"{layer}.lora_A.weight"] = draw(rank, 5)
            made[f"{layer}.lora_B.weight"] = draw(6, rank)
            made[f"{layer}.scaling"] = torch.tensor(scaling)
        if labels:
            made |= {"head.weight": draw(labels, 5), "head.bias": draw(labels)}
        return made

    return make


@pytest.fixture
def notes(tmp_path):
    """Return a function that writes a labelled jsonl file and returns its URI."""

    def write(name="notes", size=12, labels=LABELS, shift=0):
        rows = []
        for i in range(size):
            label = labels[i % len(labels)]
            rest = [WORDS[(i + shift + j) % len(WORDS)] for j in range(3)]
            rows.append({"text": " ".join([label, *rest]), "label": label, "ward": f"w{i % 2}"})
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return f"jsonl:{path}"

    return write


@pytest.fixture
def home(workspace, notes):
    """Return a workspace with two registered clients."""
    for shift, name in enumerate(("a", "b")):
        data = notes(name, shift=shift)
        workspace.ledger.add_client(ClientRecord(name, data, name, num_examples=12))
    return workspace


@pytest.fixture
def tiny(tiny_encoder, document):
    """Return a function that makes a config on the tiny encoder: rank 2, one short round."""

    def make(**changes):
        base = {
            "model": {"id": str(tiny_encoder), "max_length": 16},
            "adapter": {"name": "lora", "r": 2, "layers": [0]},
            "optimizer": {"name": "adamw", "lr": 0.05},
            "steps": 2,
            "rounds": 1,
        }
        return parse_config(document(**(base | changes)))

    return make


SPEND = {
    "mechanism": "gaussian",
    "unit": "example",
    "adjacency": "add-remove",
    "parameters": {"noise_multiplier": 2.0, "sample_rate": 0.01, "steps": 5.0},
}


@pytest.fixture
def grow(workspace, tensors):
    """Return a function that commits a version with a whole recipe, and names it."""

    def commit(name, parents=(), *, clients=(), private=True, metrics=None, **changes):
        recipe = {
            "format": 1,
            "kind": "round" if clients else "start",
            "round": 1,
            "model": {"id": "some-model", "revision": "main", "hash": "ab" * 32, "labels": ["x"]},
            "adapter": {"name": "lora", "options": {"r": 2}},
            "strategy": {"name": "fedsvd", "options": {}},
            "privacy": {"delta": 1e-5, "max_grad_norm": 0.5, "insecure_seed": None}
            if private
            else None,
            "start": "fresh",
            "stack": [],
            "seen_labels": ["x"],
            "reproducible": "bitwise",
            "private": private,
            "updates": [
                {
                    "client": client,
                    "population": f"people-{client}",
                    "public": False,
                    "base": "",
                    "digest": f"{name}{client}".encode().hex().ljust(64, "0"),
                    "weight": 1.0,
                    "num_examples": 100,
                    "fingerprint": f"data of {client}".encode().hex().ljust(64, "0"),
                    "spends": [SPEND] if private else [],
                }
                for client in clients
            ],
        }
        made = tensors(seed=len(workspace.store.versions(limit=1000)), labels=0)
        kinds = dict(parents)
        version = workspace.store.commit(
            made,
            parents={workspace.store.resolve(ref): kind for ref, kind in kinds.items()},
            recipe=recipe | changes,
            metrics=metrics,
        )
        workspace.store.name(name, version)
        return version

    return commit


# --- the command line -------------------------------------------------------------------------


@pytest.fixture
def weft(tmp_path, monkeypatch, capsys):
    """Run the command line in an empty home; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WEFT_DATABASE", raising=False)

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["weft", *map(str, argv)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def ok(weft):
    """Run a command that must succeed; return what it printed."""

    def run(*argv):
        code, out, err = weft(*argv)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def read(ok):
    """Run a read command with --json and return the document."""
    return lambda *argv: json.loads(ok(*argv, "--json"))


@pytest.fixture
def refused(weft):
    """Run a command that must be refused in one line; return the line."""

    def run(*argv):
        code, out, err = weft(*argv)
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
        assert "Traceback" not in err
        return err.removeprefix("error: ").strip()

    return run


@pytest.fixture
def run_yaml(tmp_path, tiny_encoder, notes):
    """Return a function that writes a run's file over one client's data, with changes."""

    def write(**changes):
        model = {"id": str(tiny_encoder), "max_length": 16}
        simulate = {"data": notes("train"), "by": "column", "column": "ward"}
        document = SMALL | {"model": model, "clients": {"simulate": simulate}} | changes
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
        return path

    return write


class Imagined:
    """A backend at which training is a few additions, and time is counted in ticks.

    Every client has a worker of its own and answers after so many of them.

    Args:
        first: the adapter's first tensors.
        delays: by (client, round), ticks until the answer; 0 by default.
        fails: by client ("" for what is no client's), how often it fails before it answers.
        scores: by round, what the evaluation finds.
    """

    def __init__(self, first, delays=None, fails=None, scores=None):
        self.first, self.delays = first, delays or {}
        self.fails, self.scores = Counter(fails or {}), scores or {}
        self.now, self.asked, self.given_up = 0, [], []

    def run(self, assignments, started, stepped=None):
        running, order = [], 0
        try:
            while True:
                while (asked := next(assignments)) is not None:
                    started(asked)
                    self.asked.append((asked.client, asked.round))
                    due = self.now + self.delays.get((asked.client, asked.round), 0)
                    running.append((due, order := order + 1, asked))
                running.sort(key=lambda one: one[:2])
                if running and running[0][0] <= self.now:
                    yield self.answer(running.pop(0)[2])
                else:
                    self.now += 1
                    yield None
        finally:
            self.given_up += [asked.client for _, _, asked in running]

    def answer(self, asked):
        if self.fails[asked.client] > 0:
            self.fails[asked.client] -= 1
            return Failure(asked.client, asked.round, "out of memory")
        if asked.action == "init":
            return Update("", 0, "", self.first, 0)
        if asked.action == "evaluate":
            return Evaluation(asked.client, asked.round, 1, self.scores.get(asked.round, {}))
        generator = torch.Generator().manual_seed(asked.seed)
        if asked.action in ("prepare", "consolidate"):
            return self.answer_reading(asked, generator)
        sent = asked.broadcast
        trained = {
            name: tensor + torch.randn(tensor.shape, generator=generator)
            for name, tensor in sorted(sent.tensors.items())
            if re.fullmatch(sent.trainable, name) and not name.endswith(".scaling")
        }
        size = 1 + ord(asked.client[-1]) % 7
        return Update(asked.client, asked.round, asked.base, trained, size, fingerprint="ab")

    def answer_reading(self, asked, generator):
        shapes = sorted(wanted(asked, asked.action).items())
        parts = {name: torch.rand(shape, generator=generator) for name, shape in shapes}
        size = 1 + ord(asked.client[-1]) % 7
        return Update(asked.client, asked.round, asked.base, {}, size, memory=parts)

    def close(self):
        pass


@pytest.fixture
def publish(workspace, tiny_decoder, tiny_encoder):
    """Return a function that commits a version with random tensors and names it."""

    def make(name, seed=0, kind="causal-lm", base=None, seen=None, **options):
        folder = base or (tiny_decoder if kind == "causal-lm" else tiny_encoder)
        targets = ["q_proj", "v_proj"] if kind == "causal-lm" else ["query", "value"]
        labels = LABELS_OF.get(kind, ())
        spec = ModelSpec(str(folder), kind, labels=labels, max_length=16)
        spec = ModelSpec(
            str(folder), kind, labels=labels, max_length=16, hash=models.base_hash(spec)
        )
        remember_base(workspace, spec)
        choice = PluginChoice("lora", {"r": 2, "target_modules": targets, **options})
        tensors = models.shapes(spec, ADAPTERS.get("lora").build(**choice.options))
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            key: torch.randn(shape, generator=generator) if shape else torch.tensor(1.0)
            for key, shape in tensors.items()
        }
        recipe = import_recipe(spec, choice, seen or labels, {"seed": seed}, None)
        version = workspace.store.commit(drawn, parents={}, recipe=recipe)
        workspace.store.name(name, version)
        return version

    return make


@pytest.fixture
def run_in():
    """Return a function that makes a workspace's run, or one to go on with it as it was planned."""

    def make(workspace, planned, backend, observe):
        if workspace.ledger.runs():
            plan = Plan.from_json(workspace.ledger.plan("run-1"))
        else:
            plan = planned(workspace)
            config = plan.config.model_dump(mode="json")
            workspace.ledger.create_run("run-1", "task-1", config, plan.to_json())
        return Federation(plan, workspace.store, workspace.ledger, backend, workspace.home, observe)

    return make


@pytest.fixture
def imagined(tensors):
    """Return a function that makes a backend of imagined clients."""
    return lambda *args, **options: Imagined(tensors(), *args, **options)


class Site:
    """A site: a key, and a join file whenever it is asked for one, each newer than the last."""

    def __init__(self, folder, name):
        self.name, self._folder, self._made = name, folder, 0
        folder.mkdir()
        self.key = new_key(folder / "key-0")
        self.old = None

    def rotate(self):
        self.old, self.key = self.key, new_key(self._folder / f"key-{self._made}-next")

    def join(self, data=None, days=365, **changes):
        """Return a join file: of ``notes`` with a budget, unless ``data`` says otherwise."""
        self._made += 1
        moment = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
        made = moment + timedelta(seconds=self._made)
        notes = {"examples": 100, "population": self.name, "epsilon": 8.0, "delta": 1e-3}
        said = {
            "format": "weft-join-1",
            "name": self.name,
            "public_key": self.key.public.text,
            "previous": self.old and self.old.public.text,
            "data": data or {"notes": notes},
            "labels": {"region": "north"},
            "weft": "0.1.0",
            "flwr": "1.41.0",
            "made": made,
            "expires": made + timedelta(days=days),
        }
        statement = Statement.model_validate(said | changes)
        return write_join(statement, self.key, self.old).encode()


@pytest.fixture
def site(tmp_path):
    """Return a function that makes a site, with a key of its own."""
    return lambda name="north", place=None: Site(tmp_path / f"site-{place or name}", name)
