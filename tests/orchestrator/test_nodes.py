"""Who lets which site's node in, with which key, and what nobody can do from afar."""

from datetime import timedelta

import pytest

from clients.node.joining import BadJoin
from orchestrator import nodes
from orchestrator.nodes import NodeRefused, Terms, admit
from orchestrator.registering import ClientWithdrew
from storage.ledger import BadBudget, ClientRecord, UnknownClient
from storage.nodes import KeyTaken, PopulationTaken, UnknownNode
from storage.records import now

OFFER = {"examples": 100, "population": "north", "epsilon": 8.0, "delta": 1e-3}


@pytest.fixture
def ledger(workspace):
    return workspace.ledger


def test_a_join_file_lets_a_node_in_and_registers_its_data(ledger, site):
    north = site()

    record = admit(ledger, north.join(), Terms(labels={"gpu": "a100"}, why="agreed"))

    assert (record.status, record.fingerprint) == ("enabled", north.key.public.fingerprint)
    assert (record.why, record.number) == ("agreed", 1)
    [client] = ledger.clients()
    assert (client.name, client.data, client.node) == ("north", "site:notes", "north")
    assert (client.num_examples, client.epsilon, client.delta) == (100, 8.0, 1e-3)
    assert client.labels == {"region": "north", "gpu": "a100"}
    assert ledger.nodes.of_clients(["north"])["north"].public_key == north.key.public.text
    assert nodes.barred(ledger, ["north"]) == {}


def test_a_node_with_several_data_sets_is_several_clients(ledger, site):
    letters = {"examples": 50, "population": "letters", "public": True}
    admit(ledger, site().join({"notes": OFFER, "letters": letters}), Terms())
    found = {c.name: (c.data, c.population, c.public, c.epsilon) for c in ledger.clients()}
    assert found == {
        "north.notes": ("site:notes", "north", False, 8.0),
        "north.letters": ("site:letters", "letters", True, None),
    }


def test_what_a_site_holds_out_and_whose_records_are_are_known(ledger, site):
    people = {**OFFER, "holdout": 0.1, "unit": "patient_id", "units": 40}
    admit(ledger, site().join({"notes": people}), Terms())
    admit(
        ledger,
        site("south").join({"notes": {**OFFER, "population": "s", "holdout": 0.25}}),
        Terms(),
    )
    assert [c.holdout for c in ledger.clients()] == ["0.1:patient_id", "0.25"]
    assert nodes.units_of(ledger, "north", "patient_id") == 40
    assert nodes.units_of(ledger, "north", "ward") is None
    assert nodes.units_of(ledger, "south", "patient_id") is None
    assert nodes.units_of(ledger, "nobody", "patient_id") is None


def test_a_pending_node_has_no_clients_until_it_is_approved(ledger, site):
    north = site()
    admit(ledger, north.join(), Terms(pending=True, labels={"gpu": "a100"}))
    assert ledger.clients() == []
    with pytest.raises(NodeRefused, match=r"was expected; ask the site which is right"):
        nodes.approve(ledger, "north", "SHA256:another")
    with pytest.raises(NodeRefused, match="weft clients approve north"):
        nodes.enable(ledger, "north")

    nodes.approve(ledger, "north", north.key.public.fingerprint)

    assert [c.labels["gpu"] for c in ledger.clients()] == ["a100"]
    with pytest.raises(NodeRefused, match="is enabled, and waits for nobody's approval"):
        nodes.approve(ledger, "north")
    assert [word.status for word in ledger.nodes.history("north")] == ["enabled", "pending"]


def test_a_key_is_compared_with_what_the_site_told(ledger, site):
    with pytest.raises(NodeRefused, match="let nobody in before"):
        admit(ledger, site().join(), Terms(fingerprint="SHA256:another"))
    assert ledger.nodes.all() == []


def test_somebody_else_cannot_take_a_node_s_name(ledger, site):
    admit(ledger, site().join(), Terms())
    with pytest.raises(NodeRefused, match=r"node 'north' has another key \(SHA256:"):
        admit(ledger, site(place="elsewhere").join(), Terms())


