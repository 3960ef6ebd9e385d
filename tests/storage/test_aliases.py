import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.aliases import AliasMove, rollback_target
from storage.store import (
    AliasMoved,
    BadName,
    NoReason,
    NothingToRollBack,
    UnknownVersion,
    YankedVersion,
)

MOMENT = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
def bot(store):
    """Return the ids of bot:v1 to bot:v4."""
    ids = []
    for value in range(4):
        tensors = {"q.lora_A.weight": torch.full((1,), float(value))}
        ids.append(store.commit(tensors, parents={}, recipe={"n": value}))
        store.name("bot", ids[-1])
    return ids


def promote(store, *refs, alias="live"):
    for ref in refs:
        store.promote("bot", alias, ref, who="ann", why="")


def rollback(store, **options):
    return store.rollback("bot", "live", who="bob", why="it swears", **options)


# ---- moves


def test_a_move_says_who_when_from_what_to_what_and_why(store, bot):
    first = store.promote("bot", "live", "bot:v1", who="ann", why="first")
    second = store.promote("bot", "live", "bot:v2", who="bob", why="better")
    third = rollback(store)
    assert store.promotions("bot", "live") == [third, second, first]
    assert [
        (m.number, m.kind, m.before, m.version, m.who, m.why) for m in (first, second, third)
    ] == [
        (1, "promote", None, bot[0], "ann", "first"),
        (2, "promote", bot[0], bot[1], "bob", "better"),
        (3, "rollback", bot[1], bot[0], "bob", "it swears"),
    ]
    assert first.created_at <= second.created_at <= third.created_at


def test_an_alias_moves_only_from_where_its_mover_believes(store, bot):
    promote(store, "bot:v1", "bot:v2")
    message = f"bot@live points at {bot[1][:12]} since ann moved it .* expected to point at"
    with pytest.raises(AliasMoved, match=message):
        store.promote("bot", "live", bot[2], who="bob", why="", expected=bot[0])
    with pytest.raises(AliasMoved, match="expected to point nowhere"):
        store.promote("bot", "live", bot[2], who="bob", why="", expected=None)
    with pytest.raises(AliasMoved, match="points nowhere yet"):
        store.promote("bot", "new", bot[2], who="bob", why="", expected=bot[0])
    with pytest.raises(AliasMoved):
        rollback(store, expected=bot[0])
    assert len(store.promotions("bot", "live")) == 2
    store.promote("bot", "live", bot[2], who="bob", why="", expected=bot[1])
    assert store.pointing("bot", "live") == bot[2]


@pytest.mark.parametrize("first", ["promoted before", "new"])
def test_of_those_who_move_an_alias_at_once_one_wins(store, bot, first):
    if first == "promoted before":
        promote(store, "bot:v4")
    expected = store.pointing("bot", "live")
    start = threading.Barrier(3)

    def move(version):
        start.wait()
        try:
            return store.promote("bot", "live", version, who="x", why="", expected=expected)
        except AliasMoved as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(move, bot[:3]))
    won = [e for e in ended if isinstance(e, AliasMove)]
    assert [m.version for m in won] == [store.pointing("bot", "live")]
    assert [m.version for m in won] == [m.version for m in store.promotions("bot", "live")][:1]
    assert all("decide again" in str(e) for e in ended if e not in won)


# ---- rollback


def test_rolling_back_twice_goes_back_twice(store, bot):
    promote(store, *bot[:3])
    assert rollback(store).version == bot[1]
    assert rollback(store).version == bot[0]
    with pytest.raises(NothingToRollBack, match=r"choose one with --to REF"):
        rollback(store)
    assert store.pointing("bot", "live") == bot[0]


def test_a_rollback_passes_over_what_was_rolled_back_from(store, bot):
    promote(store, *bot[:3])
    rollback(store)
    promote(store, bot[3])
    assert [rollback(store).version for _ in range(2)] == [bot[1], bot[0]]


def test_a_version_that_is_promoted_again_may_be_rolled_back_to(store, bot):
    promote(store, bot[0], bot[1])
    rollback(store)
    promote(store, bot[1], bot[2])
    assert rollback(store).version == bot[1]


def test_a_rollback_goes_where_it_is_told(store, bot):
    promote(store, *bot[:3])
    assert rollback(store, to="bot:v1").version == bot[0]
    with pytest.raises(NothingToRollBack):  # v2 was passed over, and so was rolled back from
        rollback(store)
    with pytest.raises(NothingToRollBack, match=r"points at .* already"):
        rollback(store, to="bot:v1")
    assert rollback(store, to="bot:v3").version == bot[2]


