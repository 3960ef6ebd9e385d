"""EWC, MAS and SI: what is remembered of tasks, by closed forms."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from clients.reading import Reading
from clients.regularizers import REGULARIZERS, anchors
from clients.regularizers.ewc import EWC
from clients.regularizers.mas import MAS
from clients.regularizers.si import SI
from strategies.base import Update

KINDS = {"ewc": "fisher", "mas": "importance", "si": "importance"}
EVERY = pytest.mark.parametrize("name", sorted(KINDS))
NAMES = ("q.lora_A.weight", "head.bias")


def adapter(seed, labels=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "q.lora_A.weight": torch.randn(2, 5, generator=generator),
        "q.scaling": torch.tensor(2.0),
        "head.bias": torch.randn(labels, generator=generator),
    }


def importance(seed, like):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(like[n].shape, generator=generator) for n in NAMES}


def update(client, kind, found, num_examples):
    return Update(client, 3, "", {f"{kind}/{n}": t for n, t in found.items()}, num_examples)


def after(method, kind, params, memory, found):
    return method.combine("consolidate", params, memory, [update("a", kind, found, 10)])


def live(tensors):
    return {n: nn.Parameter(t.double()) for n, t in tensors.items() if n in NAMES}


def test_what_clients_send_counts_by_their_examples():
    params = adapter(0)
    found = [importance(seed, params) for seed in range(3)]
    sizes = (1, 5, 14)
    updates = [
        update(f"c{i}", "fisher", f, n) for i, (f, n) in enumerate(zip(found, sizes, strict=True))
    ]
    memory = EWC().combine("consolidate", params, {}, updates)
    for name in NAMES:
        pooled = sum(n * f[name].double() for f, n in zip(found, sizes, strict=True)) / 20
        torch.testing.assert_close(memory[f"fisher/{name}"], pooled.float())
        assert torch.equal(memory[f"anchor/{name}"], params[name])


@EVERY
def test_the_penalty_is_the_sum_by_hand_and_zero_at_the_anchor(name):
    method, kind = REGULARIZERS.get(name).build(weight=3.0), KINDS[name]
    params, found = adapter(0), importance(1, adapter(0))
    memory = after(method, kind, params, {}, found)
    assert method.penalty(live(params), {}, memory) == 0
    moved = adapter(2)
    wanted = sum((found[n] * (moved[n] - params[n]).square()).sum() for n in NAMES)
    half = 0.5 if name == "ewc" else 1.0
    torch.testing.assert_close(method.penalty(live(moved), {}, memory).float(), 3.0 * half * wanted)


@EVERY
def test_a_weight_of_zero_penalises_nothing_and_remembers_all_the_same(name):
    kind, params = KINDS[name], adapter(0)
    found = importance(1, params)
    none, some = (REGULARIZERS.get(name).build(weight=w) for w in (0.0, 1.0))
    memory = after(none, kind, params, {}, found)
    assert none.penalty(live(adapter(2)), {}, memory) is None
    kept = after(some, kind, params, {}, found)
    assert memory.keys() == kept.keys()
    assert all(torch.equal(memory[n], kept[n]) for n in memory)


def test_two_tasks_pull_like_the_sum_of_their_penalties():
    """Each around its own result: the gradients are the same wherever the adapter is."""
    one, two = adapter(0), adapter(1)
    first, second = importance(2, one), importance(3, two)
    first["head.bias"][0] = second["head.bias"][0] = 0.0  # matters to neither
    memory = after(EWC(), "fisher", one, {}, first)
    memory = after(EWC(), "fisher", two, memory, second)
    for seed in (4, 5):
        now = live(adapter(seed))
        value = EWC(weight=2.0).penalty(now, {}, memory)
        found = torch.autograd.grad(value, list(now.values()))
        for (name, theta), gradient in zip(now.items(), found, strict=True):
            wanted = 2.0 * (first[name] * (theta - one[name]) + second[name] * (theta - two[name]))
            torch.testing.assert_close(gradient, wanted.detach().double(), rtol=1e-4, atol=1e-5)
    assert memory["anchor/head.bias"][0] == two["head.bias"][0]


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_online_the_older_fisher_fades_and_all_is_held_to_the_newest_result(decay):
    one, two = adapter(0), adapter(1)
    first, second = importance(2, one), importance(3, two)
    method = EWC(decay=decay)
    memory = after(method, "fisher", one, {}, first)
    memory = after(method, "fisher", two, memory, second)
    for name in NAMES:
        torch.testing.assert_close(memory[f"fisher/{name}"], decay * first[name] + second[name])
        assert torch.equal(memory[f"anchor/{name}"], two[name])


def test_a_second_quadratic_task_ends_at_the_weighed_mean_of_both():
    """With the first task's curvature as its Fisher, EWC is exact: (F1 t1 + H2 t2) / (F1 + H2)."""
    one, two = adapter(0), adapter(1)
    first, second = importance(2, one), importance(3, two)
    memory = after(EWC(weight=1.0), "fisher", one, {}, first)
    theta = live(one)
    optimizer = torch.optim.LBFGS(list(theta.values()), max_iter=200, tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        task = sum((second[n] * (theta[n] - two[n]).square()).sum() for n in NAMES) / 2
        value = task + EWC(weight=1.0).penalty(theta, {}, memory)
        value.backward()
        return value

    optimizer.step(closure)
    for name in NAMES:
        wanted = (first[name] * one[name] + second[name] * two[name]) / (first[name] + second[name])
        torch.testing.assert_close(theta[name].detach().float(), wanted, rtol=1e-3, atol=1e-4)


@EVERY
@pytest.mark.parametrize("decay", [None, 1.0])
def test_rows_of_a_head_that_grew_are_free_and_the_old_ones_held(name, decay):
    kind = KINDS[name]
    options = {"decay": decay} if name == "ewc" else {}
    method = REGULARIZERS.get(name).build(**options)
    one, two = adapter(0), adapter(1, labels=5)
    found, more = importance(2, one), importance(3, two)
    memory = after(method, kind, one, {}, found)
    now = live(two)
    value = method.penalty(now, {}, memory)
    [gradient] = torch.autograd.grad(value, [now["head.bias"]])
    assert (gradient[:3] != 0).all()
    assert (gradient[3:] == 0).all()
    grown = after(method, kind, two, memory, more)
    held = grown[f"{kind}/head.bias"]
    torch.testing.assert_close(held[:3], found["head.bias"] + more["head.bias"][:3])
    torch.testing.assert_close(held[3:], more["head.bias"][3:])
    assert torch.equal(grown["anchor/head.bias"][3:], two["head.bias"][3:])


def test_si_accounts_for_the_fall_of_a_quadratic_loss_and_takes_its_own_penalty_out():
    """Small plain steps: what all entries account for is the fall; with a penalty, of the task."""
    start, goal = adapter(0), adapter(1)
    params = {n: start[n].clone() for n in NAMES}
    kept = after(SI(), "importance", start, {}, importance(2, start))
    method = SI(weight=1.0)
    for memory in ({}, kept):
        now, seen = dict(params), dict(memory)
        for _ in range(200):
            free = {n: now[n] - goal[n] for n in NAMES}
            grads = dict(free)
            if memory:
                pull = {n: anchors.pull("importance", n, now[n], memory) for n in NAMES}
                grads = {n: g + 2 * pull[n] for n, g in free.items()}
            moved = {n: now[n] - 0.002 * grads[n] for n in NAMES}
            seen = dict(method.observe(grads, now, moved, seen))
            now = moved
        for name in NAMES:
            fall = ((params[name] - goal[name]).square() - (now[name] - goal[name]).square()) / 2
            torch.testing.assert_close(seen[f"path/{name}"], fall, rtol=2e-2, atol=1e-3)
            assert torch.equal(seen[f"first/{name}"], params[name])


def test_what_raised_the_loss_matters_as_little_as_what_did_nothing():
    params = adapter(0)
    found = {n: torch.full_like(params[n], -1.0) for n in NAMES}
    memory = after(SI(), "importance", params, {}, found)
    assert all((memory[f"importance/{n}"] == 0).all() for n in NAMES)


@dataclass(frozen=True)
class Points:
    """Examples of a logistic regression."""

    inputs: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.inputs)


