"""Nothing enters an aggregation that its assignment did not ask for."""

from dataclasses import replace

import pytest
import torch

from clients.assignment import PluginChoice, Privacy, Report
from clients.charges import spend_of
from clients.uplink import encoded
from clients.wire import digest, pack
from orchestrator.acceptance import decoded_update, lazily, moved, refusal, spill, spilled
from orchestrator.history import Taken
from orchestrator.plan import RoundInputs, plan_round
from strategies.base import Broadcast, Update
from strategies.spends import PrivacySpend
from strategies.tensors import B_AND_HEAD

PRIVACY = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1)
B = "q.lora_B.weight"


@pytest.fixture
def asked(make_plan, tensors):
    """Return a function that makes what client ``a`` was asked, with changes."""

    def make(noise=None, **changes):
        plan = make_plan(noise=noise, steps=2)
        inputs = RoundInputs(2, "f" * 64, {}, {}, "/site")
        sent = Broadcast(tensors(), trainable=B_AND_HEAD)
        return replace(plan_round(plan, inputs, lambda c: sent, plan.participants)[0], **changes)

    return make


def as_it_is(update, weight):
    return update


def answer(assignment, **changes) -> Update:
    given = assignment.broadcast.tensors
    right = Update(
        client=assignment.client,
        round=assignment.round,
        base=assignment.base,
        tensors={n: given[n] + 1 for n in (B, "head.weight", "head.bias")},
        num_examples=assignment.num_examples if assignment.privacy else 10,
        metrics={} if assignment.privacy else {"loss": 0.5},
        spends=(spend_of(assignment),) if assignment.privacy else (),
        fingerprint="ab",
    )
    return replace(right, **changes)


def with_tensor(assignment, name, tensor) -> Update:
    right = answer(assignment)
    return replace(right, tensors={**right.tensors, name: tensor})


@pytest.mark.parametrize("noise", [None, PRIVACY])
def test_what_was_asked_for_is_accepted(asked, noise):
    assignment = asked(noise)

    assert refusal(answer(assignment), assignment) is None


def test_a_missing_tensor_is_refused_by_name(asked):
    assignment = asked()
    tensors = dict(answer(assignment).tensors)
    del tensors[B]

    assert refusal(answer(assignment, tensors=tensors), assignment) == f"{B} is missing"


@pytest.mark.parametrize("extra", ["q.lora_A.weight", "q.scaling", "other"])
def test_a_tensor_that_was_not_asked_for_is_refused(asked, extra):
    assignment = asked()
    update = with_tensor(assignment, extra, torch.zeros(1))

    assert refusal(update, assignment) == f"{extra} is not asked for"


@pytest.mark.parametrize("head", ["freeze", "personal"])
def test_a_head_that_stays_is_refused(asked, head):
    update = answer(asked())

    assert refusal(update, asked(head=head)) == "head.bias is not asked for"


def test_another_shape_is_refused(asked):
    update = with_tensor(asked(), B, torch.zeros(6, 3))

    assert refusal(update, asked()) == (
        f"{B} is torch.float32 [6, 3], expected torch.float32 [6, 2]"
    )


def test_another_dtype_is_refused(asked):
    update = with_tensor(asked(), B, torch.zeros(6, 2, dtype=torch.float64))

    assert "is torch.float64 [6, 2], expected torch.float32 [6, 2]" in refusal(update, asked())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_and_counted(asked, value):
    tensor = torch.zeros(6, 2)
    tensor[1, 1] = tensor[4, 0] = value

    assert refusal(with_tensor(asked(), B, tensor), asked()) == f"{B}: 2 non-finite values"


@pytest.mark.parametrize("change", [{"round": 1}, {"base": "e" * 64}])
def test_an_update_of_another_round_or_version_is_refused(asked, change):
    assert "expected round 2 from ffffffffffff" in refusal(answer(asked(), **change), asked())


