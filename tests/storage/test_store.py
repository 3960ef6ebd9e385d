import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import torch
from sqlalchemy import event, text

from storage.blobs import BlobCorrupt, BlobMissing
from storage.canonical import NotJson
from storage.database import writing
from storage.lineage import VersionCorrupt
from storage.store import (
    AdapterStore,
    AmbiguousRef,
    BadMetric,
    BadName,
    BadParents,
    NameRow,
    Parent,
    UnknownVersion,
)

RECIPE = {"strategy": "fedsvd", "round": 1, "updates": [{"client": "clinic-7", "digest": "ab"}]}


def adapter(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"q.lora_A.weight": torch.full((2, 3), value), "q.scaling": torch.tensor(2.0)}


def commit(store: AdapterStore, value: float = 1.0, parents=(), **recipe) -> str:
    return store.commit(adapter(value), parents=parents, recipe=RECIPE | recipe)


# ---- commit


def test_what_is_committed_comes_back(store):
    auxiliary, memory = {"momentum": torch.ones(2)}, {"ewc/fisher": torch.zeros(3)}
    root = commit(store, 0)
    version = store.commit(
        adapter(), auxiliary=auxiliary, memory=memory, parents={root: "round"}, recipe=RECIPE
    )
    assert torch.equal(store.tensors(version)["q.lora_A.weight"], torch.ones(2, 3))
    assert torch.equal(store.auxiliary(version)["momentum"], torch.ones(2))
    assert torch.equal(store.memory(version)["ewc/fisher"], torch.zeros(3))
    record = store.version(version)
    assert record.id == version
    assert record.recipe == RECIPE
    assert record.parents == (Parent(root, "round"),)
    assert abs(record.created_at - datetime.now(UTC)) < timedelta(minutes=5)


def test_absent_parts_are_empty(store):
    version = commit(store)
    assert store.auxiliary(version) == {}
    assert store.memory(version) == {}
    assert store.version(version).auxiliary is None


def test_id_is_the_hash_that_the_design_says(store, blobs):
    root = commit(store, 0)
    version = store.commit(
        adapter(), memory={"m": torch.ones(1)}, parents={root: "round"}, recipe={"b": "ε", "a": 1}
    )
    document = [
        blobs.digest(adapter()),
        None,
        blobs.digest({"m": torch.ones(1)}),
        [[root, "round"]],
        {"a": 1, "b": "ε"},
    ]
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert version == hashlib.sha256(canonical.encode()).hexdigest()


def test_the_same_content_is_one_version(store):
    assert commit(store) == commit(store)
    assert len(store.versions()) == 1


def test_every_part_but_the_metrics_is_in_the_id(store):
    a, b = commit(store, 10), commit(store, 11)
    ones = {"x": torch.ones(1)}
    variants = [
        {"parents": {}, "recipe": RECIPE},
        {"parents": {}, "recipe": RECIPE | {"seed": 1}},
        {"parents": {a: "round"}, "recipe": RECIPE},
        {"parents": {b: "round"}, "recipe": RECIPE},
        {"parents": {a: "continue"}, "recipe": RECIPE},
        {"parents": {a: "merge", b: "merge"}, "recipe": RECIPE},
        {"parents": {}, "recipe": RECIPE, "auxiliary": ones},
        {"parents": {}, "recipe": RECIPE, "memory": ones},
    ]
    ids = [store.commit(adapter(), **variant) for variant in variants]
    ids.append(commit(store, 2.0))
    assert len(set(ids)) == len(variants) + 1
    assert store.commit(adapter(), **variants[0], metrics={"loss": 1.0}) == ids[0]


def test_order_of_parents_and_recipe_keys_is_not_in_the_id(store):
    a, b = commit(store, 10), commit(store, 11)
    forth = commit(store, 1, {a: "merge", b: "stack"}, x=1, y=2)
    back = commit(store, 1, [Parent(b, "stack"), Parent(a, "merge")], y=2, x=1)
    assert forth == back


def test_empty_auxiliary_counts_as_none(store):
    empty = store.commit(adapter(), auxiliary={}, memory={}, parents={}, recipe=RECIPE)
    assert empty == commit(store)


def test_equal_tensors_are_stored_once(store, tmp_path):
    commit(store, seed=1)
    commit(store, seed=2)
    assert len([p for p in (tmp_path / "blobs").rglob("*") if p.is_file()]) == 1


