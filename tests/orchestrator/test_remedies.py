"""What does not pass a gate may pass it merged with the version there is."""

import json

import pytest

from clients.assignment import DataSpec
from orchestrator import deploying, remedies, service
from orchestrator.gate_file import parse_gate
from orchestrator.gate_setting import set_gate
from orchestrator.merging import split_head
from orchestrator.remedies import promote_or_remedy
from storage.aliases import YankedVersion
from storage.refs import UnknownVersion
from tests.orchestrator.conftest import LABELS_OF

BOT = ("bot", "production")
MERGED = ("cat", "svd", "magmax")


@pytest.fixture
def held(notes):
    return notes("held", labels=LABELS_OF["classification"])


@pytest.fixture
def loss(workspace, held):
    return lambda ref: service.evaluate(workspace, ref, DataSpec(held)).metrics["loss"]


@pytest.fixture
def gate(workspace, held):
    """Returns a function that asks for a loss on the held-back data."""

    def give(at_most, **more):
        asked = {"metrics": {"mail": {"loss": {"at_most": at_most}}}, **more}
        document = {"suite": {"mail": held}, "aliases": {"production": asked}}
        set_gate(workspace, "bot", parse_gate(document), "ada")

    return give


@pytest.fixture
def bot(workspace, publish, monkeypatch):
    """bot:v1 in production, and bot:v2 with a head that is wrong and sure of it.

    The loss is convex in the head, so that of their mean is below the mean of theirs.
    """
    monkeypatch.setattr(remedies.MERGES, "names", lambda: MERGED)
    first = publish("bot", kind="classification")
    service.promote(workspace, *BOT, first)
    store = workspace.store
    own, head = split_head(store.tensors(first))
    sure = {key: -10 * value for key, value in head.items()}
    second = store.commit({**own, **sure}, parents={}, recipe=store.version(first).recipe)
    store.name("bot", second)
    return first, second


def test_the_best_merge_that_passes_is_promoted_as_a_new_version(
    workspace, bot, gate, loss, ok, read
):
    losses = [loss(ref) for ref in bot]
    assert losses[1] > losses[0]  # the later one is the worse one
    gate(at_most=sum(losses) / 2)

    told = ok("promote", "bot:v2", "--to", "production", "--remedy")

    (move, _) = read("alias", "log", "bot@production")
    merged = workspace.store.version("bot@production")
    assert merged.names == ("bot:v3",)
    assert [(p.kind, p.id) for p in merged.parents] == sorted(("merge", one) for one in bot)
    assert loss(merged.id) <= sum(losses) / 2
    assert move["evidence"]["passed"]
    assert move["evidence"]["version"] == merged.id
    tried = move["evidence"]["tried"]
    assert {one["what"].split()[2].rstrip(",") for one in tried} == set(MERGED)
    assert any(one["passed"] for one in tried)
    assert f"tried {tried[0]['what']}: " in told


def test_where_no_merge_passes_nothing_is_left(workspace, bot, gate, weft):
    gate(at_most=0.0)
    before = len(workspace.store.versions())
    code, told, _ = weft("promote", "bot:v2", "--to", "production", "--remedy", "--json")
    found = json.loads(told)

    assert (code, found["moved"], found["version"]) == (1, False, bot[1])
    *merged, replayed = found["tried"]
    assert len(merged) == 2 * len(MERGED)
    assert all(one["said"].startswith("fails: metrics: mail loss is") for one in merged)
    assert replayed["said"].startswith("cannot be: no run here made the version")
    assert len(workspace.store.versions()) == before
    assert workspace.store.pointing(*BOT) == bot[0]


def test_a_merge_that_passes_the_suite_must_pass_the_rest_too(workspace, bot, gate):
    gate(at_most=100.0, size={"max_rank": 1})
    with pytest.raises(deploying.GateFailed) as refused:
        promote_or_remedy(workspace, BOT, "bot:v2", deploying.Intent(), ("merge",))
    assert all("must be at most 1" in one["said"] for one in refused.value.tried)
    assert workspace.store.pointing(*BOT) == bot[0]


def test_what_passes_needs_no_remedy(workspace, bot, gate):
    gate(at_most=100.0)
    move = promote_or_remedy(workspace, BOT, "bot:v2", deploying.Intent())
    assert (move.version, "tried" in move.evidence) == (bot[1], False)


def test_a_merge_that_cannot_be_is_said_to_be_none(workspace, bot, gate, monkeypatch):
    monkeypatch.setattr(remedies.MERGES, "names", lambda: ("layer-wise",))
    gate(at_most=0.0)
    with pytest.raises(deploying.GateFailed) as refused:
        promote_or_remedy(workspace, BOT, "bot:v2", deploying.Intent(), ("merge",))
    (tried,) = refused.value.tried
    assert tried["said"].startswith("cannot be: ")


def test_what_was_taken_out_of_use_is_merged_into_nothing(workspace, bot, gate):
    gate(at_most=0.0)
    service.yank(workspace, bot[1], "it holds what people never agreed to")
    with pytest.raises(YankedVersion, match="never agreed to"):
        promote_or_remedy(workspace, BOT, "bot:v2", deploying.Intent())

    service.yank(workspace, bot[1], "", undo=True)
    service.yank(workspace, bot[0], "it swears")
    with pytest.raises(deploying.GateFailed) as refused:
        promote_or_remedy(workspace, BOT, "bot:v2", deploying.Intent(), ("merge",))
    assert [one["said"] for one in refused.value.tried] == [
        "cannot be: the version there is now is yanked (it swears)"
    ]


def test_another_name_s_version_is_no_remedy(workspace, bot, gate, publish):
    gate(at_most=100.0)
    publish("cat", seed=7, kind="classification")
    with pytest.raises(UnknownVersion, match="is not a version of 'bot'"):
        promote_or_remedy(workspace, BOT, "cat:v1", deploying.Intent())


def test_a_gate_is_forced_or_remedied(refused):
    said = refused("promote", "bot:v2", "--to", "production", "--remedy", "--force")
    assert "--remedy tries to pass the gate, --force does not" in said
