"""What a client tells of its scores under differential privacy."""

import itertools
import json
import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from opacus.accountants import RDPAccountant

from clients.accounting import epsilon, noise_for
from clients.assignment import ModelSpec, Privacy, Report
from clients.charges import spend_of
from clients.evaluate import evaluate
from clients.noise import MARGIN, NoiseStream
from clients.private_scores import added_up, noised, private_evaluation
from clients.site import Site
from clients.worker import perform
from strategies.pooled import Sums, scores_of

BOUND = 3.0
NOISE = 2.0


def privacy(noise=NOISE, **changes):
    made = Privacy(noise, 1.0, 1.0, insecure_seed=7, report=Report(BOUND, count=True))
    return replace(made, **changes)


@pytest.fixture
def asked(assign):
    """Return a function that makes a private evaluation, with changes."""

    def make(noise=NOISE, **changes):
        given = {"action": "evaluate", "steps": None, "privacy": privacy(noise), **changes}
        return assign(**given)

    return make


LOSSES = (0.0, 1.0, math.inf, math.nan, -5.0)


@pytest.mark.parametrize("told", [3, 2], ids=["with accuracy", "without"])
def test_no_unit_moves_the_sums_by_more_than_the_root_of_their_number(told):
    """Over all small data sets of up to three units of one or two examples, each left out once."""
    examples = list(itertools.product(LOSSES, (0.0, 1.0)))
    worst = 0.0
    for first, second, third in itertools.combinations_with_replacement(examples, 3):
        losses = torch.tensor([first[0], second[0], third[0]])
        right = torch.tensor([first[1], second[1], third[1]])
        for units in ([[0], [1], [2]], [[0, 1], [2]]):
            whole = added_up(losses, right, units, BOUND)[:told]
            for gone in range(len(units)):
                left = [unit for i, unit in enumerate(units) if i != gone]
                moved = float((whole - added_up(losses, right, left, BOUND)[:told]).norm())
                worst = max(worst, moved)
    assert worst <= math.sqrt(told) * (1 + 1e-12)
    assert worst > 0.99 * math.sqrt(told)  # the bound is not larger than it must be


def test_the_noise_is_the_multiplier_times_the_sensitivity_and_independent_in_each_sum():
    total = torch.tensor([40.0, -3.0, 7.0], dtype=torch.float64)
    drawn = torch.stack(
        [noised(total, privacy(), NoiseStream(bytes(32), str(i))) - total for i in range(4000)]
    )
    wanted = NOISE * math.sqrt(3) * MARGIN
    assert drawn.std(dim=0).tolist() == pytest.approx([wanted] * 3, rel=0.05)
    assert drawn.mean(dim=0).abs().max() < 4 * wanted / math.sqrt(4000)
    correlations = torch.corrcoef(drawn.T) - torch.eye(3)
    assert correlations.abs().max() < 0.06


def test_an_evaluation_costs_what_one_gaussian_without_sampling_does(asked):
    spend = spend_of(asked())
    assert dict(spend.parameters) == {"noise_multiplier": NOISE, "sample_rate": 1.0, "steps": 1.0}
    assert (spend.mechanism, spend.unit, spend.adjacency) == ("gaussian", "example", "add-remove")
    spent, delta = epsilon([spend], 1e-5), 1e-5
    normal = NormalDist()  # theorem 8 of 1805.06530: what a Gaussian mechanism costs, exactly
    exact = normal.cdf(1 / (2 * NOISE) - spent * NOISE) - math.exp(spent) * normal.cdf(
        -1 / (2 * NOISE) - spent * NOISE
    )
    assert exact <= delta
    looser = RDPAccountant()
    looser.step(noise_multiplier=NOISE, sample_rate=1.0)
    assert spent <= looser.get_epsilon(delta)
    assert spent == pytest.approx(looser.get_epsilon(delta), rel=0.15)


def test_noise_for_an_epsilon_is_the_smallest_that_keeps_it(asked):
    noise = noise_for(1.0, 1e-5, sample_rate=1.0, steps=1)
    assert epsilon([spend_of(asked(noise))], 1e-5) <= 1.0
    assert epsilon([spend_of(asked(0.99 * noise))], 1e-5) > 1.0


def test_sums_without_noise_to_speak_of_are_the_exact_scores(asked):
    private = asked(1e-6)
    exact = evaluate(replace(private, privacy=None))
    told = perform(private)
    assert (told.metrics, told.label_accuracy) == ({}, {})
    assert told.num_examples == exact.num_examples == 10
    found = scores_of([Sums(told.sums, 1e-6, BOUND)])
    assert found["accuracy"].value == pytest.approx(exact.metrics["accuracy"], abs=1e-5)
    assert found["loss"].value == pytest.approx(exact.metrics["loss"], abs=1e-4)


