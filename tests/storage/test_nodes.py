"""What is said of a site's node is kept for ever, and the newest word counts."""

import base64
import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete, insert, update

from storage.backup import back_up
from storage.blobs import BlobStore
from storage.database import open_database, writing
from storage.fsck import fsck
from storage.ledger import BadBudget, BadClient, ClientExists, ClientRecord, Ledger
from storage.nodes import (
    KeyTaken,
    NodeChanged,
    NodeRecord,
    PopulationTaken,
    Sighting,
    UnknownNode,
)
from storage.restoring import restore
from storage.schema import clients as clients_table
from storage.schema import nodes as table

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def key(number: int) -> tuple[str, str]:
    """Return a public key, as far as the store looks at one, and its fingerprint."""
    blob = bytes([number]) * 104
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return f"ecdsa-sha2-nistp384 {base64.b64encode(blob).decode()}", f"SHA256:{digest}"


@pytest.fixture
def node():
    """Return a function that makes what is said of a node."""

    def make(name="north", number=1, status="enabled", **changes):
        public, fingerprint = key(1)
        record = NodeRecord(
            name=name,
            number=number,
            status=status,
            public_key=public,
            fingerprint=fingerprint,
            expires_at=NOW + timedelta(days=365),
            labels={"region": "north"},
            budgets={"patients": (8.0, 1e-5)},
            document={"statement": {"ε": 8.0}},
            who="ada",
            why="",
        )
        return replace(record, **changes)

    return make


def notes(name="north", **changes):
    """Return a client whose data lie at a node."""
    record = ClientRecord(name, "site:notes", "patients", num_examples=5300, node="north")
    return replace(record, **changes)


def test_the_newest_word_counts_and_the_others_stay(ledger, node):
    said = [node(status="pending"), node(number=2), node(number=3, status="disabled", why="lost")]
    for word in said:
        ledger.nodes.put(word)

    assert ledger.nodes.get("north") == said[2]
    assert ledger.nodes.all() == [said[2]]
    assert ledger.nodes.history("north") == said[::-1]
    assert ledger.nodes.find("south") is None
    with pytest.raises(UnknownNode, match="no node is called 'nort'; did you mean 'north'"):
        ledger.nodes.get("nort")


def test_two_who_decide_at_once_do_not_overwrite_each_other(ledger, node):
    ledger.nodes.put(node())
    ledger.nodes.put(node(number=2, status="disabled"))
    with pytest.raises(NodeChanged, match="weft clients show north"):
        ledger.nodes.put(node(number=2, status="removed"))
    assert ledger.nodes.get("north").status == "disabled"


@pytest.mark.parametrize(
    ("status", "later", "let_in"),
    [
        ("enabled", 364, True),
        ("enabled", 365, False),
        ("pending", 1, False),
        ("disabled", 1, False),
        ("removed", 1, False),
    ],
)
def test_only_an_enabled_node_is_let_in_and_only_while_its_key_is_good(node, status, later, let_in):
    assert node(status=status).is_let_in(NOW + timedelta(days=later)) is let_in


def test_a_key_is_one_node_s_for_ever(ledger, node):
    ledger.nodes.put(node())
    with pytest.raises(KeyTaken, match="was that of node 'north'"):
        ledger.nodes.put(node("south"))

    public, fingerprint = key(2)
    ledger.nodes.put(node(number=2, public_key=public, fingerprint=fingerprint))
    with pytest.raises(KeyTaken, match="of this node, and is trusted no more"):
        ledger.nodes.put(node(number=3))
    assert ledger.nodes.keys() == {key(1)[0]: "north", public: "north"}


def test_a_removed_node_s_key_is_trusted_no_more_and_its_name_is_free(ledger, node):
    ledger.nodes.put(node())
    ledger.nodes.put(node(number=2, status="removed"))
    with pytest.raises(KeyTaken, match="trusted no more"):
        ledger.nodes.put(node(number=3))
    public, fingerprint = key(2)
    ledger.nodes.put(node(number=3, public_key=public, fingerprint=fingerprint))
    assert ledger.nodes.get("north").status == "enabled"


