"""The local loop: what it trains, what it leaves alone, and what leaves the client."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clients import models, trainer
from clients.assignment import Clipping, DataSpec, ModelSpec, PluginChoice, Privacy
from clients.charges import spend_of
from clients.evaluate import evaluate
from clients.site import Site, UpdateGone
from clients.sources import BadRecord
from clients.trainer import NothingToTrain, train
from clients.wire import pack
from strategies.plugins import BadOptions
from strategies.spends import PrivacySpend
from strategies.tensors import B_AND_HEAD

ALL = r"(?!.*\.scaling$).*"
WHOLE = Privacy(noise_multiplier=1e-9, max_grad_norm=0.1, sample_rate=1.0)  # no noise to speak of
NOISE = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=1e-12)  # nothing but noise


def moved(assignment, update) -> dict[str, torch.Tensor]:
    """Return by how much each trained tensor has moved."""
    before = assignment.broadcast.tensors
    return {n: update.tensors[n].double() - before[n].double() for n in update.tensors}


def length(change) -> float:
    return float(torch.cat([t.flatten() for t in change.values()]).norm())


def sending(assignment, **changes):
    return replace(assignment, broadcast=replace(assignment.broadcast, **changes))


@pytest.fixture
def everything(monkeypatch):
    """Let an update carry every tensor, also those that are not trained."""
    monkeypatch.setattr(trainer, "returned_names", lambda a: sorted(a.broadcast.tensors))


@pytest.fixture
def unpacked(monkeypatch):
    """Let an update carry masked tensors whole, as the client has them."""
    monkeypatch.setattr(trainer.uplink, "encoded", lambda trained, *rest: (trained, {}))


def test_an_update_carries_what_the_round_trains_and_nothing_else(assign):
    update = train(sending(assign(), trainable=B_AND_HEAD))

    assert {n.rpartition(".lora_")[2] for n in update.tensors} == {
        *("B.weight", "head.bias", "head.weight")
    }
    assert (update.client, update.round, update.base) == ("clinic-7", 1, "f" * 64)
    assert update.num_examples == 10
    assert update.spends == ()


@pytest.mark.parametrize("privacy", [None, NOISE])
def test_training_b_alone_leaves_a_and_head_bit_identical(assign, everything, privacy):
    options = {"lr": 0.5, "weight_decay": 0.3, "momentum": 0.9}
    assignment = sending(
        assign(optimizer=PluginChoice("sgd", options), privacy=privacy),
        trainable=r".*\.lora_B\.weight",
    )

    update = train(assignment)

    for name, before in assignment.broadcast.tensors.items():
        assert torch.equal(update.tensors[name], before) == (".lora_B." not in name), name


def test_the_base_model_is_bit_identical_afterwards(assign):
    assignment = assign()
    base = models.load(assignment.model).backbone
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    train(assignment)

    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_loss_goes_down_on_the_data_it_was_trained_on(assign):
    assignment = assign(optimizer=PluginChoice("adamw", {"lr": 0.02}), steps=25)
    before = evaluate(replace(assignment, action="evaluate"))
    after = evaluate(
        sending(assignment, tensors=dict(train(assignment).tensors) | scalings(assignment))
    )

    assert after.metrics["loss"] < 0.7 * before.metrics["loss"]


def scalings(assignment):
    return {n: t for n, t in assignment.broadcast.tensors.items() if n.endswith(".scaling")}


def test_the_reported_loss_is_the_mean_over_the_examples_seen(assign):
    assignment = assign(optimizer=PluginChoice("sgd", {"lr": 1e-12}), steps=None, epochs=1.0)

    update = train(assignment)

    assert update.metrics["loss"] == pytest.approx(evaluate(assignment).metrics["loss"], rel=1e-5)


def test_a_client_also_learns_to_continue_text(assign, tiny_decoder):
    rows = [{"prompt": "the cat", "completion": " sings"}, {"text": "a dog learns"}] * 4
    spec = ModelSpec(str(tiny_decoder), "causal-lm", max_length=32)
    options = {"lr": 0.05}
    assignment = assign(rows, model=spec, optimizer=PluginChoice("adamw", options), steps=20)

    update = train(assignment)

    before = evaluate(assignment).metrics["loss"]
    after = evaluate(sending(assignment, tensors=dict(update.tensors) | scalings(assignment)))
    assert after.metrics["loss"] < 0.8 * before
    assert not any(name.startswith("head.") for name in update.tensors)


@pytest.mark.parametrize("privacy", [None, NOISE])
def test_the_same_assignment_again_returns_the_stored_bytes(assign, privacy):
    assignment = assign(privacy=privacy)
    first = train(assignment)
    Path(assignment.data.uri.removeprefix("jsonl:")).unlink()  # there is nothing to train on now

    assert pack(train(assignment)) == pack(first)


def test_the_same_seed_gives_the_same_bits_at_another_site(assign, tmp_path):
    assignment = assign(privacy=None, public=True)
    other = replace(assignment, site=str(tmp_path / "other"), run="run-2")

    assert pack(train(assignment)) == pack(train(other))


@pytest.mark.parametrize("privacy", [None, NOISE, WHOLE])
@pytest.mark.parametrize(
    "optimizer",
    [
        PluginChoice("sgd", {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.5}),
        PluginChoice("adamw", {"lr": 0.1, "weight_decay": 0.5}),
    ],
)
def test_masked_entries_stay_bit_identical(assign, unpacked, privacy, optimizer):
    plain = assign(optimizer=optimizer, privacy=privacy, steps=3)
    rows = torch.tensor([1.0, 0, 1, 0])
    mask = {"head.weight": rows[:, None].expand(4, 32), "head.bias": rows}
    assignment = sending(plain, mask=mask)

    change = moved(assignment, train(assignment))

    for name in mask:
        assert change[name][[1, 3]].abs().max() == 0
        assert change[name][[0, 2]].abs().min() > 0


def test_masked_entries_do_not_count_in_the_clip(assign, unpacked):
    # Without the mask the head's gradient is the larger part of an example's norm.
    one = [{"text": "cat sings", "label": "cat"}]
    options = PluginChoice("sgd", {"lr": 1.0})
    privacy = replace(WHOLE, max_grad_norm=1e-3)
    plain = assign(one, privacy=privacy, optimizer=options, steps=1, batch_size=1)
    mask = {"head.weight": torch.zeros(4, 32), "head.bias": torch.zeros(4)}

    assert length(moved(plain, train(plain))) == pytest.approx(1e-3, rel=1e-3)
    masked = sending(plain, mask=mask)
    assert length(moved(masked, train(masked))) == pytest.approx(1e-3, rel=1e-3)


def test_under_privacy_nothing_measured_on_the_data_leaves(assign):
    update = train(assign(privacy=NOISE))

    assert update.metrics == {}
    assert update.num_examples == 100  # as declared, not as counted
    assert update.memory == {}


def test_an_update_says_what_it_spent(assign):
    assignment = assign(privacy=NOISE, steps=3)
    parameters = {"noise_multiplier": 1.0, "sample_rate": 1e-12, "steps": 3.0}

    [spend] = train(assignment).spends

    assert spend == PrivacySpend("gaussian", "example", "add-remove", parameters)
    assert spend == spend_of(assignment)


@pytest.mark.parametrize("change", [{"privacy": None}, {"steps": None}])
def test_without_privacy_or_steps_a_spend_is_not_known(assign, change):
    with pytest.raises(ValueError, match="has a known spend"):
        spend_of(replace(assign(privacy=NOISE), **change))


def test_the_noise_has_the_variance_that_was_declared(assign):
    lr, sigma, clip, batch = 1.0, 3.0, 0.5, 4
    privacy = Privacy(noise_multiplier=sigma, max_grad_norm=clip, sample_rate=1e-12)
    assignment = assign(privacy=privacy, steps=1, optimizer=PluginChoice("sgd", {"lr": lr}))

    noise = torch.cat([t.flatten() for t in moved(assignment, train(assignment)).values()])

    assert len(noise) > 300
    assert float(noise.std()) == pytest.approx(lr * sigma * clip / batch, rel=0.15)


def test_two_broadcasts_in_one_round_get_independent_noise(assign):
    options = PluginChoice("sgd", {"lr": 1.0})
    first = assign(privacy=NOISE, steps=1, optimizer=options)
    nudged = {n: t + 1e-3 if n == "head.bias" else t for n, t in first.broadcast.tensors.items()}
    second = sending(first, tensors=nudged)

    noises = [moved(a, train(a)) for a in (first, second)]
    flat = [torch.cat([n[k].flatten() for k in sorted(n)]) for n in noises]

    assert abs(float(torch.corrcoef(torch.stack(flat))[0, 1])) < 0.2
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) > 1.0  # subtraction cancels nothing


def test_two_runs_get_independent_noise_unless_the_seed_is_insecure(assign):
    def noise(run, seed):
        privacy = replace(NOISE, insecure_seed=seed)
        assignment = assign(privacy=privacy, steps=1, run=run)
        return moved(assignment, train(assignment))["head.bias"]

    assert not torch.allclose(noise("run-a", None), noise("run-b", None))
    assert torch.equal(noise("run-c", 5), noise("run-d", 5))
    assert not torch.allclose(noise("run-e", 5), noise("run-f", 6))


def test_private_training_moves_no_further_than_its_clip_allows(assign):
    options = PluginChoice("sgd", {"lr": 1.0})
    assignment = assign(privacy=WHOLE, optimizer=options, steps=1, batch_size=10)

    change = length(moved(assignment, train(assignment)))

    assert 0.01 < change <= 0.1


def test_microbatches_do_not_change_the_private_gradient(assign):
    def result(microbatch):
        return train(assign(privacy=WHOLE, microbatch=microbatch, batch_size=10)).tensors

    whole, parts = result(64), result(3)

    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def test_a_client_smaller_than_a_batch_is_averaged_over_what_it_declared(assign):
    options = PluginChoice("sgd", {"lr": 1.0})

    def step(batch_size):
        made = assign(privacy=WHOLE, optimizer=options, steps=1, num_examples=10)
        made = replace(made, batch_size=batch_size)
        return length(moved(made, train(made)))

    assert step(64) == pytest.approx(step(10), rel=1e-4)
    assert step(10) == pytest.approx(step(5) / 2, rel=1e-4)


def test_a_penalty_is_added_after_the_noise_and_its_clip(assign):
    # With lr * mu = 1 each step first returns to the reference, whatever the clip is; then it
    # moves by at most the clip. A penalty inside the clip could not undo the steps before.
    options = PluginChoice("sgd", {"lr": 1.0})
    pulled = assign(
        [{"text": f"cat {word}", "label": "cat"} for word in ("sings", "learns", "weaves")] * 4,
        privacy=WHOLE,
        optimizer=options,
        steps=6,
        batch_size=12,
        regularizers=(PluginChoice("proximal", {"mu": 1.0}),),
    )
    free = replace(pulled, regularizers=())

    assert length(moved(pulled, train(pulled))) <= 0.1001
    assert length(moved(free, train(free))) > 0.3


def test_a_strong_proximal_term_keeps_a_client_at_the_broadcast(assign):
    options = PluginChoice("sgd", {"lr": 1e-3})
    free = assign(optimizer=options, steps=20)
    held = replace(free, regularizers=(PluginChoice("proximal", {"mu": 500.0}),))

    assert length(moved(held, train(held))) < 0.2 * length(moved(free, train(free)))


@pytest.mark.parametrize("privacy", [None, NOISE])
def test_a_frozen_head_does_not_move_and_is_not_sent(assign, monkeypatch, privacy):
    assignment = assign(head="freeze", privacy=privacy)
    assert not any(n.startswith("head.") for n in train(assignment).tensors)

    monkeypatch.setattr(trainer, "returned_names", lambda a: sorted(a.broadcast.tensors))
    update = train(replace(assignment, round=2))
    for name in ("head.weight", "head.bias"):
        assert torch.equal(update.tensors[name], assignment.broadcast.tensors[name])


def test_a_personal_head_is_trained_kept_and_gone_on_with(assign):
    first = assign(head="personal")
    update = train(first)
    kept = Site(first.site).state("run-1", "clinic-7", 1)

    assert not any(n.startswith("head.") for n in update.tensors)
    assert kept.keys() == {"head.weight", "head.bias"}
    assert not torch.equal(kept["head.bias"], first.broadcast.tensors["head.bias"])

    train(replace(first, round=2, optimizer=PluginChoice("sgd", {"lr": 1e-30})))
    again = Site(first.site).state("run-1", "clinic-7", 2)
    assert torch.equal(again["head.weight"], kept["head.weight"])


def test_what_a_broadcast_calls_personal_is_trained_kept_and_gone_on_with(assign):
    plain = assign()
    first = replace(plain, broadcast=replace(plain.broadcast, personal=r".*\.lora_B\..*"))
    update = train(first)
    kept = Site(first.site).state("run-1", "clinic-7", 1)
    own = {n for n in first.broadcast.tensors if ".lora_B." in n}

    assert kept.keys() == own
    assert update.tensors.keys() == train(plain).tensors.keys() - own
    assert not any(torch.equal(kept[n], first.broadcast.tensors[n]) for n in own)

    train(replace(first, round=2, optimizer=PluginChoice("sgd", {"lr": 1e-30})))
    again = Site(first.site).state("run-1", "clinic-7", 2)
    assert all(torch.equal(again[n], kept[n]) for n in own)


def test_labels_that_do_not_take_part_get_no_gradient(assign):
    rows = [{"text": "cat sings", "label": "cat"}, {"text": "a dog", "label": "dog"}]
    assignment = assign(rows, labels=("cat", "dog"), batch_size=2)

    change = moved(assignment, train(assignment))

    assert change["head.bias"][:2].abs().min() > 0
    assert change["head.bias"][2:].abs().max() == 0


def test_an_underlay_changes_the_training_and_is_not_sent(assign):
    plain = assign()
    below = {n: t + 0.5 for n, t in plain.broadcast.tensors.items() if not n.startswith("head.")}
    stacked = replace(plain, underlay=below)

    update = train(stacked)

    assert update.tensors.keys() == train(plain).tensors.keys()
    assert update.metrics["loss"] != train(plain).metrics["loss"]


@pytest.mark.parametrize(
    ("epochs", "sizes"),
    [(1.0, [4, 4, 2]), (2.0, [4, 4, 2, 4, 4, 2]), (0.5, [4, 4]), (0.01, [4])],
)
def test_epochs_are_passes_over_the_data(assign, monkeypatch, epochs, sizes):
    seen = []

    def recorded(params, microbatches, losses, total, mask):
        seen.append(total)
        return original(params, microbatches, losses, total, mask)

    original = trainer.plain_step
    monkeypatch.setattr(trainer, "plain_step", recorded)

    train(assign(steps=None, epochs=epochs))

    assert seen == sizes


def test_a_loss_that_is_not_finite_is_left_out(assign):
    update = train(assign(optimizer=PluginChoice("sgd", {"lr": 1e38}), steps=5))

    assert update.metrics == {}
    assert not all(bool(t.isfinite().all()) for t in update.tensors.values())


def test_a_fingerprint_is_keyed_unless_the_data_are_public(assign, tmp_path):
    def fingerprint(site, **changes):
        return train(assign(site=str(tmp_path / site), **changes)).fingerprint

    assert fingerprint("a") != fingerprint("b")
    assert fingerprint("a", round=2) == fingerprint("a")
    assert fingerprint("a", public=True) == fingerprint("b", public=True)


@pytest.fixture
def nobody(assign):
    """Return a function that makes an assignment whose task no record of the client is of."""

    def make(**changes):
        rows = [{"text": "cat", "label": "cat"}]
        uri = assign(rows).data.uri
        return assign(rows, data=DataSpec(uri, labels=("rank",)), **changes)

    return make


def test_a_client_without_examples_has_nothing_to_train(nobody):
    with pytest.raises(NothingToTrain, match="clinic-7 has no example for this task"):
        train(nobody())


def test_with_privacy_a_client_without_examples_sends_noise_alone(nobody):
    update = train(nobody(privacy=replace(NOISE, insecure_seed=1)))

    assert length(moved(nobody(), update)) > 0
    assert update.num_examples == 100
    assert len(update.spends) == 1


def test_a_round_that_trains_no_tensor_is_refused(assign):
    with pytest.raises(NothingToTrain, match="trains no tensor"):
        train(sending(assign(), trainable="nothing"))


def test_options_that_do_not_go_together_are_refused(assign):
    wrong = PluginChoice("sgd", {"lr": 1.0, "nesterov": True})

    with pytest.raises(BadOptions, match="nesterov needs momentum"):
        train(assign(optimizer=wrong))


def test_an_old_private_round_is_never_answered_twice(assign):
    first, second = assign(privacy=NOISE), assign(privacy=NOISE, round=2)
    train(first)
    train(second)

    with pytest.raises(UpdateGone):
        train(first)


def test_private_rounds_may_hold_one_example_at_a_time(assign):
    assert train(assign(privacy=NOISE, microbatch=1)).spends


@pytest.fixture
def of_patients(assign):
    """Return a function that makes a private assignment per patient, without noise to speak of."""

    def make(*patients, text="cat {}", **changes):
        rows = [
            {"text": text.format(number), "label": "cat", "patient": patient}
            for number, patient in enumerate(patients)
        ]
        plain = assign(
            rows=rows,
            steps=1,
            optimizer=PluginChoice("sgd", {"lr": 1.0}),
            num_examples=len(set(patients)),
            privacy=replace(WHOLE, unit="patient", insecure_seed=1),
        )
        return replace(plain, data=replace(plain.data, unit="patient"), **changes)

    return make


def test_a_person_adds_one_clipped_gradient_however_many_records_there_are(of_patients):
    assignment = of_patients(*["ada"] * 9, "bob")

    update = train(assignment)

    # two persons at 0.1 each, over an expected batch of two; nine records would bring it to 0.5
    assert 0 < length(moved(assignment, update)) <= 0.1 * (1 + 1e-4)
    assert update.spends[0].unit == "patient"
    assert update.num_examples == 2


def test_repeating_a_person_s_record_changes_nothing(of_patients):
    once, often = (of_patients(*["ada"] * count, text="cat") for count in (1, 6))

    alone, repeated = (moved(a, train(a)) for a in (once, often))

    assert length(alone) > 0.01
    for name, change in alone.items():
        torch.testing.assert_close(repeated[name], change, atol=1e-6, rtol=1e-4)


def test_several_records_of_a_person_are_clipped_as_one_whatever_a_forward_pass_holds(of_patients):
    assignment = of_patients(*["ada"] * 5, "bob")
    privacy = replace(assignment.privacy, per_unit=4)

    found = [
        moved(a, train(a))
        for a in (
            replace(assignment, privacy=privacy, microbatch=64, client="one"),
            replace(assignment, privacy=replace(privacy, per_unit=9), microbatch=5, client="two"),
        )
    ]

    # two persons at 0.1 each, over an expected batch of two; five records would bring it to 0.3
    assert all(0.01 < length(change) <= 0.1 * (1 + 1e-4) for change in found)


def test_all_records_of_a_person_in_a_step_are_their_mean(of_patients):
    """With a bound that nothing reaches, a step is a plain one on each person's mean loss."""
    rows = ("ada", "ada", "ada", "bob")
    loose = replace(WHOLE, unit="patient", per_unit=3, max_grad_norm=1e3, insecure_seed=1)
    # noise of a billionth of the bound is 1e-6 of the change
    private = of_patients(*rows, privacy=loose, text="cat")

    plain = of_patients("ada", "bob", text="cat", privacy=None)
    plain = replace(plain, data=replace(plain.data, unit=""), client="plain", batch_size=2)

    wanted = moved(plain, train(plain))
    for name, change in moved(private, train(private)).items():
        torch.testing.assert_close(change, wanted[name], atol=1e-5, rtol=1e-3)


