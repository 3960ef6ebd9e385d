"""``weft eval --clients`` of clients whose data lie at sites: asked there, by the node."""

import json
from dataclasses import replace

import pytest
import yaml

from clients import data
from clients.assignment import DataSpec
from clients.flower_runtime import Endpoint, TaskLost
from clients.node.ledger import Ledger
from clients.node.resident import Resident
from clients.node.settings import load_settings
from orchestrator import asking_clients, nodes, service
from orchestrator.asking_clients import Noised, Question
from orchestrator.backends.superlink import Arrived, Node, Task, canonical_key
from orchestrator.versions import EvaluationFailed, use
from storage.ledger import ClientRecord

NOISED = Noised(epsilon=50.0, delta=1e-3)
OFFER = {"examples": 40, "population": "north", "epsilon": 100.0, "delta": 1e-3, "holdout": 0.25}


class Link:
    """A SuperLink in memory and a run of it, whose only node answers as a node's process does."""

    def __init__(self, key, node):
        self.endpoint, self.task = Endpoint("superlink:9092", plain=True), Task("token", 1, 1)
        self.key, self.node, self.lost, self.said, self.ended = (
            canonical_key(key),
            node,
            False,
            {},
            0,
        )

    def nodes(self):
        return [Node(0, self.key, "north", "online", 1.0, 1.0)]

    def claim(self):
        return self

    def attach(self, task):
        raise TaskLost("over")

    def push(self, node, order, deadline, group):
        message = f"m{len(self.said)}"
        self.said[message] = self.node.answer(order)
        return message

    def replies(self, ids):
        return [Arrived(one) for one in ids if one in self.said]

    def fetch(self, arrived, most_bytes, wanted):
        return self.said[arrived.to]

    def finish(self):
        self.ended += 1

    def close(self):
        pass


@pytest.fixture
def there(tmp_path, workspace, publish, site, tiny_encoder, monkeypatch):
    """Makes a node that holds out a quarter of its records, for a version; returns its link."""
    made = publish("task-1", kind="classification")
    base = use(workspace, workspace.store.version(made), DataSpec("", {}))
    rows = [{"text": f"note {n} of the ward", "label": base.labels[n % 2]} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(public=False, **policy):
        offered = OFFER | ({"public": True, "epsilon": None, "delta": None} if public else {})
        north = site("north")
        nodes.admit(workspace.ledger, north.join({"notes": offered}), nodes.Terms())
        own = {"uri": "jsonl:rows.jsonl", "holdout": 0.25, "public": public, "population": "north"}
        document = {
            **{"name": "north", "superlink": "superlink:9092", "key": "node.key"},
            "models": {base.model.hash: str(tiny_encoder)},
            "data": {"notes": own | ({} if public else {"epsilon": 100.0, "delta": 1e-3})},
            "policy": policy,
        }
        (tmp_path / "node.yaml").write_text(yaml.safe_dump(document))
        link = Link(north.key.public.text, Resident(load_settings(tmp_path / "node.yaml")))
        monkeypatch.setattr("orchestrator.sites.superlink_of", lambda home, chosen: link)
        return link

    return make


def test_a_site_tells_the_scores_of_what_it_holds_out(there, workspace, tmp_path):
    link = there(public=True)

    found = asking_clients.score(workspace, "task-1", Question("all"))

    model = use(workspace, workspace.store.version("task-1"), DataSpec("", {})).model
    spec = DataSpec(f"jsonl:{tmp_path / 'rows.jsonl'}", part="holdout", holdout=0.25)
    held = {e.text for e in data.examples(spec, model, None)}
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["text"] in held]
    (tmp_path / "held.jsonl").write_text("\n".join(kept))
    same = service.evaluate(workspace, "task-1", DataSpec(f"jsonl:{tmp_path / 'held.jsonl'}"))
    [row] = found.rows
    assert (row.client, row.num_examples) == ("north", same.num_examples)
    assert 0 < row.num_examples < 40
    assert found.metrics["loss"] == pytest.approx(same.metrics["loss"])
    assert link.ended == 1
    assert not any((workspace.home / "runs").rglob("sites.json"))


def test_noised_scores_of_a_site_cost_the_same_on_both_ledgers(there, workspace, tmp_path):
    there()

    found = asking_clients.score(workspace, "task-1", Question("all", NOISED))

    [here] = workspace.ledger.spends("north")
    [at_the_site] = Ledger(tmp_path / "state").charges("north")
    assert found.rows[0].reason == ""
    assert (here.event, dict(here.parameters)) == (
        at_the_site.event,
        dict(at_the_site.spend.parameters),
    )


def test_a_site_that_refuses_says_why(there, workspace):
    there(strategies=["fedsvd"])
    with pytest.raises(EvaluationFailed, match=r"north: .* does not allow the strategy"):
        asking_clients.score(workspace, "task-1", Question("all", NOISED))


def test_nothing_is_spent_on_a_site_that_is_not_let_in(there, workspace):
    there()
    nodes.disable(workspace.ledger, "north", "moved")
    workspace.ledger.add_client(replace(ClientRecord("far", "site:x", "far"), holdout="0.1"))

    with pytest.raises(EvaluationFailed, match=r"far: .* is at no node; .*north takes no part"):
        asking_clients.score(workspace, "task-1", Question("all", NOISED))

    assert workspace.ledger.spends("north") == workspace.ledger.spends("far") == []


def test_a_command_names_the_superlink_by_which_sites_are_reached(workspace, refused, monkeypatch):
    said = []
    monkeypatch.setattr(
        asking_clients, "score", lambda *asked, superlink: said.append(superlink) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        refused("eval", "v", "--clients", "all", "--superlink", "weft.example.org:9092")
    assert said == ["weft.example.org:9092"]