def test_its_clients_are_those_that_it_offers(ledger, node):
    letters = notes("north.letters", data="site:letters", population="writers", labels={"a": "b"})
    ledger.nodes.put(node(), [notes()])
    ledger.nodes.put(node(number=2), [notes("north.notes", num_examples=5400), letters])

    assert [(c.name, c.num_examples) for c in ledger.clients()] == [
        ("north.letters", 5300),
        ("north.notes", 5400),  # called otherwise, and the same one
    ]
    assert ledger.client("north.letters").labels == {"a": "b"}
    assert set(ledger.nodes.of_clients()) == {"north.notes", "north.letters"}
    assert ledger.nodes.of_clients(["north.letters", "x"])["north.letters"].name == "north"

    ledger.nodes.put(node(number=3, status="disabled"))
    assert len(ledger.clients()) == 2
    ledger.nodes.put(node(number=4, status="removed"), [])
    assert ledger.clients() == []
    assert ledger.populations() == ["patients", "writers"]


@pytest.mark.parametrize(
    ("offered", "error"),
    [
        (notes("south"), ClientExists),
        (notes("no name"), BadClient),
        (notes(population="others"), PopulationTaken),
    ],
)
def test_what_cannot_be_offered_leaves_everything_as_it_was(ledger, node, offered, error):
    ledger.add_client(ClientRecord("south", "jsonl:/x", "others", num_examples=4))
    with pytest.raises(error):
        ledger.nodes.put(node(), [offered])
    assert ledger.nodes.find("north") is None
    assert [c.name for c in ledger.clients()] == ["south"]
    assert ledger.populations() == ["others"]


def test_a_client_is_not_called_as_another_one(ledger, node):
    ledger.nodes.put(node(), [notes()])
    ledger.add_client(ClientRecord("north.notes", "jsonl:/x", "others"))
    with pytest.raises(ClientExists):
        ledger.nodes.put(node(number=2), [notes("north.notes")])
    assert ledger.client("north").data == "site:notes"


def test_a_data_set_does_not_leave_what_it_spent_behind(ledger, node):
    ledger.nodes.put(node(), [notes()])
    with pytest.raises(PopulationTaken, match="what was spent stays there: keep it"):
        ledger.nodes.put(node(number=2), [notes(population="others")])


def put_with(ledger, node, number, budget):
    budgets = {"patients": budget} if budget else {}
    ledger.nodes.put(node(number=number, budgets=budgets), [notes()])
    return ledger.budget("patients")


def test_the_site_s_budget_is_the_population_s(ledger, node):
    assert put_with(ledger, node, 1, (8.0, 1e-5)) == (8.0, 1e-5)
    assert put_with(ledger, node, 2, (9.0, 1e-5)) == (9.0, 1e-5)
    assert put_with(ledger, node, 3, (2.0, 1e-6)) == (2.0, 1e-6)
    assert put_with(ledger, node, 4, None) is None
    assert put_with(ledger, node, 5, (3.0, 1e-6)) == (3.0, 1e-6)


def test_from_afar_a_site_s_budget_is_only_lowered(ledger, node):
    put_with(ledger, node, 1, (8.0, 1e-5))
    for epsilon, delta in [(8.1, 1e-5), (8.0, 2e-5), (None, None)]:
        with pytest.raises(BadBudget, match=r"at most ε = 8 \(δ = 1e-05\).*only be lowered"):
            ledger.set_budget("patients", epsilon, delta)
    assert ledger.budget("patients") == (8.0, 1e-5)

    ledger.set_budget("patients", 4.0, 1e-5)
    ledger.set_budget("patients", 8.0, 1e-6)  # up to what the site declared
    ledger.set_budget("patients", 4.0, 1e-6)
    assert put_with(ledger, node, 2, (9.0, 1e-5)) == (4.0, 1e-6)  # a lowered one stays lowered
    assert put_with(ledger, node, 3, (3.0, 1e-5)) == (3.0, 1e-6)  # the site may lower it further
    ledger.nodes.put(node(number=4, status="disabled"))
    with pytest.raises(BadBudget):
        ledger.set_budget("patients", 9.0, 1e-5)


def test_where_a_site_sets_no_bound_anything_is_lower(ledger, node):
    put_with(ledger, node, 1, None)
    ledger.set_budget("patients", 100.0, 1e-5)
    assert put_with(ledger, node, 2, None) == (100.0, 1e-5)
    ledger.set_budget("patients", None, None)