def test_metrics_are_kept_and_added_to(store):
    version = store.commit(adapter(), parents={}, recipe=RECIPE, metrics={"loss": 0.5})
    store.commit(adapter(), parents={}, recipe=RECIPE, metrics={"accuracy": 0.75})
    store.record_metrics(version[:8], {"loss": 0.25, "f1": 1})
    assert store.version(version).metrics == {"accuracy": 0.75, "f1": 1.0, "loss": 0.25}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_that_are_not_finite_are_refused(store, value):
    with pytest.raises(BadMetric, match="metric 'loss' must be a finite number"):
        store.commit(adapter(), parents={}, recipe=RECIPE, metrics={"loss": value})
    assert store.versions() == []


def test_an_unknown_parent_is_refused_before_anything_is_written(store, tmp_path):
    with pytest.raises(UnknownVersion, match=f"no version has the id '{'0' * 64}'"):
        commit(store, 1, {"0" * 64: "round"})
    assert not (tmp_path / "blobs").exists()


def test_an_unknown_kind_of_parent_is_refused(store):
    root = commit(store, 0)
    with pytest.raises(
        BadParents, match=r"init, round, continue, stack, offset, merge.*got 'mother'"
    ):
        commit(store, 1, {root: "mother"})


def test_a_recipe_that_is_not_json_is_refused(store):
    with pytest.raises(NotJson, match=r"recipe\.rank must be JSON"):
        commit(store, rank=torch.tensor(3))


def test_tensors_that_are_not_finite_never_enter_a_version(store):
    with pytest.raises(ValueError, match=r"'q\.lora_A\.weight' has 6 of 6 values"):
        commit(store, float("nan"))
    assert store.versions() == []


def test_commit_after_a_crash_between_blobs_and_row_works(store, blobs):
    blobs.put(adapter())  # as far as the crashed process came
    assert store.versions() == []
    version = commit(store)
    assert store.version(version).tensors == blobs.digest(adapter())


def test_a_commit_that_fails_half_way_leaves_no_version(store, engine):
    root = commit(store, 0)

    def break_down(connection, cursor, statement, *rest):
        if "INTO version_parents" in statement:
            raise ConnectionError("the machine is gone")

    event.listen(engine, "before_cursor_execute", break_down)
    with pytest.raises(ConnectionError):
        commit(store, 1, {root: "round"})
    event.remove(engine, "before_cursor_execute", break_down)
    assert [v.id for v in store.versions()] == [root]
    version = commit(store, 1, {root: "round"})
    assert store.version(version).parents == (Parent(root, "round"),)


def test_threads_that_commit_the_same_content_agree(store):
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: commit(store), range(16)))
    assert [v.id for v in store.versions()] == list(ids)


def test_a_row_changed_behind_the_stores_back_is_found(store, engine):
    version = commit(store)
    with writing(engine) as connection:
        connection.execute(text('UPDATE versions SET recipe = \'{"strategy":"fedavg"}\''))
    for read in (store.version, store.tensors, store.auxiliary, store.memory):
        with pytest.raises(VersionCorrupt, match=f"version {version[:12]} does not hash to its id"):
            read(version)


def test_corrupt_and_missing_tensors_are_found(store, tmp_path):
    version = commit(store)
    (path,) = (p for p in (tmp_path / "blobs").rglob("*") if p.is_file())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BlobCorrupt):
        store.tensors(version)
    path.unlink()
    with pytest.raises(BlobMissing):
        store.tensors(version)


# ---- names, aliases, listings


def test_names_count_from_one(store):
    a, b = commit(store, 1), commit(store, 2)
    assert [store.name("task-1", a), store.name("task-1", b)] == ["task-1:v1", "task-1:v2"]
    assert store.version(b).names == ("task-1:v2",)


def test_naming_the_newest_again_changes_nothing(store):
    a, b = commit(store, 1), commit(store, 2)
    assert [store.name("x", a), store.name("x", a)] == ["x:v1", "x:v1"]
    assert [store.name("x", b), store.name("x", a)] == ["x:v2", "x:v3"]
    assert store.version(a).names == ("x:v1", "x:v3")


def test_threads_that_name_at_once_lose_nothing_and_leave_no_gap(store):
    ids = [commit(store, value) for value in range(24)]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda version: store.name("busy", version), ids))
    assert sorted(given) == sorted(f"busy:v{n}" for n in range(1, 25))
    assert {store.resolve(name): name for name in given} == dict(zip(ids, given, strict=True))


@pytest.mark.parametrize(
    "name", ["", "Task", "a:b", "a@b", "-a", "a b", "deadbeef", "0123456789", "a" * 129, "ε"]
)
def test_names_that_could_be_something_else_are_refused(store, name):
    version = commit(store)
    with pytest.raises(BadName, match="must be 1 to 128 of"):
        store.name(name, version)
    with pytest.raises(BadName, match="must be 1 to 128 of"):
        store.promote("x", name, version, who="me", why="")


