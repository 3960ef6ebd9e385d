"""Who trains what: pure functions, so that resuming is the same as running."""

import json
from dataclasses import replace

import pytest
import torch

from clients.assignment import DataSpec, PluginChoice, Privacy, Shard
from clients.seeds import seed_for
from orchestrator.plan import (
    Plan,
    RoundInputs,
    Start,
    plan_evaluation,
    plan_init,
    plan_round,
    with_head_mask,
)
from orchestrator.sections import EvaluateConfig
from strategies.base import Broadcast

PRIVACY = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1)


@pytest.fixture
def inputs():
    return RoundInputs(3, "f" * 64, underlay={}, memory={}, site="/site")


def test_a_seed_is_stable_across_releases():
    assert seed_for(0, 3, "clinic-7") == 551739265236224645


def test_a_seed_depends_on_every_part_its_place_and_its_type():
    parts = [(0, 3, "a"), (1, 3, "a"), (0, 4, "a"), (0, 3, "b"), (3, 0, "a"), (0, "3", "a"), (0, 3)]
    parts += [("ab", "c"), ("a", "bc")]

    seeds = {seed_for(*p) for p in parts}

    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_clients_that_are_alike_get_one_broadcast_object(make_plan, inputs, tensors):
    sent = Broadcast(tensors())
    whole, part = (
        plan_round(plan, inputs, lambda client: sent, plan.participants)
        for plan in (make_plan(), make_plan(task_labels=["cat"]))
    )

    assert all(a.broadcast is sent for a in whole)
    assert len({id(a.broadcast) for a in part}) == 1
    assert all(a.broadcast.tensors is sent.tensors for a in part)


def test_a_strategy_that_makes_a_broadcast_for_each_of_the_same_tensors_is_shipped_once(
    make_plan, inputs, tensors
):
    state = tensors()
    for plan in (make_plan(), make_plan(task_labels=["cat"])):
        asked = plan_round(plan, inputs, lambda client: Broadcast(state), plan.participants)

        assert len({id(a.broadcast) for a in asked}) == 1
        assert asked[0].broadcast.tensors is state


def test_clients_that_are_not_alike_get_their_own_broadcast(make_plan, inputs, tensors):
    sent = {name: Broadcast(tensors(seed)) for seed, name in enumerate("abc")}

    plan = make_plan(task_labels=["cat"])
    asked = plan_round(plan, inputs, lambda c: sent[c.name], plan.participants)

    for assignment in asked:
        assert assignment.broadcast.tensors is sent[assignment.client].tensors


def test_a_round_s_assignments_say_what_the_plan_says(make_plan, inputs, tensors):
    plan = make_plan(task_labels=["dog", "cat"], steps=3, threads=2, seed=9, head="freeze")

    cohort = plan.participants
    first, second, _ = plan_round(plan, inputs, lambda c: Broadcast(tensors()), cohort)

    assert first.action == "train"
    assert (first.run, first.round, first.base) == ("run-1", 3, "f" * 64)
    assert first.labels == first.data.labels == ("cat", "dog")  # in index order
    assert (first.steps, first.threads, first.head) == (3, 2, "freeze")
    assert first.seed == seed_for(9, 3, "a")
    assert first.seed != second.seed
    assert first.data.uri == "jsonl:/a.jsonl"


def test_the_head_s_rows_of_other_tasks_are_masked(make_plan, tensors):
    plan = make_plan(task_labels=["rank", "dog"])

    mask = with_head_mask(Broadcast(tensors()), plan).mask

    assert mask.keys() == {"head.weight", "head.bias"}
    assert mask["head.bias"].tolist() == [0, 1, 0, 1]
    assert mask["head.weight"].shape == (4, 5)
    assert mask["head.weight"][:, 0].tolist() == [0, 1, 0, 1]


def test_a_method_s_own_mask_is_kept_under_the_head_s(make_plan, tensors):
    given = tensors()
    own = {
        "head.weight": torch.eye(4, 5),
        "q.lora_B.weight": torch.zeros_like(given["q.lora_B.weight"]),
    }

    mask = with_head_mask(Broadcast(given, mask=own), make_plan(task_labels=["dog"])).mask

    assert mask["head.weight"].nonzero().tolist() == [[1, 1]]
    assert torch.equal(mask["q.lora_B.weight"], own["q.lora_B.weight"])


def test_a_run_on_the_whole_label_set_masks_nothing(make_plan, tensors):
    sent = Broadcast(tensors())

    assert with_head_mask(sent, make_plan()) is sent
    assert with_head_mask(sent, make_plan(task_labels=["rank", "model", "dog", "cat"])) is sent


def test_with_rehearsal_the_rows_of_labels_seen_before_are_trained_too(make_plan, tensors):
    start = Start("continue", "0" * 64, seen_labels=("cat",))
    method = PluginChoice("replay", {})
    plan = replace(make_plan(task_labels=["dog"]), start=start, regularizers=(method,))

    mask = with_head_mask(Broadcast(tensors()), plan).mask

    assert mask["head.bias"].tolist() == [1, 1, 0, 0]
    assert plan.task_labels == ("dog",)  # what is kept of a task is told by its own labels


def test_a_plan_is_the_same_after_a_trip_through_json(make_plan):
    plan = make_plan(
        noise=PRIVACY,
        adapter={"name": "lora", "r": 2, "layers": [0], "alpha_pattern": {"query": 3}},
        regularizers=[{"name": "o-lora", "form": "hard"}, "proximal"],
        task_labels=["dog"],
        start=Start("stack", "f" * 64, ("e" * 64, "f" * 64), ("cat",)),
    )
    who = replace(
        plan.participants[0],
        data=DataSpec("csv:/x", {"text": "note"}, Shard("dirichlet", 1, 3, 7, 0.1), ("dog",)),
        labels={"ward": "north"},
    )
    plan = replace(plan, participants=(who, *plan.participants[1:]))

    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_what_a_run_learns_is_in_index_order_and_adds_to_what_was_seen(make_plan):
    plan = make_plan(task_labels=["rank", "cat"], start=Start("stack", "v", (), ("dog",)))

    assert plan.task_labels == ("cat", "rank")
    assert plan.seen_labels == ("cat", "dog", "rank")


def test_the_adapter_is_initialised_without_anybody_s_data(make_plan, inputs):
    made = plan_init(make_plan(noise=PRIVACY), inputs)

    assert (made.action, made.client, made.data) == ("init", "", DataSpec("none:"))
    assert made.privacy is None
    assert made.seed == seed_for(0, 0, "init")


def test_evaluation_scores_the_task_s_labels_with_the_given_tensors(make_plan, inputs, tensors):
    given = tensors()
    chosen = EvaluateConfig(data="jsonl:/held-back", fields={"text": "note"})

    made = plan_evaluation(make_plan(noise=PRIVACY, task_labels=["dog"]), inputs, given, chosen)

    assert (made.action, made.client, made.head) == ("evaluate", "", "freeze")
    assert made.data == DataSpec("jsonl:/held-back", {"text": "note"}, labels=("dog",))
    assert made.broadcast.tensors is given
    assert made.labels == ("dog",)
    assert made.privacy is None