def test_an_update_that_changes_too_much_is_refused_where_a_norm_is_set(asked):
    """36 entries, each moved by 1: a change of norm 6."""
    update = answer(asked())

    assert sum(t.numel() for t in update.tensors.values()) == 36
    assert refusal(update, asked(), 6.001) is None
    assert refusal(update, asked(), 5.9) == ("its change has norm 6, allowed 5.9 (max_update_norm)")


@pytest.mark.parametrize("count", [0, -3, 2**53 + 1, 10**400])
def test_an_update_of_no_example_or_more_than_can_be_is_refused(asked, count):
    reason = refusal(answer(asked(), num_examples=count), asked())

    assert reason == f"num_examples must be from 1 to 2**53, got {count}"


@pytest.mark.parametrize(
    "spends",
    [
        (),
        (PrivacySpend("gaussian", "example", "add-remove", {"noise_multiplier": 9.0}),),
        (spend := PrivacySpend("gaussian", "example", "add-remove", {}), spend),
    ],
)
def test_a_spend_that_is_not_the_one_on_the_ledger_is_refused(asked, spends):
    assignment = asked(PRIVACY)

    assert "privacy spend" in refusal(answer(assignment, spends=spends), assignment)


@pytest.mark.parametrize("metrics", [{}, {"loss": 1.0}, {"loss": 1.0, "examples": 9, "f1": 1.0}])
def test_an_update_tells_what_its_report_says_and_nothing_else(asked, metrics):
    assignment = asked(replace(PRIVACY, report=Report(4.0, count=True)))
    right = answer(assignment, metrics={"loss": 1.0, "examples": 9.0})

    assert refusal(right, assignment) is None
    assert "of metrics examples, loss alone" in refusal(replace(right, metrics=metrics), assignment)


def test_a_spend_without_privacy_is_refused(asked):
    update = answer(asked(), spends=(spend_of(asked(PRIVACY)),))

    assert "privacy spend" in refusal(update, asked())


def test_a_spilled_update_is_read_back_as_it_was(asked, make_plan, tmp_path):
    assignment = asked(PRIVACY)
    update = answer(assignment)
    who = make_plan().participants[0]

    accepted = spill(update, who, tmp_path / "runs")
    [again] = lazily([accepted], as_it_is)

    assert accepted.path.read_bytes() == pack(update) == pack(again)
    assert refusal(again, assignment) is None
    assert accepted.leaf["digest"] == digest(pack(update))
    assert accepted.leaf["population"] == "people-a"
    assert accepted.leaf["spends"][0]["parameters"]["steps"] == 2


def test_updates_are_read_one_at_a_time_in_the_order_given(asked, make_plan, tmp_path):
    people = make_plan().participants
    written = [spill(answer(asked(), client=p.name), p, tmp_path) for p in people]
    reading = lazily(written, as_it_is)

    assert next(reading).client == "a"
    written[2].path.unlink()  # not read yet
    assert next(reading).client == "b"
    with pytest.raises(FileNotFoundError):
        next(reading)


def test_an_update_that_was_accepted_is_found_again_by_its_digest(asked, make_plan, tmp_path):
    who = make_plan().participants[0]
    accepted = spill(answer(asked(PRIVACY)), who, tmp_path)
    taken = Taken("a", 2, "f" * 64, accepted.leaf["digest"])

    assert spilled(taken, who, tmp_path) == accepted
    assert spilled(taken._replace(digest="0" * 64), who, tmp_path) is None
    assert spilled(taken._replace(round=3), who, tmp_path) is None
    accepted.path.write_bytes(b"")
    assert spilled(taken, who, tmp_path) is None


def test_two_updates_of_one_client_lie_side_by_side(asked, make_plan, tmp_path):
    who = make_plan().participants[0]
    paths = {spill(answer(asked(round=r)), who, tmp_path).path for r in (1, 2)}

    assert len(paths) == 2