def test_a_new_join_file_changes_what_is_known_of_a_node(ledger, site):
    north = site()
    first = north.join()
    admit(ledger, first, Terms(labels={"gpu": "a100"}, days=10))
    more = {"notes": {**OFFER, "examples": 200}, "letters": {**OFFER, "examples": 30}}

    record = admit(ledger, north.join(more), Terms(labels={"tier": "b"}))

    assert {c.name: c.num_examples for c in ledger.clients()} == {
        "north.notes": 200,  # as the node calls it now
        "north.letters": 30,
    }
    assert ledger.client("north.notes").labels == {"region": "north", "gpu": "a100", "tier": "b"}
    assert record.expires_at > now() + timedelta(days=300)
    with pytest.raises(NodeRefused, match="weft node join"):
        admit(ledger, first, Terms())


def test_the_same_join_file_may_be_given_again_on_other_terms(ledger, site):
    file = site().join()
    admit(ledger, file, Terms())
    record = admit(ledger, file, Terms(days=3))
    assert now() + timedelta(days=2) < record.expires_at < now() + timedelta(days=4)


def test_nobody_lets_a_key_live_longer_than_its_site_says(ledger, site):
    record = admit(ledger, site().join(days=5), Terms(days=1000))
    assert record.expires_at < now() + timedelta(days=5)


def test_a_disabled_node_is_not_asked_until_it_is_enabled(ledger, site):
    admit(ledger, site().join(), Terms())

    nodes.disable(ledger, "north", "its disk is full")

    [why] = nodes.barred(ledger, ["north"]).values()
    assert "node north is disabled since" in why
    assert why.endswith(": its disk is full")
    assert len(ledger.clients()) == 1
    with pytest.raises(NodeRefused, match="is disabled, and cannot be disabled"):
        nodes.disable(ledger, "north")
    nodes.enable(ledger, "north")
    assert nodes.barred(ledger, ["north"]) == {}


def test_a_disabled_node_cannot_enable_itself_by_a_join_file(ledger, site):
    north = site()
    admit(ledger, north.join(), Terms())
    nodes.disable(ledger, "north")
    assert admit(ledger, north.join(), Terms()).status == "disabled"
    north.rotate()
    assert nodes.rotate(ledger, north.join()).status == "disabled"


def test_an_expired_key_is_let_in_no_more_until_the_site_says_so(ledger, site, monkeypatch):
    north = site()
    admit(ledger, north.join(days=1), Terms())
    later = now() + timedelta(days=1)
    monkeypatch.setattr(nodes, "now", lambda: later)

    [why] = nodes.barred(ledger, ["north"]).values()
    assert why.startswith("the key of node north expired on ")
    assert nodes.standing(ledger.nodes.get("north"), later) == "expired"
    nodes.disable(ledger, "north")
    with pytest.raises(NodeRefused, match="weft clients add --join first"):
        nodes.enable(ledger, "north")
    admit(ledger, north.join(), Terms())
    nodes.enable(ledger, "north")
    assert nodes.barred(ledger, ["north"]) == {}


def test_a_removed_node_is_gone_and_its_key_for_ever(ledger, site):
    north = site()
    admit(ledger, north.join(), Terms())
    nodes.remove(ledger, "north", "stolen")

    assert ledger.clients() == []
    assert nodes.barred(ledger, ["north"]) == {"north": "client north is registered no more"}
    for command in (nodes.approve, nodes.disable, nodes.enable):
        with pytest.raises(UnknownNode, match="no node is called 'north'"):
            command(ledger, "north")
    with pytest.raises(KeyTaken, match="trusted no more"):
        admit(ledger, north.join(), Terms())
    admit(ledger, site(place="anew").join(), Terms())
    assert [word.status for word in ledger.nodes.history("north")] == [
        "enabled",
        "removed",
        "enabled",
    ]


def test_one_client_of_a_node_is_removed_alone(ledger, site):
    letters = {**OFFER, "population": "letters"}
    admit(ledger, site().join({"notes": OFFER, "letters": letters}), Terms())
    assert nodes.remove(ledger, "north.letters") is None
    assert [c.name for c in ledger.clients()] == ["north.notes"]
    assert ledger.nodes.get("north").status == "enabled"
    with pytest.raises(UnknownClient):
        nodes.remove(ledger, "north.letters")