class Logistic(nn.Module):
    """A logistic regression on two features, as a model that a reading is of."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)

    def forward(self, batch):
        return self.head(batch.inputs)

    def example_losses(self, logits, batch, allowed=None):
        return nn.functional.cross_entropy(logits, batch.labels, reduction="none")

    def barred(self, logits, allowed):
        return logits


@pytest.mark.parametrize("method", [EWC(), EWC(labels="model"), MAS()], ids=repr)
def test_on_logistic_regression_importance_is_the_closed_form(method):
    """Of an example x with logits z: ((p - y) x^T)^2; and of the outputs' length, |2 z x^T|.

    With labels drawn from p, what is expected of the former: p (1 - p) x^2.
    """
    torch.manual_seed(0)
    model, drawn = Logistic(), method == EWC(labels="model")
    points = Points(torch.randn(7, 2), torch.arange(7) % 3)
    if drawn:  # often enough for the mean of draws
        points = Points(points.inputs.repeat(3000, 1), points.labels.repeat(3000))
    halves = [Points(points.inputs[i::2], points.labels[i::2]) for i in range(2)]
    params = dict(model.named_parameters())
    reading = Reading(
        model,
        params,
        tuple(params),
        lambda: iter(halves),
        Points(points.inputs[:2], points.labels[:2]),
        ("taps",),
        "classification",
        None,
        seed=3,
    )
    with torch.no_grad():
        z, x = model(points), points.inputs
        p = torch.softmax(z, 1)
        slopes = {
            EWC(): (p - nn.functional.one_hot(points.labels, 3)).square(),
            EWC(labels="model"): p * (1 - p),
            MAS(): (2 * z).abs(),
        }[method]
        size = x.abs() if method == MAS() else x.square()
        wanted = {
            "head.weight": (slopes[:, :, None] * size[:, None, :]).mean(0),
            "head.bias": slopes.mean(0),
        }
    found = method.consolidate_from_data(reading, {})
    kind = "importance" if method == MAS() else "fisher"
    for name, value in wanted.items():
        close = {"rtol": 0.05, "atol": 0.002} if drawn else {}
        torch.testing.assert_close(found[f"{kind}/{name}"], value, **close)


@EVERY
def test_a_client_that_lies_cannot_have_entries_pushed_away(name):
    """Importances are squares and sizes: below 0 nobody's are."""
    params, method = adapter(0), REGULARIZERS.get(name).build()
    lies = {n: -importance(1, params)[n] for n in NAMES}
    memory = after(method, KINDS[name], params, {}, lies)
    assert all(not memory[f"{KINDS[name]}/{n}"].any() for n in NAMES)
