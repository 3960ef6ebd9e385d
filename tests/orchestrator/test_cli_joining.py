"""``weft node init``, ``join`` and ``rotate``: one command at the site, and it can be let in."""

import json
from datetime import UTC, datetime, timedelta

import pytest
import yaml

from clients.node.identity import read_key
from clients.node.joining import read_join
from clients.node.settings import load_settings


@pytest.fixture
def made(ok, notes, tiny_encoder, tmp_path):
    """Return what making a node printed, and its folder."""

    def run(*more, name="clinic-north"):
        folder = tmp_path / "sites" / name
        data = ["--data", f"notes={notes(size=40)}", "--epsilon", 8, "--model", tiny_encoder]
        where = ["--name", name, "--superlink", "weft.example.org:443"]
        return ok("node", "init", folder, *where, *data, *more), folder

    return run


def test_one_command_makes_a_node_that_can_be_let_in(made, tmp_path):
    printed, folder = made("--label", "region=north", "--expires", 30)

    key = read_key(folder / "node.key").public
    found = read_join((folder / "join.json").read_bytes(), datetime.now(UTC))
    assert (found.key, found.statement.name) == (key, "clinic-north")
    assert found.statement.labels == {"region": "north"}
    assert found.statement.data["notes"].examples == 40
    assert found.statement.expires - found.statement.made == timedelta(days=30)
    assert f"key {key.fingerprint}\n" in printed
    assert f"give {folder / 'join.json'}" in printed
    assert len(load_settings(folder / "node.yaml").models) == 1


def test_a_node_may_be_made_before_its_data_are_known(ok, weft, tmp_path, notes):
    folder = tmp_path / "site"
    where = ["--name", "north", "--superlink", "weft.example.org:443"]
    printed = ok("node", "init", folder, *where)
    assert f"then: weft node join {folder / 'node.yaml'}" in printed
    assert not (folder / "join.json").exists()

    code, _, told = weft("node", "join", folder / "node.yaml")
    assert (code, "data" in told) == (2, True)
    document = yaml.safe_load((folder / "node.yaml").read_text())
    document["data"] = {"notes": {"uri": notes(size=8), "epsilon": 4.0}}
    document["models"] = {"ab" * 32: "model"}
    (folder / "node.yaml").write_text(yaml.safe_dump(document))
    join = read_join(ok("node", "join", folder / "node.yaml").encode(), datetime.now(UTC))
    assert join.statement.data["notes"].epsilon == 4.0


def test_data_that_are_nobody_s_to_spend_are_refused_before_anything_is_made(weft, notes, tmp_path):
    where = ["--name", "north", "--superlink", "weft:443", "--data", f"notes={notes()}"]
    for more in ([], ["--public", "--epsilon", 8]):
        code, _, told = weft("node", "init", tmp_path / "site", *where, *more)
        assert (code, "give --epsilon" in told) == (2, True)
    code, _, told = weft(
        "node", "init", tmp_path / "site", *where, "--public", "--wheelhouse", tmp_path
    )
    assert (code, "has no wheel of weft" in told) == (2, True)
    assert not (tmp_path / "site").exists()


def test_a_second_init_changes_nothing(made, weft):
    _, folder = made()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, _, told = weft("node", "init", folder, "--name", "x", "--superlink", "weft:443")
    assert (code, "not written over" in told) == (2, True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_new_key_is_vouched_for_by_the_old_one_and_used_when_told_to(made, ok, weft):
    _, folder = made()
    first = read_key(folder / "node.key").public

    code, text, told = weft("node", "rotate", folder / "node.yaml")

    assert code == 0
    join = read_join(text.encode(), datetime.now(UTC))
    assert (join.previous, join.statement.name) == (first, "clinic-north")
    assert join.key.fingerprint in told
    assert read_key(folder / "node.key").public == first
    done = ok("node", "rotate", folder / "node.yaml", "--finish")
    assert join.key.fingerprint in done
    assert read_key(folder / "node.key").public == join.key
    again = json.loads(ok("node", "join", folder / "node.yaml"))
    assert list(again["signatures"]) == [join.key.fingerprint]