def test_a_record_that_does_not_say_whose_it_is_stops_a_run_per_person(of_patients):
    assignment = of_patients("ada", "bob")

    with pytest.raises(BadRecord, match="has no field 'ward' that says whose it is"):
        train(replace(assignment, data=replace(assignment.data, unit="ward")))


def test_a_learned_bound_stays_at_the_client_and_the_next_round_goes_on_with_it(assign):
    learns = replace(NOISE, clipping=Clipping("quantile", rate=1.0), insecure_seed=1)
    first = assign(privacy=learns, steps=3)

    update = train(first)
    [kept] = Site(first.site).state("run-1", "clinic-7", 1).values()

    assert update.tensors.keys() == train(assign(privacy=NOISE, steps=3)).tensors.keys()
    assert float(kept) != NOISE.max_grad_norm
    assert update.spends == (spend_of(assign(privacy=NOISE, steps=3)),)  # what it costs is the same
    train(replace(first, round=2))
    [later] = Site(first.site).state("run-1", "clinic-7", 2).values()
    elsewhere = replace(first, round=2, site=first.site + "-other")
    train(elsewhere)
    [fresh] = Site(elsewhere.site).state("run-1", "clinic-7", 2).values()
    assert float(later / kept) == pytest.approx(float(fresh / NOISE.max_grad_norm))


@pytest.mark.parametrize("mode", ["per-layer", "automatic"])
def test_how_it_is_clipped_changes_what_is_released(assign, mode):
    flat = assign(privacy=WHOLE, steps=1)
    other = replace(flat, privacy=replace(WHOLE, clipping=Clipping(mode)))

    assert length(moved(flat, train(flat))) != length(moved(other, train(other)))
