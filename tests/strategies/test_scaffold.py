"""Control variates as displacements: what the server learns is what clients keep."""

import pytest
import torch
from torch.testing import assert_close

from strategies.base import ClientSpec, Setting, corrections
from strategies.fedavg import FedAvg
from strategies.fedsvd import FedSVD
from strategies.ffa_lora import FFALoRA
from strategies.scaffold import Scaffold

NAME = "head.bias"
PEOPLE = ("a", "b", "c", "d")


@pytest.fixture
def play(make_update):
    """Play a round of clients who keep their variates as clients do; return the next state."""

    def one(strategy, state, variates, trained):
        sent = strategy.broadcast(state, ClientSpec("a"))
        common = corrections(sent.extra)[NAME].double()
        x, updates = sent.tensors[NAME], []
        for client, descend in trained.items():
            own = variates.get(client, torch.zeros_like(common))
            y = descend(x.clone(), common - own)
            variates[client] = own - common + (x - y)
            updates.append(make_update({NAME: y}, client))
        return strategy.aggregate(state, updates)

    return one


def start(strategy, size=1, num_clients=4):
    adapter = {NAME: torch.zeros(size, dtype=torch.float64)}
    return strategy.init(adapter, Setting(num_clients=num_clients))


def variate(state):
    return corrections(state.auxiliary)[NAME]


@pytest.mark.parametrize("cohorts", [[PEOPLE] * 3, [("a", "b"), ("b", "c", "d"), ("a",)]])
def test_the_server_s_variate_is_the_mean_of_all_clients_also_those_that_sat_out(play, cohorts):
    strategy, variates = Scaffold(), {}
    state = start(strategy, size=3)
    generator = torch.Generator().manual_seed(0)

    def wander(x, correction):
        return x + torch.randn(3, generator=generator, dtype=torch.float64)

    for cohort in cohorts:
        state = play(strategy, state, variates, dict.fromkeys(cohort, wander))
        assert_close(variate(state), sum(variates.values()) / len(PEOPLE))


def test_one_of_two_clients_moves_the_variate_by_half_of_its_own(make_update):
    """x - y is 2; N is 2: C = 1/2 (2 - 0) = 1, then 1 + 1/2 (2 - 1) = 1.5."""
    strategy = Scaffold()
    state = start(strategy, num_clients=2)
    for wanted in (1.0, 1.5):
        update = make_update({NAME: state.adapter[NAME] - 2})
        state = strategy.aggregate(state, [update])
        assert float(variate(state)) == wanted


def test_unlike_clients_reach_the_optimum_that_fedavg_misses(play):
    """Losses a/2 (x - b)^2 with (a, b) = (1, 0) and (9, 10): the optimum of the mean is 9."""
    losses = {"a": (1.0, 0.0), "b": (9.0, 10.0)}
    rate, steps = 0.05, 10

    def descending(slope, target):
        def descend(x, correction):
            for _ in range(steps):
                x = x - rate * slope * (x - target) - correction / steps
            return x

        return descend

    trained = {client: descending(*loss) for client, loss in losses.items()}
    ends = []
    for strategy, used in ((Scaffold(), True), (FedAvg("uniform"), False)):
        state, variates = start(Scaffold(), num_clients=2), {}
        for _ in range(60):
            if used:
                state = play(strategy, state, variates, trained)
            else:
                x = state.adapter[NAME]
                mean = sum(f(x, 0.0) for f in trained.values()) / 2
                state = type(state)({NAME: mean})
        ends.append(float(state.adapter[NAME]))
    assert ends[0] == pytest.approx(9.0, abs=1e-3)
    assert abs(ends[1] - 9.0) > 0.5


def test_only_what_the_inner_strategy_trains_has_a_variate(make_adapter):
    state = Scaffold(FFALoRA()).init(make_adapter())
    names = {n for n in state.adapter if ".lora_B." in n or n.startswith("head.")}
    sent = Scaffold(FFALoRA()).broadcast(state, ClientSpec("a"))
    assert corrections(sent.extra).keys() == corrections(state.auxiliary).keys() == names
    assert "exact" in Scaffold(FFALoRA()).capabilities


def test_clients_receive_the_same_tensors(make_adapter):
    state = Scaffold().init(make_adapter())
    first, second = (Scaffold().broadcast(state, ClientSpec(c)).extra for c in "ab")
    assert all(first[name] is second[name] for name in first)


def test_a_round_without_updates_keeps_the_variate(play):
    strategy = Scaffold()
    state = play(strategy, start(strategy), {}, {"a": lambda x, c: x - 1})
    assert torch.equal(variate(strategy.aggregate(state, [])), variate(state))


def test_a_basis_that_changes_is_refused():
    with pytest.raises(ValueError, match="control variates would not fit the next"):
        Scaffold(FedSVD())
