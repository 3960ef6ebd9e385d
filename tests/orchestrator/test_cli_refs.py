"""``weft promote``, ``rollback``, ``yank`` and ``alias log``, and the service behind them."""

import getpass

import pytest

from orchestrator import service
from storage.aliases import AliasMoved


@pytest.fixture
def bot(grow):
    """Leave bot:v1 to bot:v3 in the home; return their ids."""
    return [grow("bot", round=number) for number in range(3)]


def test_a_bad_release_is_taken_back_from_the_command_line(ok, read, bot):
    ok("promote", "bot:v1", "--to", "production", "--why", "first")
    ok("promote", "bot:v2", "--to", "production")
    assert ok("promote", "bot:v3", "--to", "production") == f"bot@production  {bot[2]}\n"
    said = ok("yank", "bot:v2", "--reason", "leaks")
    assert said == f"{bot[1]}  yanked\n"
    said = ok("yank", "bot", "--reason", "leaks too")
    assert "bot@production still points at it; go back with: weft rollback bot@production" in said
    said = ok("rollback", "bot@production", "--why", "it swears")
    assert said == f"bot@production  {bot[0]}  (was {bot[2][:12]})\n"

    log = read("alias", "log", "bot@production")
    moves = [(m["number"], m["kind"], m["from"], m["to"], m["why"]) for m in log]
    assert moves == [
        (4, "rollback", bot[2], bot[0], "it swears"),
        (3, "promote", bot[1], bot[2], ""),
        (2, "promote", bot[0], bot[1], ""),
        (1, "promote", None, bot[0], "first"),
    ]
    assert {m["who"] for m in log} == {getpass.getuser()}
    assert "it swears" in ok("alias", "log", "bot@production")
    assert read("show", "bot:v2")["yanked"] == "leaks"
    assert "leaks" in ok("show", "bot:v2")
    assert read("show", "bot")["id"] == bot[0]
    assert ok("yank", "bot:v3", "--undo") == f"{bot[2]}  in use again\n"
    assert read("show", "bot")["id"] == bot[2]


def test_a_rollback_goes_to_a_version_if_told(ok, bot):
    for ref in ("bot:v1", "bot:v2", "bot:v3"):
        ok("promote", ref, "--to", "live")
    assert bot[0] in ok("rollback", "bot@live", "--to", "bot:v1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("rollback", "bot@live"), "every version before it was rolled back from or is yanked"),
        (("rollback", "bot"), "an alias is written NAME@ALIAS, such as bot@production, got 'bot'"),
        (("rollback", "bot@none"), "no version is called 'bot@none'; 'bot' has v1 to v3"),
        (("promote", "bot:v2", "--to", "live"), "bot:v2 ("),
        (("promote", "bot", "--to", "live", "--from", "bot:v3"), "and was expected to point at"),
        (("promote", "bot", "--to", "../live"), "alias '../live' must be 1 to 128 of"),
        (("yank", "bot"), "is yanked for a reason, got none; say it with --reason"),
        (("yank", "bott", "--reason", "x"), "did you mean 'bot'?"),
        (("alias", "log", "bot@none"), "no version is called 'bot@none'"),
    ],
)
def test_a_move_that_cannot_be_is_refused(refused, workspace, bot, argv, message):
    service.promote(workspace, "bot", "live", "bot:v1")
    service.yank(workspace, "bot:v2", "leaks")
    assert message in refused(*argv)


def test_an_alias_that_moved_since_it_was_read_is_left_alone(workspace, bot, monkeypatch):
    store = workspace.store
    service.promote(workspace, "bot", "live", "bot:v1")
    pointing = store.pointing

    def read_then_lose(self, name, alias):
        found = pointing(name, alias)
        store.promote(name, alias, "bot:v3", who="ann", why="")
        return found

    monkeypatch.setattr(type(store), "pointing", read_then_lose)
    with pytest.raises(AliasMoved, match="since ann moved it"):
        service.promote(workspace, "bot", "live", "bot:v2")
    assert store.resolve("bot@live") == bot[2]


def test_the_run_that_made_a_version_hears_of_it(workspace, bot):
    ledger = workspace.ledger
    for number, version in enumerate(bot[:2]):
        ledger.create_run(f"r{number}", "bot", {}, {})
        ledger.record(f"r{number}", "completed", {}, status="completed", version=version)
    service.promote(workspace, "bot", "live", "bot:v1")
    service.promote(workspace, "bot", "live", "bot:v2", why="better")
    service.rollback(workspace, "bot@live", why="worse")
    service.yank(workspace, "bot:v2", "leaks")
    heard = [(e.kind, e.data["why"]) for e in ledger.events("r1")[-3:]]
    assert heard == [("promoted", "better"), ("rolled back", "worse"), ("yanked", "leaks")]
    assert ledger.events("r0")[-1].data["from"] == bot[1]


def test_names_and_versions_are_listed_and_searched(ok, read, bot, grow):
    other = grow("helper", clients=["north"])
    ok("promote", "bot:v1", "--to", "live")
    assert [row["name"] for row in read("names")] == ["bot", "helper"]
    [row] = read("names", "bo")
    assert row == {"name": "bot", "num_versions": 3, "newest": bot[2], "aliases": {"live": bot[0]}}
    assert f"@live {bot[0][:12]}" in ok("names")
    assert [row["name"] for row in read("names", "--after", "bot")] == ["helper"]
    assert [v["id"] for v in read("versions")] == [other, *bot[::-1]]
    assert [v["id"] for v in read("versions", "bot", "--limit", "2")] == [bot[2], bot[1]]
    assert [v["id"] for v in read("versions", "bot", "--before", bot[1])] == [bot[0]]
    assert [v["id"] for v in read("versions", "--client", "north")] == [other]
    assert "helper:v1" in ok("versions", "--client", "north")
