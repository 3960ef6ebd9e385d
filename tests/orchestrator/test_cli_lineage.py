"""``weft lineage``: both ways, narrowed, and in every form."""

import pytest

from orchestrator import service


@pytest.fixture
def family(workspace, grow):
    """start -> task (north, south) -> bot, deployed."""
    grow("start")
    task = grow("task", [("start", "init")], clients=["north", "south"])
    bot = grow("bot", [("task", "merge")], kind="merge", merge={"name": "cat"})
    service.promote(workspace, "bot", "production", "bot")
    return {"task": task, "bot": bot}


def test_a_lineage_is_read_as_json(read, family):
    found = read("lineage", "bot@production")
    assert found["root"] == family["bot"]
    assert [leaf["client"] for leaf in found["leaves"]] == ["north", "south"]
    assert {leaf["clipped"] for leaf in found["leaves"]} == {0.5}
    assert found["bases"] == [{"id": "some-model", "revision": "main", "hash": "ab" * 32}]
    assert found["deployed"] == {"bot@production": family["bot"]}
    assert [e["population"] for e in found["epsilon"]] == ["people-north", "people-south"]
    assert [e["client"] for e in found["epsilon_by_data"]] == ["north", "south"]
    one = read("lineage", "bot", "--client", "north")
    assert [leaf["client"] for leaf in one["leaves"]] == ["north"]
    assert one["epsilon"] == found["epsilon"]
    shallow = read("lineage", "bot", "--depth", "1", "--kind", "merge")
    assert list(shallow["edges"]) == [
        {"child": family["bot"], "parent": family["task"], "kind": "merge"}
    ]


def test_a_lineage_is_drawn_in_every_form(ok, family):
    tree = ok("lineage", "bot")
    assert "merge ← " in tree
    assert "clipped to 0.5" in tree
    assert "base some-model@main abababababab" in tree
    assert ok("lineage", "bot", "--format", "mermaid").startswith("flowchart LR\n")
    assert ok("lineage", "bot", "--format", "dot").startswith("digraph lineage {\n")
    down = ok("lineage", "start", "--descendants")
    assert "init → " in down
    assert "bot@production" in down


def test_where_a_client_s_contribution_is_deployed_is_one_command(ok, read, family):
    [found] = read("lineage", "--contains-client", "north")
    assert found == {"alias": "bot@production", "version": family["bot"]}
    assert "bot@production" in ok("lineage", "--contains-client", "north")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "a lineage is of a version: give its REF, or --contains-client"),
        (("--contains-client", "nobody"), "no version was made with an update of 'nobody'"),
        (("bot", "--kind", "mother"), "an edge is one of init"),
        (("bot", "--client", "nort"), "did you mean 'north'?"),
        (("bot", "--run", "nothing"), "nothing"),
    ],
)
def test_a_lineage_that_is_not_there_is_refused(refused, family, argv, message):
    assert message in refused("lineage", *argv)