def test_the_weight_is_in_the_leaf_and_passed_on(asked, make_plan, tmp_path):
    accepted = spill(answer(asked()), make_plan().participants[0], tmp_path).weighing(0.5)
    seen = []

    list(lazily([accepted], lambda update, weight: seen.append(weight) or update))

    assert accepted.leaf["weight"] == 0.5
    assert seen == [0.5]


def test_a_declared_weight_is_the_operator_s_and_in_the_leaf(asked, make_plan, tmp_path):
    who = replace(make_plan().participants[0], declared=2.5)
    accepted = spill(answer(asked(), declared=1000.0), who, tmp_path)

    assert accepted.leaf["declared"] == 2.5
    assert [update.declared for update in lazily([accepted], as_it_is)] == [2.5]
    plain = spill(answer(asked(), declared=1000.0), make_plan().participants[0], tmp_path)
    assert "declared" not in plain.leaf
    assert [update.declared for update in lazily([plain], as_it_is)] == [None]


def test_an_update_of_an_older_version_is_moved_by_its_weighted_change():
    update = Update("a", 1, "old", {"b": torch.tensor([3.0, 1.0])}, 5)
    base, now = {"b": torch.tensor([1.0, 1.0])}, {"b": torch.tensor([10.0, 20.0])}

    assert moved(update, base, now, 0.5).tensors["b"].tolist() == [11.0, 20.0]
    assert moved(update, base, now, 1.0).tensors["b"].tolist() == [12.0, 20.0]
    assert update.tensors["b"].tolist() == [3.0, 1.0]


@pytest.mark.parametrize("changes", [{"metrics": {"loss": 0.5}}, {"num_examples": 99}])
def test_under_dp_metrics_and_an_exact_count_are_refused(asked, changes):
    assignment = asked(PRIVACY)

    assert "under DP" in refusal(answer(assignment, **changes), assignment)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_refused(asked, value):
    update = answer(asked(), metrics={"loss": value})

    assert refusal(update, asked()) == f"metric 'loss' is {value}"


UPLINK = (PluginChoice("top-k", {"density": 0.5}), PluginChoice("int8"))


def encoded_answer(assignment):
    right = answer(assignment)
    sent, seed = assignment.broadcast, assignment.seed
    return replace(right, tensors=encoded(right.tensors, sent, UPLINK, seed, {})[0])


def test_an_encoded_update_is_accepted_and_means_what_it_said(asked):
    assignment = asked(uplink=UPLINK)
    update = encoded_answer(assignment)
    assert refusal(update, assignment) is None
    moved_by = decoded_update(update, assignment).tensors[B] - assignment.broadcast.tensors[B]
    assert sorted(moved_by.flatten().round().tolist()) == [0.0] * 6 + [1.0] * 6


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        (B, torch.zeros(5, dtype=torch.int8), f"{B} is torch.int8 [5], expected torch.int8 [6]"),
        (B, torch.zeros(6), f"{B} is torch.float32 [6], expected torch.int8 [6]"),
        (f"{B}:at", torch.full((6,), 99, dtype=torch.int32), f"{B}:at must hold ascending places"),
        (f"{B}:scale", torch.tensor(torch.nan), f"{B}:scale must hold finite scales"),
        (f"{B}:scale", torch.tensor(3e38), f"{B}: 6 non-finite values"),
        ("q.lora_A.weight", torch.zeros(5, dtype=torch.int8), "q.lora_A.weight:at is missing"),
        ("other", torch.zeros(1), "other is not asked for"),
    ],
)
def test_a_hostile_encoding_is_refused_by_a_sentence(asked, name, tensor, why):
    assignment = asked(uplink=UPLINK)
    update = encoded_answer(assignment)
    hostile = replace(update, tensors={**update.tensors, name: tensor})
    assert str(refusal(hostile, assignment)).startswith(why)


def test_tensors_as_they_are_are_refused_where_encoded_ones_were_asked_for(asked):
    assignment = asked(uplink=UPLINK)
    assert "missing" in str(refusal(answer(assignment), assignment))
