"""Whole runs of clients whose data lie at sites: as of those whose data are here, to the bit."""

from dataclasses import replace

import pytest

from clients.assignment import DataSpec
from clients.orders import Packer, Reply, Terms, pack_order, pack_reply, unpack_order, unpack_reply
from clients.worker import perform
from orchestrator import launch as planning
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from orchestrator.retraining import NotRetrained
from storage.ledger import ClientRecord

DP = {"noise_multiplier": 0.5, "delta": 1e-2, "max_grad_norm": 0.1, "insecure_seed": 3}
CLIENTS = ("a", "b")


@pytest.fixture
def there(notes, tmp_path):
    """Where each site's data are, and how it calls their columns."""
    found = {}
    for shift, name in enumerate(CLIENTS):
        path = tmp_path / f"{name}.jsonl"
        notes(name, shift=shift)
        path.write_text(path.read_text().replace('"text"', '"note"'))
        found[name] = DataSpec(f"jsonl:{path}", {"text": "note"})
    return found


class Sites:
    """What happens to an assignment between the coordinator and a site: everything but the wire."""

    def __init__(self, there, folder, model):
        self.there, self.folder, self.model = there, folder, model
        self.packer, self.orders, self.told = Packer(), [], Terms("s", "run", "1", "1.41", 1.0)

    def perform(self, assignment, stepped):
        if not assignment.data.uri.startswith("site:"):
            return perform(assignment, stepped)
        order = pack_order(assignment, self.told, self.packer)
        self.orders.append(order)
        asked, _ = unpack_order(order)
        own = self.there[asked.client]
        resolved = replace(
            asked,
            data=replace(asked.data, uri=own.uri, fields=own.fields),
            model=replace(asked.model, id=self.model),
            site=str(self.folder / asked.client),
        )
        return unpack_reply(pack_reply(Reply(perform(resolved, stepped)))).result


@pytest.fixture
def run(tmp_path, tiny, tiny_encoder, there, monkeypatch):
    """Return a function that runs two rounds, of data here or at sites, in a home of its own."""
    # the one backend that reaches sites is not this one
    monkeypatch.setattr(planning, "_refuse_unreachable", lambda config, participants: None)

    def whole(name, at_sites, public=False, **changes):
        home = service.open_workspace(tmp_path / name)
        for client in CLIENTS:
            own = DataSpec("site:notes") if at_sites else there[client]
            home.ledger.add_client(
                ClientRecord(client, own.uri, client, own.fields, num_examples=12, public=public)
            )
        sites = Sites(there, tmp_path / f"{name}-sites", str(tiny_encoder))
        backend = InlineBackend(sites.perform)
        return home, service.launch(home, tiny(**changes), backend=backend), sites

    return whole


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": DP, "strategy": {"name": "fedsvd"}, "downlink": "held"},
        {"public": True, "regularizers": ["ewc"]},
    ],
    ids=["private", "public"],
)
def test_data_at_sites_give_the_version_that_data_here_give(run, changes):
    _, version, _ = run("here", False, rounds=2, **changes)
    _, same, sites = run("away", True, rounds=2, **changes)

    assert len(sites.orders) >= 4
    assert same == version


def test_what_travels_is_recorded_for_every_client_and_round(run):
    home, _, sites = run("away", True, rounds=2, privacy=DP)
    [record] = home.ledger.runs()
    events = list(home.ledger.events(record.id))
    sent = [e.data["bytes_by_client"] for e in events if e.kind == "assigned"]
    back = [(e.data["client"], e.data["round"]) for e in events if e.kind == "accepted"]

    parts = {sum(len(data) for data in order.parts.values()) for order in sites.orders}
    [travelled] = parts  # everybody trains the same, from the same
    assert [sorted(one) for one in sent] == [list(CLIENTS)] * 2
    assert all(0.5 < n / travelled <= 1 for one in sent for n in one.values())
    assert sorted(back) == [(c, n) for c in CLIENTS for n in (1, 2)]
    assert all(e.data["bytes"] > 0 for e in events if e.kind == "accepted")


def test_a_run_of_sites_is_aggregated_again_here_and_not_trained_again(run):
    home, version, _ = run("away", True, privacy=DP, retention="all")

    [again] = service.replay(home, version)

    assert again.outcome == "same"
    with pytest.raises(NotRetrained, match="site:notes lies at a site"):
        service.retrain(home, home.ledger.runs()[0].id)


def test_no_place_is_on_the_coordinator_s_record_or_on_the_way(run, tmp_path):
    home, _, sites = run("away", True, rounds=2, privacy=DP)
    [record] = home.ledger.runs()

    assert all(str(tmp_path).encode() not in order.header for order in sites.orders)
    assert b"jsonl" not in b"".join(order.header for order in sites.orders)
    stored = [str(event.data) for event in home.ledger.events(record.id)]
    assert not any("a.jsonl" in text for text in stored)
