"""What is told of a round is bounded in each unit, noised, and paid for as steps are."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients import report
from clients.assignment import PluginChoice, Privacy, Report
from clients.charges import spend_of
from clients.evaluate import evaluate
from clients.noise import NoiseStream
from clients.regularizers import Beginning, namespaced
from clients.regularizers.lwf import LwF
from clients.task_model import TaskModel
from clients.trainer import train

KEY = bytes(range(32))
SILENT = 1e-9


def private(noise=1.0, rate=0.1, **told):
    return Privacy(noise, 1.0, rate, report=Report(**{"loss": 4.0, **told}))


def told(privacy, *samples, digest="d", expected=4.0):
    """Return what is told of samples, one a step."""
    drawn = iter(torch.tensor(sample) for sample in samples)
    return report.noised(privacy, NoiseStream(KEY, digest), 10, expected, lambda step: next(drawn))


def test_without_noise_the_mean_loss_is_told_and_the_number():
    found = told(private(SILENT, count=True), [1.0, 3.0, 2.5, 0.5])

    assert found == pytest.approx({"loss": 7.0 / 4, "examples": 4 / 0.1})


def test_a_loss_is_cut_off_at_its_bound_and_what_is_no_number_counts_as_that():
    found = told(private(SILENT), [math.nan, math.inf, 9.0, -1.0])

    assert found == {"loss": pytest.approx(3 * 4.0 / 4)}


def test_what_is_divided_by_is_what_is_expected_and_not_what_was_drawn():
    assert told(private(SILENT), [3.0] * 6) == {"loss": pytest.approx(2 + 6 * 1 / 4)}
    assert told(private(SILENT), []) == {"loss": pytest.approx(2.0)}


def test_several_steps_are_averaged():
    found = told(private(SILENT, steps=2, count=True), [1.0] * 4, [3.0] * 4)
    assert found == pytest.approx({"loss": 2.0, "examples": 40.0})


@given(st.lists(st.floats(), max_size=6), st.floats(), st.booleans())
def test_one_more_example_moves_each_sum_by_one_at_most(losses, more, count):
    chosen = Report(4.0, count)
    before, after = (
        report._added(torch.tensor(values, dtype=torch.float64), chosen)
        for values in (losses, [*losses, more])
    )
    assert len(before) == 1 + count
    assert bool(((after - before).abs() <= 1.0 + 1e-12).all())


@pytest.mark.parametrize(("count", "steps"), [(False, 1), (True, 1), (False, 4)])
def test_the_noise_is_that_of_a_step_for_all_numbers_together(count, steps):
    chosen, many = private(0.5, count=count, steps=steps), 800
    found = [
        told(chosen, *[[2.0]] * steps, digest=str(n), expected=100.0)["loss"] for n in range(many)
    ]
    wanted = 0.5 * math.sqrt(1 + count) * 2.0 / (100 * math.sqrt(steps))
    deviation = torch.tensor(found).double().std()
    # of 800 draws the deviation is within 10 % at four standard errors
    assert float(deviation) == pytest.approx(wanted, rel=0.1)


def test_what_is_told_stays_within_its_bounds():
    for number in range(20):
        found = told(private(1e4, count=True), [2.0], digest=str(number))
        assert 0 <= found["loss"] <= 4
        assert found["examples"] >= 0


def test_a_client_tells_the_loss_of_the_model_that_it_has_trained(assign):
    size = 10
    privacy = Privacy(SILENT, 0.1, 1.0, report=Report(loss=8.0, count=True, steps=2))
    assignment = assign(privacy=privacy, num_examples=size, batch_size=size, steps=3)

    update = train(assignment)

    sent = replace(assignment, action="evaluate", privacy=None)
    trained = {**assignment.broadcast.tensors, **update.tensors}
    sent = replace(sent, broadcast=replace(sent.broadcast, tensors=trained))
    assert update.metrics["loss"] == pytest.approx(evaluate(sent).metrics["loss"], rel=1e-3)
    assert update.metrics["examples"] == pytest.approx(size)
    assert train(assignment).metrics == update.metrics


def test_a_report_costs_what_its_steps_cost(assign):
    assignment = assign(privacy=private(steps=3), steps=5)

    assert spend_of(assignment).parameters["steps"] == 8.0
    assert train(assignment).spends == (spend_of(assignment),)


def test_what_a_client_tells_is_of_another_sample_than_it_trains_on(assign, monkeypatch):
    drawn = []
    sample = NoiseStream.poisson_sample

    def noted(stream, step, count, rate):
        drawn.append(step)
        return sample(stream, step, count, rate)

    monkeypatch.setattr(NoiseStream, "poisson_sample", noted)
    train(assign(privacy=private(rate=0.4, steps=2), steps=3))
    assert drawn == [0, 1, 2, 3, 4]


def test_where_examples_are_measured_alone_no_report_or_teacher_sees_two_at_once(
    assign, monkeypatch
):
    seen, forward = [], TaskModel.forward

    def noted(model, batch):
        seen.append((torch.is_grad_enabled(), len(batch.input_ids)))
        return forward(model, batch)

    monkeypatch.setattr(TaskModel, "forward", noted)
    monkeypatch.setattr("clients.trainer.engines_of", lambda capabilities: ["alone"])
    plain = assign(privacy=replace(private(), sample_rate=1.0))
    start = Beginning(plain.broadcast.tensors, first=False, known=(0, 1))
    taught = replace(
        plain,
        regularizers=(PluginChoice("lwf"),),
        memory=namespaced(LwF().begin(start, {}), "lwf"),
    )

    train(taught)

    chosen = 1 + 2  # a teacher of two, and each of them alone: all of which is thrown away
    assert seen[:chosen] == [(False, 2), (True, 1), (True, 1)]
    assert set(seen[chosen:]) == {(False, 1), (True, 1)}


def test_a_client_without_examples_tells_noise_as_others_do(assign):
    update = train(assign(rows=(), privacy=private()))
    assert 0 <= update.metrics["loss"] <= 4


def test_nothing_is_told_without_a_report(assign):
    assert train(assign(privacy=replace(private(), report=None))).metrics == {}
    assert report.names(None) == frozenset()
