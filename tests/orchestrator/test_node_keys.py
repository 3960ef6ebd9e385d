"""A SuperLink lets in whom the ledger lets in, and nobody else, a step later at most."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from clients.node.identity import PublicKey
from orchestrator import node_keys, nodes
from orchestrator.node_keys import ONLINE_FOR, is_online, keys_in_step
from orchestrator.nodes import Terms, admit
from storage.records import now


@dataclass
class FlowerNode:
    id: int
    public_key: bytes
    online: bool = False
    last_seen: float = 0.0


class FakeSuperLink:
    """Flower's rules: a number is given once, and a key that was taken off is taken no more."""

    def __init__(self):
        self.there, self.spent, self.calls = {}, set(), []
        self.down = self.late = False

    def nodes(self):
        if self.down:
            raise ConnectionError("nobody answers at 127.0.0.1:9093")
        return list(self.there.values())

    def register(self, public_key, name):
        self.calls.append(("register", name))
        if public_key in self.spent:
            raise ValueError(f"the key of node {name!r} was unregistered")
        self.there[public_key] = FlowerNode(2**63 + len(self.calls), public_key)
        return self.there[public_key].id

    def unregister(self, node):
        if self.late:
            raise RuntimeError(f"there is no node {node}")
        [key] = [key for key, one in self.there.items() if one.id == node]
        self.calls.append(("unregister", node))
        self.spent.add(key)
        del self.there[key]


@pytest.fixture
def superlink():
    return FakeSuperLink()


@pytest.fixture
def ledger(workspace):
    return workspace.ledger


def test_enabled_keys_are_let_in_and_nothing_is_done_twice(ledger, superlink, site):
    north = site()
    admit(ledger, north.join(), Terms())
    admit(ledger, site("south").join(), Terms(pending=True))

    assert keys_in_step(superlink, ledger).registered == ("north",)

    assert list(superlink.there) == [north.key.public.pem]
    [seen] = ledger.nodes.sightings().values()
    assert seen.flower_id == str(superlink.there[north.key.public.pem].id)
    assert (seen.weft, seen.flwr, seen.seen_at) == ("0.1.0", "1.41.0", None)
    assert keys_in_step(superlink, ledger) == node_keys.Step()
    assert len(superlink.calls) == 1


@pytest.mark.parametrize("how", ["disabled", "removed", "expired"])
def test_who_is_shut_out_is_taken_off_at_once(ledger, superlink, site, monkeypatch, how):
    admit(ledger, site().join(days=1), Terms())
    keys_in_step(superlink, ledger)
    if how == "disabled":
        nodes.disable(ledger, "north")
    elif how == "removed":
        nodes.remove(ledger, "north")
    else:
        later = now() + timedelta(days=1)
        monkeypatch.setattr(node_keys, "now", lambda: later)

    assert keys_in_step(superlink, ledger).unregistered == ("north",)

    assert superlink.there == {}
    assert ledger.nodes.sightings()["north"].flower_id is None
    assert keys_in_step(superlink, ledger) == node_keys.Step()


def test_a_new_key_is_let_in_and_the_old_one_shut_out_in_one_step(ledger, superlink, site):
    north = site()
    admit(ledger, north.join(), Terms())
    keys_in_step(superlink, ledger)
    north.rotate()
    nodes.rotate(ledger, north.join())

    step = keys_in_step(superlink, ledger)

    assert (step.registered, step.unregistered) == (("north",), ("north",))
    assert list(superlink.there) == [north.key.public.pem]
    assert ledger.nodes.sightings()["north"].fingerprint == north.key.public.fingerprint
    assert ledger.nodes.sightings()["north"].flower_id is not None


def test_a_key_that_the_superlink_takes_no_more_is_a_problem_that_is_told(
    ledger, superlink, site, caplog
):
    north = site()
    admit(ledger, north.join(), Terms())
    superlink.spent.add(north.key.public.pem)

    for _ in range(3):
        step = keys_in_step(superlink, ledger)

    assert step.problems == (("north", "the key of node 'north' was unregistered"),)
    assert ledger.nodes.sightings()["north"].problem == step.problems[0][1]
    assert sum("cannot be let in" in record.message for record in caplog.records) == 1
    superlink.spent.clear()
    assert keys_in_step(superlink, ledger).registered == ("north",)
    assert ledger.nodes.sightings()["north"].problem is None


def test_one_bad_key_does_not_keep_others_out(ledger, superlink, site):
    bad, good = site("bad"), site("good")
    admit(ledger, bad.join(), Terms())
    admit(ledger, good.join(), Terms())
    superlink.spent.add(bad.key.public.pem)
    assert keys_in_step(superlink, ledger).registered == ("good",)


def test_what_another_process_took_off_just_now_is_off(ledger, superlink, site):
    admit(ledger, site().join(), Terms())
    keys_in_step(superlink, ledger)
    nodes.disable(ledger, "north")
    superlink.late = True
    assert keys_in_step(superlink, ledger).unregistered == ("north",)
    assert ledger.nodes.sightings()["north"].flower_id is None


def test_a_superlink_that_is_down_changes_nothing(ledger, superlink, site):
    admit(ledger, site().join(), Terms())
    superlink.down = True
    with pytest.raises(ConnectionError):
        keys_in_step(superlink, ledger)
    assert ledger.nodes.sightings() == {}


def test_keys_of_which_the_ledger_knows_nothing_are_left_alone(ledger, superlink, site):
    stranger = site("stranger").key.public
    superlink.register(stranger.pem, "by hand")
    assert keys_in_step(superlink, ledger).strangers == 1
    assert list(superlink.there) == [stranger.pem]


def test_who_is_online_is_seen_and_who_falls_silent_is_not(ledger, superlink, site, monkeypatch):
    north = site()
    admit(ledger, north.join(), Terms())
    keys_in_step(superlink, ledger)
    node = superlink.there[PublicKey(north.key.public.text).pem]
    assert not is_online(ledger.nodes.sightings()["north"], now())

    node.online = True
    keys_in_step(superlink, ledger)
    first = ledger.nodes.sightings()["north"]
    keys_in_step(superlink, ledger)
    assert ledger.nodes.sightings()["north"] == first  # nothing is written every few seconds
    assert is_online(first, now())
    assert not is_online(first, now() + ONLINE_FOR + timedelta(seconds=1))

    node.online, node.last_seen = False, datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    keys_in_step(superlink, ledger)
    silent = ledger.nodes.sightings()["north"]
    assert silent.seen_at == datetime(2026, 1, 1, tzinfo=UTC)
    assert not is_online(silent, now())