def test_a_delta_that_means_nothing_is_refused(ledger, node):
    with pytest.raises(BadBudget, match="delta must be below"):
        ledger.nodes.put(node(), [notes(epsilon=8.0, delta=0.5)])


def test_what_is_seen_of_nodes_is_the_newest_of_it(ledger, node):
    ledger.nodes.put(node())
    seen = Sighting("north", key(1)[1], str(2**64 - 1), NOW, "0.1.0", "1.41.0")
    ledger.nodes.said_versions("north", "9", "9")
    assert ledger.nodes.sightings() == {}

    ledger.nodes.see([seen])
    ledger.nodes.see([replace(seen, seen_at=NOW + timedelta(seconds=5), weft=None)])
    ledger.nodes.said_versions("north", "0.2.0", "1.41.1")

    [found] = ledger.nodes.sightings().values()
    assert found == replace(seen, seen_at=NOW + timedelta(seconds=5), weft="0.2.0", flwr="1.41.1")


# ---- backups and fsck


@pytest.fixture
def fresh(tmp_path):
    engine = open_database(f"sqlite:///{tmp_path}/fresh/weft.db")
    yield engine, BlobStore(tmp_path / "fresh" / "blobs"), Ledger(engine)
    engine.dispose()


def test_a_backup_brings_nodes_back_and_nothing_that_a_superlink_said(
    engine, blobs, ledger, node, fresh, tmp_path
):
    ledger.nodes.put(node(status="pending"))
    ledger.nodes.put(node(number=2), [notes()])
    ledger.nodes.see([Sighting("north", key(1)[1], "77", NOW)])
    back_up(engine, blobs, tmp_path / "backup")

    for _ in range(2):
        restore(fresh[0], fresh[1], tmp_path / "backup", replace=True)
        assert fresh[2].nodes.history("north") == ledger.nodes.history("north")
        assert fresh[2].clients() == ledger.clients()
    assert fresh[2].nodes.sightings() == {}
    assert fsck(fresh[0], fresh[1]).problems == ()


@pytest.mark.parametrize("status", ["disabled", "removed"])
def test_a_node_that_was_shut_out_since_the_backup_stays_out(
    engine, blobs, ledger, node, tmp_path, status
):
    ledger.nodes.put(node(), [notes()])
    back_up(engine, blobs, tmp_path / "backup")
    gone = [] if status == "removed" else None
    ledger.nodes.put(node(number=2, status=status, why="stolen"), gone)
    ledger.nodes.see([Sighting("north", key(1)[1], "77", NOW)])

    restore(engine, blobs, tmp_path / "backup", replace=True)

    assert [word.status for word in ledger.nodes.history("north")] == [status, "enabled"]
    assert len(ledger.clients()) == (0 if status == "removed" else 1)
    assert ledger.nodes.sightings()["north"].flower_id == "77"  # this SuperLink's still
    assert fsck(engine, blobs).problems == ()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (update(table).values(fingerprint="SHA256:x"), "has a key of another fingerprint"),
        (update(table).values(public_key="none"), "cannot be read"),
        (update(table).values(document="[]"), "cannot be read"),
        (update(table).values(number=7), "a gap"),
        (delete(table), "client north is of node north, of which nothing is known"),
    ],
)
def test_fsck_finds_what_is_wrong_with_a_node(engine, blobs, ledger, node, change, told):
    ledger.nodes.put(node(), [notes()])
    assert fsck(engine, blobs).problems == ()
    with writing(engine) as connection:
        connection.execute(change)

    [problem] = fsck(engine, blobs).problems

    assert problem.kind == "node"
    assert told in problem.text


def test_clients_of_before_there_were_nodes_are_of_none(engine, ledger):
    row = {"name": "a", "population": "a", "data": "jsonl:/a", "fields": "{}", "labels": "{}"}
    ledger.add_client(ClientRecord("b", "jsonl:/b", "a"))
    with writing(engine) as connection:
        connection.execute(insert(clients_table).values(**row, public=False, created_at=NOW))
    assert [c.node for c in ledger.clients()] == [None, None]
    assert ledger.nodes.of_clients() == {}