def test_a_node_is_disabled_by_a_client_s_name_too(ledger, site):
    letters = {**OFFER, "population": "letters"}
    admit(ledger, site().join({"notes": OFFER, "letters": letters}), Terms())
    ledger.add_client(ClientRecord("here", "jsonl:/x", "here"))
    assert nodes.disable(ledger, "north.letters").name == "north"
    assert set(nodes.barred(ledger, ["north.letters", "north.notes", "here"])) == {
        "north.letters",
        "north.notes",
    }
    with pytest.raises(NodeRefused, match="client 'here' is at no node"):
        nodes.disable(ledger, "here")
    with pytest.raises(UnknownNode, match="did you mean 'north'"):
        nodes.disable(ledger, "nort")


# ---- new keys


def test_a_new_key_takes_the_old_one_s_place_at_once(ledger, site):
    north = site()
    admit(ledger, north.join(), Terms(labels={"gpu": "a100"}))
    old = north.key.public
    north.rotate()

    record = nodes.rotate(ledger, north.join(), north.key.public.fingerprint)

    assert record.fingerprint == north.key.public.fingerprint != old.fingerprint
    assert ledger.nodes.of_clients(["north"])["north"].public_key == north.key.public.text
    assert record.why == f"instead of {old.fingerprint}"
    assert ledger.client("north").labels["gpu"] == "a100"


def test_only_the_key_that_is_known_vouches_for_a_new_one(ledger, site):
    north, other = site(), site(place="elsewhere")
    admit(ledger, north.join(), Terms())
    other.rotate()
    with pytest.raises(NodeRefused, match="vouched for by its old one"):
        nodes.rotate(ledger, other.join())
    with pytest.raises(NodeRefused, match="vouched for by its old one"):
        nodes.rotate(ledger, north.join())
    north.rotate()
    with pytest.raises(NodeRefused, match="weft clients rotate --join"):
        admit(ledger, north.join(), Terms())
    nodes.rotate(ledger, north.join())
    stolen = site(place="third")
    stolen.old, stolen.key = north.old, stolen.key  # somebody has the key that was replaced
    with pytest.raises(NodeRefused, match="vouched for by its old one"):
        nodes.rotate(ledger, stolen.join())


def test_a_key_comes_for_nobody_unknown(ledger, site):
    north = site()
    north.rotate()
    with pytest.raises(UnknownNode):
        nodes.rotate(ledger, north.join())


# ---- what cannot be offered, or decided from here


def test_what_is_somebody_else_s_is_not_a_site_s_to_offer(ledger, site):
    ledger.add_client(ClientRecord("south", "jsonl:/x", "ward", num_examples=10))
    ward, north = {"notes": {**OFFER, "population": "ward"}}, site()
    with pytest.raises(PopulationTaken, match="population 'ward' is that of client 'south'"):
        admit(ledger, north.join(ward), Terms())
    ledger.withdrawals.add("north", "me", "")
    with pytest.raises(ClientWithdrew):
        admit(ledger, north.join(), Terms())
    assert ledger.nodes.all() == []


def test_a_changed_join_file_lets_nobody_in(ledger, site):
    changed = site().join().replace(b'"epsilon": 8.0', b'"epsilon": 80.0')
    with pytest.raises(BadJoin, match="it was changed since"):
        admit(ledger, changed, Terms())


def test_a_site_s_budget_is_lowered_from_here_and_raised_by_the_site_alone(ledger, site):
    north = site()
    admit(ledger, north.join(), Terms())
    with pytest.raises(BadBudget, match=r"the site of node 'north' lets population 'north' spend"):
        ledger.set_budget("north", 8.1, 1e-3)
    ledger.set_budget("north", 2.0, 1e-3)
    admit(ledger, north.join({"notes": {**OFFER, "epsilon": 20.0}}), Terms())
    assert ledger.budget("north") == (2.0, 1e-3)
    ledger.set_budget("north", 20.0, 1e-3)
    nodes.disable(ledger, "north")
    with pytest.raises(BadBudget):
        ledger.set_budget("north", None, None)
