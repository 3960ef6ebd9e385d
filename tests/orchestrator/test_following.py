"""A promotion or rollback is done when the servers that follow the alias say so."""

import json
from datetime import timedelta

import pytest
from sqlalchemy import update

from orchestrator import following, service
from storage.database import DatabaseUnavailable, writing
from storage.followers import Followers
from storage.schema import followers as table

BOT = ("bot", "production")
HERE, THERE = "http://here:8000", "http://there:8000"


@pytest.fixture
def bot(workspace, grow):
    """bot:v1 and bot:v2; production points at v2, and was at v1."""
    versions = [grow("bot", private=False, round=number) for number in range(2)]
    for version in versions:
        service.promote(workspace, *BOT, version)
    return versions


@pytest.fixture
def servers(workspace, bot):
    """Two servers that serve bot:v2."""
    registry = Followers(workspace.engine)
    for server, url in (("a", HERE), ("b", THERE)):
        registry.register(server, url, [BOT], lease_s=600)
        registry.confirm(server, *BOT, bot[1])
    return registry


@pytest.fixture
def silence(workspace):
    """Returns a function that makes a server look as if nothing was heard of it for an hour."""

    def fall(server):
        with writing(workspace.engine) as connection:
            (seen,) = connection.execute(table.select().where(table.c.server == server))
            then = seen.seen_at - timedelta(hours=1)
            connection.execute(update(table).where(table.c.server == server).values(seen_at=then))

    return fall


@pytest.fixture
def meanwhile(monkeypatch):
    """Returns a function that says what happens while a command waits, wait by wait."""

    def then(*steps):
        left = iter(steps)
        monkeypatch.setattr(following.time, "sleep", lambda seconds: next(left)())

    return then


def test_a_rollback_waits_for_the_servers_that_follow(weft, bot, servers, meanwhile):
    meanwhile(
        lambda: servers.confirm("a", *BOT, bot[0]), lambda: servers.confirm("b", *BOT, bot[0])
    )
    code, told, _ = weft("rollback", "bot@production")
    assert code == 0
    assert told.splitlines()[1:] == [f"{HERE}  confirmed", f"{THERE}  confirmed"]


def test_a_rollback_lists_who_has_not_confirmed(weft, workspace, bot, servers, silence):
    servers.confirm("a", *BOT, bot[1], "bot:v1 does not fit the base model")
    silence("b")
    code, told, _ = weft("rollback", "bot@production", "--wait", "0")
    was = bot[1][:12]

    assert code == 3
    assert told.splitlines()[1] == (
        f"{HERE}  HAS NOT CONFIRMED, serves {was}: bot:v1 does not fit the base model"
    )
    assert f"{THERE}  SILENT since " in told.splitlines()[2]
    assert "weft followers forget b" in told.splitlines()[2]
    assert workspace.store.pointing(*BOT) == bot[0]  # it was rolled back all the same


def test_a_database_that_is_lost_after_the_move_is_no_move_that_failed(
    weft, workspace, bot, servers, meanwhile, monkeypatch
):
    def away(*_):
        raise DatabaseUnavailable("the database is away")

    with monkeypatch.context() as patch:
        meanwhile(lambda: patch.setattr(Followers, "following", away))
        code, told, said = weft("rollback", "bot@production", "--json")
    assert (code, json.loads(told)["followers"]) == (3, None)
    assert "bot@production was moved, and who follows cannot be told" in said
    assert workspace.store.pointing(*BOT) == bot[0]


def test_a_silent_server_is_not_waited_for_and_has_not_confirmed(
    weft, ok, bot, servers, silence, meanwhile
):
    silence("a")
    silence("b")
    meanwhile()  # a wait would have nothing that happens in it
    code, told, _ = weft("rollback", "bot@production", "--json")
    found = json.loads(told)["followers"]
    assert (code, found["complete"], len(found["silent"])) == (3, False, 2)

    for server in ("a", "b"):
        assert ok("followers", "forget", server) == f"{server}  forgotten\n"
    code, told, said = weft("promote", "bot:v2", "--to", "production")
    assert (code, "no server follows bot@production" in said, len(told.splitlines())) == (
        0,
        True,
        1,
    )


def test_a_server_that_confirmed_and_died_serves_nothing_else(workspace, bot, servers, silence):
    silence("a")
    assert following.following(workspace, BOT, bot[1]).is_complete


def test_who_moves_the_alias_on_ends_the_wait(workspace, bot, servers, meanwhile):
    meanwhile(lambda: service.rollback(workspace, "bot@production"))
    found = following.await_followers(workspace, BOT, bot[1], 600)
    assert found.is_complete
    servers.register("a", HERE, [BOT], lease_s=600)
    found = following.await_followers(workspace, BOT, bot[1], 600)
    assert [one.server for one in found.behind] == ["a"]


def test_what_was_said_of_a_version_before_the_alias_left_it_counts_no_more(
    workspace, bot, servers
):
    servers.register("c", "http://c", [("bot", "staging")])
    servers.confirm("c", "bot", "staging", bot[1])
    service.rollback(workspace, "bot@production")
    service.promote(workspace, *BOT, bot[1])  # by now they may answer with the first

    assert [one.server for one in following.following(workspace, BOT, bot[1]).behind] == ["a", "b"]
    servers.confirm("a", *BOT, bot[1])
    service.promote(workspace, *BOT, bot[1])  # goes nowhere
    found = following.following(workspace, BOT, bot[1])
    assert [one.server for one in found.confirmed] == ["a"]
    assert following.following(workspace, ("bot", "staging"), bot[1]).is_complete


def test_servers_of_another_alias_are_not_asked(workspace, bot, servers):
    servers.register("c", "http://c", [("bot", "staging"), ("cat", "production")])
    assert len(following.following(workspace, BOT, bot[1]).confirmed) == 2


def test_followers_are_listed(read, ok, refused, bot, servers):
    servers.register("c", "http://c", [("bot", "staging")])
    listed = read("followers", "list")
    assert [(f["server"], f["alias"], f["version"]) for f in listed] == [
        ("a", "production", bot[1]),
        ("b", "production", bot[1]),
        ("c", "staging", None),
    ]
    assert len(read("followers", "list", "bot@staging")) == 1
    assert bot[1][:12] in ok("followers", "list")
    assert "no server is registered as 'd'" in refused("followers", "forget", "d")
