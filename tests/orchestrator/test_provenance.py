"""Lineages both ways, and which part of them is wanted."""

import pytest

from orchestrator import service
from orchestrator.provenance import BadSelection, Selection, leaves_of
from storage.store import UnknownContributor


@pytest.fixture
def family(grow):
    """start -> north -> south (rounds), start -> other; south and other -> bot -> next.

    Returns:
        Ids by name.
    """
    return {
        "start": grow("start"),
        "north": grow("north", [("start", "init")], clients=["n"]),
        "south": grow("south", [("north", "round")], clients=["n", "s"]),
        "other": grow("other", [("start", "init")], clients=["o"], private=False),
        "bot": grow("bot", [("south", "merge"), ("other", "merge")], kind="merge"),
        "next": grow("next", [("bot", "continue")], clients=["z"]),
    }


def names(found):
    return {name.partition(":")[0] for v in found.lineage.nodes.values() for name in v.names}


def ask(workspace, ref, **wanted):
    return names(service.lineage(workspace, ref, Selection(**wanted)))


def test_a_lineage_goes_down_to_the_leaves(workspace, family):
    found = service.lineage(workspace, "bot")
    assert names(found) == {"bot", "south", "other", "north", "start"}
    leaves = {(leaf.client, leaf.version): leaf for leaf in found.leaves}
    assert set(leaves) == {
        ("n", family["north"]),
        ("n", family["south"]),
        ("s", family["south"]),
        ("o", family["other"]),
    }
    private, plain = leaves["s", family["south"]], leaves["o", family["other"]]
    assert (private.clipped, plain.clipped) == (0.5, None)
    assert private.digest == workspace.store.version("south").recipe["updates"][1]["digest"]
    assert (private.weight, private.fingerprint[:8]) == (1.0, b"data of s".hex()[:8])


def test_epsilon_is_of_the_whole_history_by_population_and_by_data(workspace, family):
    whole = service.lineage(workspace, "bot")
    part = service.lineage(workspace, "bot", Selection(depth=0))
    early = service.lineage(workspace, "north")
    assert part.epsilons == whole.epsilons
    assert [e.population for e in whole.epsilons] == ["people-n", "people-s"]
    assert sorted(client for client, _ in whole.by_data) == ["n", "s"]
    spent = {client: e.epsilon for (client, _), e in whole.by_data.items()}
    assert spent["n"] > spent["s"] == early.epsilons[0].epsilon  # n took part twice


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, {"bot", "south", "other", "north", "start"}),
        ({"depth": 0}, {"bot"}),
        ({"depth": 1}, {"bot", "south", "other"}),
        ({"kinds": ("merge",)}, {"bot", "south", "other"}),
        ({"kinds": ("merge", "init")}, {"bot", "south", "other", "start"}),
        ({"client": "n"}, {"bot", "south", "north"}),
        ({"client": "o"}, {"bot", "other"}),
        ({"client": "n", "depth": 1}, {"bot", "south"}),
    ],
)
def test_a_lineage_is_narrowed(workspace, family, wanted, expected):
    assert ask(workspace, "bot", **wanted) == expected


def test_only_the_leaves_of_a_client_are_left(workspace, family):
    found = service.lineage(workspace, "bot", Selection(client="n"))
    assert {leaf.client for leaf in found.leaves} == {"n"}
    assert len(found.leaves) == 2


def test_a_lineage_is_narrowed_to_a_run(workspace, family):
    ledger = workspace.ledger
    ledger.create_run("r1", "south", {}, {})
    ledger.record("r1", "started", {"version": family["north"]})
    ledger.record("r1", "committed", {"version": family["south"]}, version=family["south"])
    assert ask(workspace, "bot", run="r1") == {"bot", "south", "north"}
    assert ask(workspace, "bot", run="r1", client="s") == {"bot", "south"}
    with pytest.raises(BadSelection, match="run r1 made no version in the lineage of"):
        ask(workspace, "other", run="r1")


def test_every_edge_that_is_left_is_between_versions_that_are(workspace, family):
    for wanted in ({}, {"depth": 1}, {"client": "n"}, {"kinds": ("merge",)}):
        found = service.lineage(workspace, "bot", Selection(**wanted)).lineage
        assert {end for e in found.edges for end in e[:2]} | {found.root} == set(found.nodes)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"kinds": ("mother",)}, "an edge is one of init, round, .*; got 'mother'"),
        ({"client": "nn"}, "no update of 'nn' is in the lineage of .*; did you mean 'n'?"),
        ({"client": "n", "kinds": ("init",)}, "meets all of --kind, --depth, --client"),
        ({"client": "n", "depth": 0}, "leave one out"),
    ],
)
def test_a_selection_of_nothing_is_refused(workspace, family, wanted, message):
    with pytest.raises(BadSelection, match=message):
        ask(workspace, "bot", **wanted)


def test_descendants_say_where_they_are_deployed(workspace, family):
    service.promote(workspace, "bot", "production", "bot")
    found = service.descendants(workspace, "north")
    assert names(found) == {"north", "south", "bot", "next"}
    deployed = {a: id for id, v in found.lineage.nodes.items() for a in v.aliases}
    assert deployed == {"bot@production": family["bot"]}
    assert found.epsilons == ()
    assert names(service.descendants(workspace, "north", Selection(depth=1))) == {"north", "south"}
    only = service.descendants(workspace, "start", Selection(client="o"))
    assert names(only) == {"start", "other"}


# ---- where a client's contribution is in use


def test_deployed_versions_that_contain_a_client_are_found(workspace, family):
    service.promote(workspace, "bot", "production", "bot")
    service.promote(workspace, "bot", "candidate", "bot")
    service.promote(workspace, "other", "production", "other")
    found = service.deployed_with(workspace, "n")
    assert [(d.pointer, d.version) for d in found] == [
        ("bot@candidate", family["bot"]),
        ("bot@production", family["bot"]),
    ]
    assert [d.pointer for d in service.deployed_with(workspace, "o")][-1] == "other@production"
    assert service.deployed_with(workspace, "z") == []


def test_an_alias_that_moved_on_is_not_deployed(workspace, family, grow):
    service.promote(workspace, "bot", "production", "bot")
    grow("bot", kind="merge")
    service.promote(workspace, "bot", "production", "bot:v2")
    assert service.deployed_with(workspace, "n") == []


def test_a_client_that_never_took_part_is_refused(workspace, family):
    with pytest.raises(UnknownContributor, match="no version was made with an update of 'x'"):
        service.deployed_with(workspace, "x")


def test_leaves_of_older_recipes_have_no_base(workspace, grow):
    recipe = workspace.store.version(grow("old", clients=["a"])).recipe
    [leaf] = recipe["updates"]
    old = {k: v for k, v in leaf.items() if k not in ("base", "weight")}
    grow("older", updates=[old])
    [found] = leaves_of(workspace.store.version("older"))
    assert (found.base, found.weight) == ("", 1.0)