def test_an_alias_moves_and_its_history_stays(store):
    a, b = commit(store, 1), commit(store, 2)
    store.name("bot", a)
    store.name("bot", b)
    store.promote("bot", "production", "bot:v1", who="ann", why="first")
    store.promote("bot", "production", "bot", who="bob", why="better")
    store.promote("bot", "staging", "bot", who="bob", why="")
    assert store.resolve("bot@production") == b
    assert store.version(a).aliases == ()
    assert store.version(b).aliases == ("bot@production", "bot@staging")
    history = store.promotions("bot", "production")
    assert [(p.version, p.who, p.why) for p in history] == [
        (b, "bob", "better"),
        (a, "ann", "first"),
    ]


def test_threads_that_promote_at_once_lose_no_history(store):
    ids = [commit(store, value) for value in range(8)]
    for version in ids:
        store.name("bot", version)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda v: store.promote("bot", "live", v, who=v[:4], why=""), ids))
    history = [promotion.version for promotion in store.promotions("bot", "live")]
    assert sorted(history) == sorted(ids)
    assert store.resolve("bot@live") == history[0]


def test_an_alias_points_only_at_a_version_of_its_name(store):
    a, b = commit(store, 1), commit(store, 2)
    store.name("bot", a)
    with pytest.raises(UnknownVersion, match=f"{b[:12]} is not a version of 'bot'"):
        store.promote("bot", "production", b, who="me", why="")


def test_names_lists_each_with_its_newest_and_aliases(store):
    a, b = commit(store, 1), commit(store, 2)
    store.name("zebra", a)
    store.name("ant", a)
    store.name("ant", b)
    store.promote("ant", "live", a, who="me", why="")
    assert store.names() == [NameRow("ant", 2, b, {"live": a}), NameRow("zebra", 1, a, {})]


def test_versions_are_listed_newest_first_in_pages(store):
    ids = [commit(store, value) for value in range(5)]
    assert [v.id for v in store.versions()] == ids[::-1]
    assert [v.id for v in store.versions(before=ids[4], limit=2)] == [ids[3], ids[2]]


def test_versions_of_a_name_are_listed_by_their_numbers(store):
    a, b, c = (commit(store, value) for value in range(3))
    for version in (a, b, a, c, a):
        store.name("x", version)
    assert [v.id for v in store.versions(name="x")] == [a, c, b]
    assert store.versions(name="nothing") == []


# ---- resolve


def test_every_way_to_name_a_version_works(store):
    a, b = commit(store, 1), commit(store, 2)
    store.name("bot", a)
    store.name("bot", b)
    store.promote("bot", "live", a, who="me", why="")
    assert [store.resolve(ref) for ref in (a, a[:4], "bot:v1", "bot@live")] == [a] * 4
    assert store.resolve("bot") == b


def test_a_name_wins_over_a_prefix(store):
    a, b = commit(store, 1), commit(store, 2)
    prefix = a[:4]
    store.name(prefix, b)
    assert store.resolve(prefix) == b
    assert store.resolve(a[:5]) == a


def test_a_prefix_of_several_is_refused_with_the_candidates(store, engine):
    version = commit(store)
    twin = version[:10] + ("0" if version[10] != "0" else "1") * 54
    with writing(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO versions (id, tensors, recipe, created_at) SELECT :twin, tensors, "
                "recipe, created_at FROM versions"
            ),
            {"twin": twin},
        )
    with pytest.raises(AmbiguousRef, match="give more digits") as caught:
        store.resolve(version[:6])
    assert version[:16] in str(caught.value)
    assert twin[:16] in str(caught.value)
    assert store.resolve(version[:11]) == version


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("suport-bot", "no version is called 'suport-bot'; did you mean 'support-bot'?"),
        ("support-bot:v9", "'support-bot' has v1 and support-bot@live"),
        ("support-bot@prod", "'support-bot' has v1 and support-bot@live"),
        ("support-bot:v99999999999999999999", "no version is called"),
        ("support-bot:1", "'support-bot' has v1"),
        ("", "a ref is an id, 4 or more of its first digits, NAME, NAME:vN or NAME@ALIAS"),
        ("abc", "no version is called 'abc' "),
        ("0000", "no version is called '0000' "),
        ("nobody:v1", "no version is called 'nobody:v1' "),
        ("%", "no version is called '%' "),
    ],
)
def test_what_no_version_is_called_is_refused_with_a_hint(store, ref, message):
    version = commit(store)
    assert not version.startswith("0000")
    store.name("support-bot", version)
    store.promote("support-bot", "live", version, who="me", why="")
    with pytest.raises(UnknownVersion) as caught:
        store.resolve(ref)
    assert message in str(caught.value)
