"""A name's gate is what it is now, what it was, and what a move was decided by."""

import pytest
import torch
from sqlalchemy import update

from storage.backup import back_up
from storage.blobs import BlobStore
from storage.canonical import NotJson
from storage.database import open_database, writing
from storage.fsck import fsck
from storage.gates import Gates, UnknownGate
from storage.refs import BadName
from storage.restoring import restore
from storage.schema import gates as table
from storage.schema import promotions
from storage.store import AdapterStore

ASKS = {"aliases": {"production": {"signature": {}}}}
OTHER = {"aliases": {"*": {"signature": {}}}}


@pytest.fixture
def gates(engine):
    return Gates(engine)


@pytest.fixture
def moved(store, gates):
    """A name with one version, promoted by its gate; returns the gate's row and the move."""
    version = store.commit({"w": torch.ones(1)}, parents={}, recipe={"round": 1})
    store.name("bot", version)
    row = gates.set("bot", ASKS, who="ada")
    evidence = {
        "version": version,
        "gate": {"number": row.number, "digest": row.digest},
        "checks": [],
    }
    move = store.promote("bot", "production", "bot", who="ada", why="", evidence=evidence)
    return row, move


def test_a_gate_has_a_history(gates):
    assert gates.find("bot") is None
    first = gates.set("bot", ASKS, who="ada", why="to begin with")
    assert gates.set("bot", ASKS, who="bob") == first
    second = gates.set("bot", OTHER, who="bob")
    gates.set("bot", None, who="eve", why="too strict")

    assert gates.find("bot") is None
    assert [(r.number, r.document, r.who, r.why) for r in gates.history("bot")] == [
        (3, None, "eve", "too strict"),
        (2, OTHER, "bob", ""),
        (1, ASKS, "ada", "to begin with"),
    ]
    assert first.digest != second.digest
    assert gates.history("cat") == []


def test_a_gate_that_was_removed_can_be_set_again(gates):
    gates.set("bot", ASKS, who="ada")
    gates.set("bot", None, who="ada")
    assert gates.set("bot", ASKS, who="ada").number == 3
    assert gates.get("bot").document == ASKS


@pytest.mark.parametrize("removed", [False, True])
def test_what_is_not_there_cannot_be_removed(gates, removed):
    if removed:
        gates.set("bot", ASKS, who="ada")
        gates.set("bot", None, who="ada")
    for ask in (lambda: gates.get("bot"), lambda: gates.set("bot", None, who="ada")):
        with pytest.raises(UnknownGate, match="'bot' has no gate; give it one with: weft gate set"):
            ask()


def test_what_is_no_gate_is_refused(gates):
    with pytest.raises(BadName):
        gates.set("Bot", ASKS, who="ada")
    with pytest.raises(NotJson):
        gates.set("bot", {"tau": float("nan")}, who="ada")


def test_the_evidence_stays_with_the_move(store, moved):
    row, move = moved
    assert store.promotions("bot", "production") == [move]
    assert move.evidence["gate"] == {"number": 1, "digest": row.digest}


@pytest.mark.parametrize("damaged", ["nothing", "[]", '{"a":'])
def test_damaged_evidence_keeps_no_alias_where_it_is(engine, store, moved, damaged):
    second = store.commit({"w": torch.ones(1)}, parents={}, recipe={"round": 2})
    store.name("bot", second)
    store.promote("bot", "production", second, who="ada", why="")
    with writing(engine) as connection:
        connection.execute(update(promotions).values(evidence=damaged))

    assert store.rollback("bot", "production", who="ada", why="").version == moved[1].version
    assert store.promote("bot", "production", second, who="ada", why="").version == second
    found = store.promotions("bot", "production")
    assert [list(move.evidence or ()) for move in found] == [[], [], ["damaged"], ["damaged"]]


def test_gates_and_evidence_are_in_a_backup(engine, blobs, moved, tmp_path):
    back_up(engine, blobs, tmp_path / "copy")
    there = open_database(f"sqlite:///{tmp_path}/there/weft.db")
    restore(there, BlobStore(tmp_path / "there" / "blobs"), tmp_path / "copy")
    brought = AdapterStore(there, BlobStore(tmp_path / "there" / "blobs"))

    assert brought.promotions("bot", "production") == [moved[1]]
    assert Gates(there).history("bot") == [moved[0]]
    there.dispose()


def problems(engine, blobs):
    return [(one.kind, one.subject) for one in fsck(engine, blobs).problems]


@pytest.mark.parametrize(
    ("changed", "values", "found"),
    [
        (table, {"document": '{"aliases":{}}'}, [("gate", "bot@production")]),
        (table, {"document": "[]"}, [("gate", "bot 1"), ("gate", "bot@production")]),
        (table, {"number": 2}, [("gate", "bot"), ("gate", "bot@production")]),
        (promotions, {"evidence": '{"version":"x","gate":null}'}, [("gate", "bot@production")]),
        (promotions, {"evidence": "nothing"}, [("gate", "bot@production")]),
    ],
)
def test_fsck_finds_evidence_that_was_changed(engine, blobs, moved, changed, values, found):
    assert problems(engine, blobs) == []
    with writing(engine) as connection:
        connection.execute(update(changed).values(values))
    assert problems(engine, blobs) == found
