"""The server's optimizers, with numbers small enough to check by hand."""

import pytest
import torch
from torch.testing import assert_close

from strategies import STRATEGIES
from strategies.base import ServerState
from strategies.fedadagrad import FedAdagrad
from strategies.fedadam import FedAdam
from strategies.fedavg import FedAvg
from strategies.fedavgm import FedAvgM
from strategies.fedsvd import FedSVD
from strategies.fedyogi import FedYogi
from strategies.ffa_lora import FFALoRA
from strategies.plugins import BadOptions

NAME = "head.bias"
FAMILY = ("fedadam", "fedadagrad", "fedavgm", "fedyogi")


@pytest.fixture
def one():
    """A state of one number, as a strategy begins with it."""
    return lambda strategy: strategy.init({NAME: torch.zeros(1, dtype=torch.float64)})


@pytest.fixture
def go(make_update):
    """Take rounds in which the mean change is what is given; return where that leads."""

    def rounds(strategy, state, *changes):
        for change in changes:
            trained = {NAME: state.adapter[NAME] + change}
            state = strategy.aggregate(state, [make_update(trained)])
        return state

    return rounds


def moment(state, name):
    [found] = [t for key, t in state.auxiliary.items() if key.endswith(f"/{name}/{NAME}")]
    return float(found)


def test_adam_divides_the_mean_of_changes_by_the_root_of_their_squares(one, go):
    """tau 1 so v = 1; Delta 3: m = 1.5, v = 0.5 + 4.5 = 5; Delta 0: m = 0.75, v = 2.5."""
    adam = FedAdam(learning_rate=2.0, beta1=0.5, beta2=0.5, tau=1.0)
    first = go(adam, one(adam), 3.0)
    assert float(first.adapter[NAME]) == pytest.approx(2 * 1.5 / (5**0.5 + 1))
    second = go(adam, first, 0.0)
    assert (moment(second, "m"), moment(second, "v")) == (0.75, 2.5)


def test_corrected_adam_is_torch_s(one, go):
    changes = [0.3, -1.0, 2.0, 0.1]
    adam = FedAdam(learning_rate=0.1, tau=1e-8, bias_correction=True)
    found = go(adam, one(adam), *changes).adapter[NAME]
    theirs = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    for change in changes:
        theirs.grad = torch.full_like(theirs, -change)
        optimizer.step()
    assert_close(found, theirs.detach())


def test_yogi_s_square_moves_towards_the_change_s_from_both_sides(one, go):
    """From 4: towards 1 by 0.1 * 1, towards 9 by 0.1 * 9."""
    yogi = FedYogi(beta2=0.9, tau=2.0)
    assert moment(go(yogi, one(yogi), 1.0), "v") == pytest.approx(3.9)
    assert moment(go(yogi, one(yogi), 3.0), "v") == pytest.approx(4.9)
    assert moment(go(yogi, one(yogi), 2.0), "v") == 4.0


def test_adagrad_sums_squares(one, go):
    """9 + 16 on top of tau^2 = 0: the last step is 4 / 5."""
    adagrad = FedAdagrad(learning_rate=1.0, tau=1e-30)
    state = go(adagrad, one(adagrad), 3.0)
    assert float(state.adapter[NAME]) == pytest.approx(1.0)
    assert float(go(adagrad, state, 4.0).adapter[NAME]) == pytest.approx(1.8)


def test_momentum_adds_up_steady_changes(one, go):
    """1, then 1 + 0.5, then 1 + 0.75."""
    momentum = FedAvgM(momentum=0.5)
    state = go(momentum, one(momentum), 1.0, 1.0, 1.0)
    assert float(state.adapter[NAME]) == pytest.approx(4.25)


@pytest.mark.parametrize("adaptive", [FedAdam, FedYogi, FedAdagrad])
def test_without_momentum_and_with_a_large_tau_it_is_a_scaled_mean(one, go, adaptive):
    strategy = adaptive(learning_rate=3e6, beta1=0.0, tau=1e6)
    state = go(strategy, one(strategy), 0.5)
    assert float(state.adapter[NAME]) == pytest.approx(0.75, rel=0.01)  # 3 / (1 + 1) of it


@pytest.mark.parametrize("name", FAMILY)
def test_a_round_without_updates_moves_nothing_momentum_or_not(one, go, name):
    strategy = STRATEGIES.get(name).build()
    state = go(strategy, one(strategy), 1.0)
    after = strategy.aggregate(state, [])
    assert torch.equal(after.adapter[NAME], state.adapter[NAME])
    assert all(torch.equal(after.auxiliary[n], t) for n, t in state.auxiliary.items())


@pytest.mark.parametrize("name", FAMILY)
def test_the_inner_strategy_says_what_is_trained(make_adapter, make_update, name):
    strategy = STRATEGIES.get(name).build(inner="ffa-lora")
    state = strategy.init(make_adapter())
    trained = make_adapter(1)
    keep = {n: t for n, t in trained.items() if ".lora_B." in n or n.startswith("head.")}
    after = strategy.aggregate(state, [make_update(keep)])
    moved = {n for n in after.adapter if not torch.equal(after.adapter[n], state.adapter[n])}
    assert moved == set(keep)
    assert not any(".lora_A." in name for name in after.auxiliary)
    assert strategy.capabilities == FFALoRA.capabilities - {"exact"}


@pytest.mark.parametrize("name", FAMILY)
def test_a_basis_that_changes_is_refused_with_the_reason(name):
    with pytest.raises(BadOptions, match="inner FedSVD changes from round to round"):
        STRATEGIES.get(name).build(inner="fedsvd")


def test_what_the_mean_measures_and_others_keep_goes_on(make_adapter, make_update):
    strategy = FedAdam(FedAvg())
    state = strategy.init(make_adapter())
    state = ServerState(state.adapter, {**state.auxiliary, "beneath/x": torch.ones(1)})
    tensors = {n: t for n, t in make_adapter(1).items() if not n.endswith("scaling")}
    after = strategy.aggregate(state, [make_update(tensors)])
    assert "averaging_error" in after.metrics
    assert "beneath/x" in after.auxiliary


def test_one_inside_another_keeps_its_own_moments(one, go):
    """Momentum 0.5 makes of 1 and 1 the changes 1 and 1.5; the outer takes them twice."""
    strategy = FedAdam(FedAvgM(momentum=0.5), 2e12, 0.0, 0.0, 1e12)
    state = go(strategy, one(strategy), 1.0)
    assert float(state.adapter[NAME]) == pytest.approx(2.0)
    assert float(go(strategy, state, 1.0).adapter[NAME]) == pytest.approx(5.0)


def test_moments_of_half_precision_are_single(make_adapter):
    state = FedAdam().init(make_adapter(dtype=torch.bfloat16))
    assert {t.dtype for n, t in state.auxiliary.items() if "/v/" in n} == {torch.float32}


def test_fedsvd_may_not_be_inside():
    with pytest.raises(ValueError, match="moments of earlier rounds would not fit the next"):
        FedAvgM(FedSVD())
