"""Servers that follow an alias say what they serve, and are known for as long as they say it."""

from datetime import timedelta

import pytest
from sqlalchemy import update

from storage.database import writing
from storage.followers import FORGOTTEN_AFTER, BadFollower, Followers, UnknownFollower
from storage.refs import BadName
from storage.schema import followers as table

BOT, CAT = ("bot", "production"), ("cat", "production")
HERE, THERE = "http://here:8000", "http://there:8000"


@pytest.fixture
def followers(engine):
    return Followers(engine)


@pytest.fixture
def silent(engine, followers):
    """Makes a server look as if it had last been heard of some seconds earlier than it was."""

    def age(server: str, seconds: float) -> None:
        with writing(engine) as connection:
            seen = {
                (f.name, f.alias): f.seen_at for f in followers.following() if f.server == server
            }.popitem()[1]
            connection.execute(
                update(table)
                .where(table.c.server == server)
                .values(seen_at=seen - timedelta(seconds=seconds))
            )

    return age


def served(followers, **only):
    return [(f.server, f.name, f.version, f.problem) for f in followers.following(**only)]


def test_a_server_serves_nothing_until_it_confirms(followers):
    followers.register("a", HERE, [CAT, BOT, BOT])
    followers.confirm("a", *BOT, "v1")

    assert served(followers) == [("a", "bot", "v1", None), ("a", "cat", None, None)]
    assert served(followers, name="cat") == [("a", "cat", None, None)]
    assert served(followers, name="bot", alias="staging") == []


def test_a_server_says_why_it_stays_with_another_version(followers):
    followers.register("a", HERE, [BOT])
    followers.confirm("a", *BOT, "v1", "v2 is not signed")
    assert served(followers) == [("a", "bot", "v1", "v2 is not signed")]

    followers.confirm("a", *BOT, "v2")
    assert served(followers) == [("a", "bot", "v2", None)]


def test_a_server_that_registers_again_has_confirmed_nothing(followers):
    followers.register("a", HERE, [BOT, CAT])
    followers.confirm("a", *BOT, "v1")
    followers.register("a", THERE, [BOT])

    assert [(f.url, f.name, f.version) for f in followers.following()] == [(THERE, "bot", None)]


@pytest.mark.parametrize("speak", ["heartbeat", "confirm"])
def test_a_server_is_live_for_as_long_as_it_says_after_each_word(followers, silent, speak):
    followers.register("a", HERE, [BOT], lease_s=5)
    assert followers.following()[0].is_live
    silent("a", 6)
    assert not followers.following()[0].is_live

    followers.heartbeat("a") if speak == "heartbeat" else followers.confirm("a", *BOT, "v1")

    assert followers.following()[0].is_live


def test_a_server_at_the_address_of_a_silent_one_takes_its_place(followers, silent):
    for server, url in (("dead", HERE), ("lives", HERE), ("elsewhere", THERE)):
        followers.register(server, url, [BOT])
    for server in ("dead", "elsewhere"):
        silent(server, 60)

    followers.register("new", HERE, [BOT])

    assert [f.server for f in followers.following()] == ["lives", "new", "elsewhere"]


def test_a_server_that_is_silent_for_a_day_is_gone(followers, silent):
    followers.register("a", HERE, [BOT])
    silent("a", FORGOTTEN_AFTER.total_seconds())
    assert followers.following() == []
    followers.register("b", THERE, [BOT])
    assert not followers.forget("a")


def test_a_server_that_was_forgotten_is_told_to_register_again(followers):
    followers.register("a", HERE, [BOT, CAT])
    assert followers.forget("a")
    assert not followers.forget("a")
    assert followers.following() == []
    for speak in (lambda: followers.heartbeat("a"), lambda: followers.confirm("a", *BOT, "v1")):
        with pytest.raises(UnknownFollower, match=r"registered as 'a'.*register it again"):
            speak()


def test_a_server_confirms_only_what_it_follows(followers):
    followers.register("a", HERE, [BOT])
    with pytest.raises(UnknownFollower, match="that follows cat@production"):
        followers.confirm("a", *CAT, "v1")


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (("", HERE, [BOT], 5), BadFollower, "the id of a server has 1 to 300 characters, got ''"),
        (("a", "x" * 301, [BOT], 5), BadFollower, "the url of a server has 1 to 300"),
        (("a", HERE, [], 5), BadFollower, "follows at least one NAME@ALIAS"),
        (("a", HERE, [BOT], 0), BadFollower, "some seconds, got 0"),
        (("a", HERE, [BOT], float("nan")), BadFollower, "some seconds, got nan"),
        (("a", HERE, [("Bot", "production")], 5), BadName, "name 'Bot' must be"),
    ],
)
def test_what_no_server_can_be_is_refused(followers, given, error, says):
    with pytest.raises(error, match=says):
        followers.register(*given)
    assert followers.following() == []