def test_what_was_told_is_told_again_and_never_made_a_second_time(asked, tmp_path):
    private = asked(privacy=privacy(insecure_seed=None))
    first = private_evaluation(private)
    path = tmp_path / "rows-10.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")  # the data change
    assert private_evaluation(private) == first
    other = private_evaluation(replace(private, round=2))
    assert other.sums != first.sums


def test_noise_is_bound_to_what_is_scored(asked):
    """The same data under another model get other noise: no difference cancels it."""
    one = asked()
    tensors = {name: tensor * 1.0001 for name, tensor in one.broadcast.tensors.items()}
    two = replace(one, broadcast=replace(one.broadcast, tensors=tensors))
    exact = [evaluate(replace(a, privacy=None)).metrics["accuracy"] for a in (one, two)]
    assert exact[0] == exact[1]
    assert perform(one).sums["count"] != perform(two).sums["count"]


@pytest.mark.parametrize("rows", [(), ({"text": "cat", "label": "cat"},)], ids=["empty", "one"])
def test_nobody_learns_whether_there_is_anything_to_score(asked, rows):
    told = perform(asked(1.0, rows=list(rows)))
    assert set(told.sums) == {"count", "loss", "accuracy"}
    assert all(math.isfinite(value) for value in told.sums.values())


def test_units_count_once_however_many_examples_they_have(asked):
    rows = [{"text": f"cat learns {i}", "label": "cat", "ward": f"w{i % 3}"} for i in range(9)]
    private = asked(1e-6, rows=rows, privacy=privacy(1e-6, unit="ward"))
    told = perform(replace(private, data=replace(private.data, unit="ward")))
    assert told.sums["count"] == pytest.approx(3, abs=1e-3)


def test_an_example_is_scored_as_if_it_were_alone(asked):
    """Whatever else is there: else another's presence would show in its last places."""
    rows = [{"text": "dog " + "the adapter learns " * i, "label": "dog"} for i in range(6)]
    alone = [perform(asked(1e-9, rows=[row], round=i + 1)).sums for i, row in enumerate(rows)]
    together = perform(asked(1e-9, rows=rows, round=99)).sums
    assert together["loss"] == pytest.approx(sum(one["loss"] for one in alone), abs=1e-6)


def test_answers_of_a_causal_model_are_never_just_right(asked, tiny_decoder):
    rows = [{"text": "the adapter learns"}, {"text": "the round sings"}]
    told = perform(asked(0.5, rows=rows, model=ModelSpec(str(tiny_decoder), "causal-lm")))
    assert set(told.sums) == {"count", "loss"}
    assert "accuracy" not in scores_of([Sums(told.sums, 1e-3, BOUND)])


def test_words_and_their_tags_are_scored_by_example(asked, tiny_encoder):
    model = ModelSpec(str(tiny_encoder), "token-classification", labels=("O", "B-T", "I-T"))
    rows = [{"tokens": ["the", "adapter"], "tags": ["O", "B-T"]}] * 4
    private = asked(1e-6, rows=rows, model=model)
    exact = evaluate(replace(private, privacy=None)).metrics
    found = scores_of([Sums(perform(private).sums, 1e-6, BOUND)])
    assert found["accuracy"].value == pytest.approx(exact["accuracy"], abs=1e-4)
    assert found["loss"].value == pytest.approx(exact["loss"], abs=1e-3)


def test_exact_scores_of_a_private_assignment_are_refused(asked):
    with pytest.raises(ValueError, match="may be told in noise alone"):
        evaluate(asked())


def test_a_private_evaluation_says_where_losses_are_cut_off(asked):
    with pytest.raises(ValueError, match="a sample rate of 1 and a report"):
        private_evaluation(asked(privacy=privacy(report=None)))


def test_what_is_kept_of_an_evaluation_is_what_was_told(asked):
    private = asked()
    told = private_evaluation(private)
    site = Site(private.site)
    kept = site.stored_sums(private.run, private.client, private.digest())
    assert kept == told.sums == json.loads(json.dumps(told.sums))


@pytest.mark.parametrize(("hidden", "column"), [("ward", ""), ("example", "ward"), ("ward", "id")])
def test_units_that_are_hidden_are_those_that_the_data_are_in(asked, hidden, column):
    """Else a unit adds as many vectors as it has examples, in the noise for one."""
    made = asked(privacy=privacy(unit=hidden))
    made = replace(made, data=replace(made.data, unit=column))
    with pytest.raises(ValueError, match="a unit would add more than one vector"):
        private_evaluation(made)