def test_a_rollback_passes_over_yanked_versions(store, bot):
    promote(store, *bot[:3])
    store.yank("bot:v2", who="ann", why="leaks")
    assert rollback(store).version == bot[0]


def test_a_rollback_to_a_yanked_version_or_a_stranger_is_refused(store, bot):
    promote(store, *bot[:3])
    store.yank("bot:v2", who="ann", why="leaks")
    other = store.commit({"x": torch.ones(1)}, parents={}, recipe={})
    with pytest.raises(YankedVersion):
        rollback(store, to="bot:v2")
    with pytest.raises(UnknownVersion, match="is not a version of 'bot'"):
        rollback(store, to=other)


def test_an_alias_that_never_was_cannot_be_rolled_back(store, bot):
    with pytest.raises(UnknownVersion, match="no version is called 'bot@live'"):
        rollback(store)


MOVES = st.lists(st.tuples(st.sampled_from(["promote", "rollback"]), st.sampled_from("abcd")))


@settings(deadline=None)
@given(MOVES, st.sets(st.sampled_from("abcd"), max_size=2))
def test_rolling_back_ends_and_never_meets_a_version_twice(steps, unusable):
    moves = []

    def move(kind, version):
        before = moves[-1].version if moves else None
        moves.append(AliasMove(len(moves) + 1, kind, before, version, "x", "", MOMENT))

    for kind, version in steps:
        if kind == "promote" or (moves and moves[-1].version != version):
            move(kind, version)
    current, met = moves[-1].version if moves else None, []
    while (target := rollback_target(moves, unusable)) is not None:
        move("rollback", target)
        met.append(target)
    assert len(set(met)) == len(met)
    assert current not in met
    assert not unusable & set(met)


# ---- yank


def test_a_bare_name_passes_over_yanked_versions(store, bot):
    store.yank("bot:v4", who="ann", why="leaks")
    assert store.resolve("bot") == bot[2]
    store.yank("bot", who="ann", why="leaks too")
    assert store.resolve("bot") == bot[1]
    assert store.resolve("bot:v4") == bot[3]
    store.unyank("bot:v4", who="ann", why="")
    assert store.resolve("bot") == bot[3]


def test_a_yanked_version_stays_and_says_why(store, bot):
    promote(store, bot[3])
    store.yank("bot@live", who="ann", why="leaks")
    version = store.version("bot:v4")
    assert (version.yanked, version.aliases) == ("leaks", ("bot@live",))
    assert store.version("bot:v1").yanked is None
    assert store.names()[0].newest == bot[3]
    store.unyank("bot:v4", who="bob", why="it does not")
    assert store.version("bot:v4").yanked is None
    assert [(y.yanked, y.who, y.why) for y in store.yanks(bot[3])] == [
        (False, "bob", "it does not"),
        (True, "ann", "leaks"),
    ]


def test_no_alias_may_be_pointed_at_a_yanked_version(store, bot):
    store.yank("bot:v2", who="ann", why="leaks")
    with pytest.raises(YankedVersion, match=r"bot:v2 \(.*\) is yanked \(leaks\)"):
        promote(store, "bot:v2")
    store.unyank("bot:v2", who="ann", why="")
    promote(store, "bot:v2")


def test_a_name_whose_versions_are_all_yanked_means_none(store, bot):
    for version in bot:
        store.yank(version, who="ann", why="leaks")
    with pytest.raises(UnknownVersion, match=r"every version of 'bot' is yanked \(bot:v4: leaks\)"):
        store.resolve("bot")


def test_a_yanked_version_does_not_free_its_number(store, bot):
    store.yank("bot:v4", who="ann", why="leaks")
    assert store.name("bot", bot[3]) == "bot:v4"
    assert store.name("bot", bot[0]) == "bot:v5"


def test_a_yank_without_a_reason_is_refused(store, bot):
    with pytest.raises(NoReason, match="say it with --reason"):
        store.yank("bot", who="ann", why="  ")
    assert store.yanks("bot") == []


def test_threads_that_yank_at_once_lose_nothing(store, bot):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda who: store.yank("bot:v1", who=who, why="bad"), "abcdefgh"))
    assert sorted(y.who for y in store.yanks("bot:v1")) == list("abcdefgh")


def test_hostile_aliases_are_refused(store, bot):
    for alias in ("../x", "a@b", "a:b", "ε", "x" * 10_000, ""):
        with pytest.raises(BadName):
            promote(store, "bot", alias=alias)
