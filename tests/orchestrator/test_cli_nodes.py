"""``weft clients``, of sites: one command here, and a site's data take part."""

import json
from datetime import timedelta

import pytest

from orchestrator.service import open_workspace
from storage.nodes import Sighting
from storage.records import now


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a join file as the site sent it."""

    def write(text):
        path = tmp_path / "sent.json"
        path.write_bytes(text)
        return path

    return write


@pytest.fixture
def ledger(weft, tmp_path):
    workspace = open_workspace(tmp_path / "home")
    yield workspace.ledger
    workspace.close()


def test_a_node_is_added_and_listed_as_it_is_seen(ok, ledger, site, file):
    north = site()
    ok("clients", "add", "here", "--data", "builtin:parameter-types", "--examples", 50)
    said = ok("clients", "add", "--join", file(north.join()), "--label", "gpu=a100")
    assert f"node north is enabled, key {north.key.public.fingerprint}" in said
    assert "client north: 100 examples, budget ε 8 (δ 0.001)" in said
    seen = Sighting("north", north.key.public.fingerprint, "7", now(), "0.3.0", "1.41.0")
    ledger.nodes.see([seen])

    listed = ok("clients", "list")
    [row] = [line for line in listed.splitlines() if "site:notes" in line]
    assert "gpu=a100, region=north" in row
    assert [cell.strip() for cell in row.strip("│").split("│")][-1] == "0.3.0"
    assert "yes" in row
    [other, shown] = json.loads(ok("clients", "list", "--json"))
    assert (other["name"], other["site"], other["node"]) == ("here", None, None)
    assert shown["site"]["online"] is True
    assert shown["site"]["status"] == "enabled"
    assert (shown["data"], shown["fields"]) == ("site:notes", {})


def test_without_sites_the_list_is_as_narrow_as_ever(ok):
    ok("clients", "add", "here", "--data", "builtin:parameter-types", "--examples", 50)
    assert "last seen" not in ok("clients", "list")


def test_a_pending_node_is_approved_by_the_key_that_the_site_told(ok, weft, ledger, site, file):
    north = site()
    said = ok("clients", "add", "--join", file(north.join()), "--pending")
    assert "weft clients approve north" in said
    assert json.loads(ok("clients", "list", "--json")) == []
    assert north.key.public.fingerprint in ok("clients", "list", "--pending")
    [waiting] = json.loads(ok("clients", "list", "--pending", "--json"))
    assert (waiting["name"], waiting["status"]) == ("north", "pending")

    code, _, told = weft("clients", "approve", "north", "--fingerprint", "SHA256:other")
    assert (code, "was expected" in told) == (2, True)
    ok("clients", "approve", "north", "--fingerprint", north.key.public.fingerprint)
    assert ok("clients", "list", "--pending") == "no node waits for approval\n"
    assert len(json.loads(ok("clients", "list", "--json"))) == 1


def test_what_is_said_of_a_node_is_kept_and_shown(ok, ledger, site, file):
    north = site()
    ok("clients", "add", "--join", file(north.join()), "--expires", 20)
    ok("clients", "disable", "north", "--why", "its disk is full")
    assert "north (disabled)" in ok("clients", "list")
    ok("clients", "enable", "north")
    assert "north (enabled, 19 days left)" in ok("clients", "list")
    north.rotate()
    assert north.key.public.fingerprint in ok("clients", "rotate", "--join", file(north.join()))

    shown = ok("clients", "show", "north")
    assert "spent: nothing" in shown
    assert "disabled by" in shown
    assert "its disk is full" in shown
    assert north.key.public.fingerprint in shown
    ok("clients", "remove", "north", "--why", "left")
    found = json.loads(ok("clients", "show", "north", "--json"))
    assert [word["status"] for word in found["history"]] == [
        "removed",
        "enabled",
        "enabled",
        "disabled",
        "enabled",
    ]
    assert found["history"][0]["why"] == "left"
    assert json.loads(ok("clients", "list", "--json")) == []


def test_an_expired_key_is_shown_as_such(ok, ledger, site, file, monkeypatch):
    ok("clients", "add", "--join", file(site().join()), "--expires", 1)
    monkeypatch.setattr("orchestrator.node_views.now", lambda: now() + timedelta(days=2))
    assert "north (expired)" in ok("clients", "list")


def test_from_here_nobody_raises_a_site_s_budget_or_says_where_its_data_are(
    ok, weft, ledger, site, file
):
    ok("clients", "add", "--join", file(site().join()))
    for command in (("clients", "budget", "north"), ("privacy", "budget", "north")):
        code, _, told = weft(*command, "--epsilon", 9, "--delta", "1e-3")
        assert (code, "from here that can only be lowered" in told) == (2, True)
    ok("clients", "budget", "north", "--epsilon", 4, "--delta", "1e-3")
    assert ledger.budget("north") == (4.0, 1e-3)
    code, _, told = weft("clients", "add", "north", "--data", "jsonl:/etc/passwd", "--no-check")
    assert (code, "is registered already" in told) == (2, True)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("north",), "--join FILE describes its data itself"),
        (("--data", "jsonl:/x"), "--join FILE describes its data itself"),
        (("--epsilon", 9), "--join FILE describes its data itself"),
        (("--public",), "--join FILE describes its data itself"),
        (("--examples", 9), "--join FILE describes its data itself"),
    ],
)
def test_a_join_file_says_itself_what_there_is(weft, site, file, more, why):
    code, _, told = weft("clients", "add", "--join", file(site().join()), *more)
    assert (code, why in told) == (2, True)


def test_what_goes_with_a_join_file_goes_with_nothing_else(weft):
    for more in (("--pending",), ("--expires", 3), ("--fingerprint", "SHA256:x")):
        code, _, told = weft("clients", "add", "a", "--data", "jsonl:/x", *more)
        assert (code, "go with --join FILE" in told) == (2, True)


def test_a_file_that_is_no_join_file_is_one_line(weft, file, tmp_path):
    code, _, told = weft("clients", "add", "--join", file(b"{}"))
    assert (code, told.count("\n")) == (2, 1)
    code, _, told = weft("clients", "add", "--join", tmp_path / "none.json")
    assert (code, "none.json" in told) == (2, True)
