import pytest
import torch

from storage.store import AmbiguousRef, UnknownVersion


def commit(store, number, clients=(), name=None):
    recipe = {"n": number, "updates": [{"client": client} for client in clients]}
    version = store.commit({"x": torch.tensor([float(number)])}, parents={}, recipe=recipe)
    if name is not None:
        store.name(name, version)
    return version


def test_names_that_begin_alike_are_found_in_the_order_of_their_bytes(store):
    for number, name in enumerate(["bot_b", "bot.a", "bota", "bot", "bo", "bot-z", "zebra"]):
        commit(store, number, name=name)
    found = [row.name for row in store.names("bot")]
    assert found == ["bot", "bot-z", "bot.a", "bot_b", "bota"]
    assert [row.name for row in store.names()] == ["bo", *found, "zebra"]
    assert store.names("nothing") == []


def test_names_come_in_pages(store):
    given = sorted(f"team-{n}" for n in range(7))
    for number, name in enumerate(given):
        commit(store, number, name=name)
    seen, after = [], ""
    while page := store.names("team", after=after, limit=3):
        assert len(page) <= 3
        seen += [row.name for row in page]
        after = seen[-1]
    assert seen == given


def test_versions_are_found_by_whose_updates_they_hold(store):
    a = commit(store, 1, ["north", "south"], "x")
    b = commit(store, 2, ["south"], "y")
    c = commit(store, 3, ["south"], "x")
    commit(store, 4, (), "x")
    assert [v.id for v in store.versions(client="south")] == [c, b, a]
    assert [v.id for v in store.versions(client="north")] == [a]
    assert [v.id for v in store.versions(client="south", name="x")] == [c, a]
    assert [v.id for v in store.versions(client="south", before=c, limit=1)] == [b]
    assert [v.id for v in store.versions(client="south", name="x", before="x:v2")] == [a]
    assert store.versions(client="west") == []


def test_versions_of_a_name_come_in_pages(store):
    a, b, c = (commit(store, n) for n in range(3))
    for version in (a, b, a, c, a):
        store.name("x", version)
    assert [v.id for v in store.versions(name="x", before=a)] == [c, b]
    assert [v.id for v in store.versions(name="x", before=b)] == []
    with pytest.raises(UnknownVersion):
        store.versions(before="nothing")


def test_a_retried_commit_is_found_once(store):
    assert commit(store, 1, ["north", "north"]) == commit(store, 1, ["north", "north"])
    assert len(store.versions(client="north")) == 1


def test_candidates_of_a_prefix_are_listed_with_their_names(store):
    by_start = {}
    for number in range(2000):  # some two begin alike
        version = store.commit({}, parents={}, recipe={"n": number})
        twin = by_start.setdefault(version[:4], version)
        if twin != version:
            break
    store.name("bot", twin)
    with pytest.raises(AmbiguousRef) as caught:
        store.resolve(version[:4])
    assert f"{twin[:16]} (bot:v1)" in str(caught.value)
    assert version[:16] in str(caught.value)
