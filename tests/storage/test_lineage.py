import time
from datetime import UTC, datetime

import pytest
import torch

from storage import schema
from storage.database import writing
from storage.lineage import Edge, Parent, VersionCorrupt, load_versions, version_id
from storage.store import AdapterStore, UnknownVersion


def commit(store: AdapterStore, label: str, **parents: str) -> str:
    given = {store.resolve(ref): kind for ref, kind in parents.items()}
    version = store.commit({"x": torch.ones(1)}, parents=given, recipe={"label": label})
    store.name(label, version)
    return version


@pytest.fixture
def diamond(store):
    """base -> one, two (a second step each) -> merged, from which released is made."""
    commit(store, "base")
    commit(store, "one", base="init")
    commit(store, "two", base="init")
    commit(store, "two2", two="round")
    commit(store, "merged", one="merge", two2="merge")
    commit(store, "released", merged="continue")
    return store


def labels(lineage):
    return [node.recipe["label"] for node in lineage.nodes.values()]


def test_lineage_of_a_merge_meets_its_shared_ancestor_once(diamond):
    lineage = diamond.lineage("merged")
    assert lineage.root == diamond.resolve("merged")
    assert sorted(labels(lineage)) == ["base", "merged", "one", "two", "two2"]
    known = {label: diamond.resolve(label) for label in labels(lineage)}
    assert sorted(lineage.edges) == sorted(
        [
            Edge(known["merged"], known["one"], "merge"),
            Edge(known["merged"], known["two2"], "merge"),
            Edge(known["two2"], known["two"], "round"),
            Edge(known["two"], known["base"], "init"),
            Edge(known["one"], known["base"], "init"),
        ]
    )


def test_children_come_before_their_parents(diamond):
    for lineage in (diamond.lineage("released"), diamond.descendants("base")):
        order = list(lineage.nodes)
        assert len(lineage.edges) == 6
        for child, parent, _ in lineage.edges:
            assert order.index(child) < order.index(parent)


@pytest.mark.parametrize(
    ("depth", "expected", "num_edges"),
    [
        (0, {"merged"}, 0),
        (1, {"merged", "one", "two2"}, 2),
        (2, {"merged", "one", "two2", "two", "base"}, 5),
        (9, {"merged", "one", "two2", "two", "base"}, 5),
    ],
)
def test_depth_limits_the_steps(diamond, depth, expected, num_edges):
    lineage = diamond.lineage("merged", depth=depth)
    assert set(labels(lineage)) == expected
    assert len(lineage.edges) == num_edges


def test_nodes_at_the_edge_of_the_depth_still_know_their_parents(diamond):
    lineage = diamond.lineage("merged", depth=1)
    two2 = lineage.nodes[diamond.resolve("two2")]
    assert two2.parents == (Parent(diamond.resolve("two"), "round"),)
    assert two2.names == ("two2:v1",)


def test_a_first_version_is_its_own_lineage(diamond):
    lineage = diamond.lineage("base")
    assert labels(lineage) == ["base"]
    assert lineage.edges == []


def test_descendants_are_all_that_came_of_a_version(diamond):
    assert sorted(labels(diamond.descendants("two"))) == ["merged", "released", "two", "two2"]
    assert labels(diamond.descendants("released")) == ["released"]


def test_lineage_of_an_unknown_version_is_refused(diamond):
    with pytest.raises(UnknownVersion):
        diamond.lineage("nothing")


def test_one_parent_may_count_in_two_ways(store):
    base = store.commit({"x": torch.ones(1)}, parents={}, recipe={})
    both = [Parent(base, "stack"), Parent(base, "merge")]
    child = store.commit({"x": torch.ones(1)}, parents=both, recipe={"label": "child"})
    assert store.lineage(child).edges == [
        Edge(child, base, "merge"),
        Edge(child, base, "stack"),
    ]


def insert_graph(engine, parents_of):
    """Insert versions 0, 1, ... with these parents, faster than by committing; return their ids."""
    ids, rows, edges = [], [], []
    for number, parents in enumerate(parents_of):
        lineage = sorted(Parent(ids[parent], "round") for parent in parents)
        ids.append(version_id("t", None, None, lineage, {"n": number}))
        rows.append(
            {
                "number": number,
                "id": ids[-1],
                "tensors": "t",
                "recipe": f'{{"n":{number}}}',
                "created_at": datetime.now(UTC),
            }
        )
        edges += [{"child": number, "parent": ids.index(p.id), "kind": p.kind} for p in lineage]
    with writing(engine) as connection:
        connection.execute(schema.versions.insert(), rows)
        connection.execute(schema.parents.insert(), edges)
    return ids


def test_a_chain_of_two_thousand_rounds_is_walked_quickly(store, engine):
    ids = insert_graph(engine, [[n - 1] if n else [] for n in range(2000)])
    started = time.process_time()
    lineage = store.lineage(ids[-1])
    seconds = time.process_time() - started
    assert list(lineage.nodes) == ids[::-1]
    assert len(lineage.edges) == 1999
    assert len(store.descendants(ids[0]).nodes) == 2000
    assert len(store.lineage(ids[-1], depth=10).nodes) == 11
    assert seconds < 5


def test_a_ladder_of_merges_is_not_walked_path_by_path(store, engine):
    # each version merges the two before it: the number of paths is a Fibonacci number
    ids = insert_graph(engine, [[n - 1, n - 2] if n > 1 else [n - 1] * n for n in range(200)])
    assert len(store.lineage(ids[-1]).nodes) == 200
    assert len(store.lineage(ids[-1], depth=150).nodes) == 200


def test_a_version_that_is_listed_and_has_no_row_is_refused(engine):
    with (
        engine.connect() as connection,
        pytest.raises(VersionCorrupt, match="version 000000000000 is listed and has no row"),
    ):
        load_versions(connection, ["0" * 64])
