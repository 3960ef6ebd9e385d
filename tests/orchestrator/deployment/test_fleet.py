"""What weft doctor says of sites' nodes, as the ledger knows them."""

from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import pytest

from orchestrator.deployment.fleet import nodes
from storage.database import connect, migrate, open_database
from storage.nodes import NodeRecord, Nodes, Sighting

JUST_NOW = timedelta(0)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'weft.db'}"


@pytest.fixture
def known(url):
    """Returns a function that lets a node in, or not, and says when it was seen."""
    engine = open_database(url)

    def put(name, status="enabled", days=200, ago=None, **seen):
        at, now = Nodes(engine), datetime.now(UTC)
        key = f"ecdsa-sha2-nistp384 {name}"
        expires = now + timedelta(days=days)
        at.put(NodeRecord(name, 1, status, key, f"SHA256:{name}", expires, {}, {}, {}, "ada", ""))
        if ago is not None:
            at.see([Sighting(name, f"SHA256:{name}", "7", seen_at=now - ago, **seen)])
            if "weft" in seen:
                at.said_versions(name, seen["weft"], seen["flwr"])

    yield put
    engine.dispose()


HERE = {"weft": version("weft"), "flwr": version("flwr")}


def told(url):
    return [(finding.verdict, finding.says) for finding in nodes(url)]


def test_a_node_that_is_there_is_well(url, known):
    known("north", ago=JUST_NOW, **HERE)
    assert told(url) == [("ok", "node north is there")]


@pytest.mark.parametrize(
    ("given", "verdict", "says"),
    [
        ({"status": "pending"}, "warn", "waits to be let in, with key SHA256:north"),
        ({"days": -1}, "fail", "the key of node north was good until"),
        ({"days": 9, "ago": JUST_NOW}, "warn", "only"),
        ({}, "warn", "has not been seen yet"),
        ({"ago": timedelta(days=2)}, "warn", "has not been seen since"),
        ({"ago": JUST_NOW, "problem": "its key is spent"}, "fail", "its key is spent"),
        ({"ago": JUST_NOW, **HERE, "flwr": "1.40.0"}, "fail", "node north has flwr 1.40.0"),
        ({"ago": JUST_NOW, **HERE, "weft": "9.0"}, "warn", "node north has weft 9.0"),
    ],
)
def test_a_node_that_is_not_well_is_told_of(url, known, given, verdict, says):
    known("north", **given)
    [(found, sentence)] = told(url)
    assert (found, says in sentence) == (verdict, True), sentence


def test_nodes_that_are_not_to_be_let_in_are_no_finding(url, known):
    known("north", "disabled", days=-5)
    known("south", "removed")
    assert told(url) == []


def test_a_database_that_is_not_there_or_older_is_left_alone(url, tmp_path):
    assert told(url) == []
    assert not (tmp_path / "weft.db").exists()
    engine = connect(url)
    migrate(engine, "0009")
    engine.dispose()
    assert told(url) == []
