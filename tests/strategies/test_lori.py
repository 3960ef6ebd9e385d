import re
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from strategies import STRATEGIES
from strategies.base import ClientSpec
from strategies.lori import LoRI, largest
from strategies.plugins import BadOptions

B = "encoder.query.lora_B.weight", "encoder.value.lora_B.weight"


@pytest.fixture
def updates(make_adapter, make_update):
    """Two clients that counted 1 and 3 examples, and trained what the broadcast lets them."""

    def made(strategy, state, seed=1):
        sent = strategy.broadcast(state, ClientSpec("a"))
        for index, (client, count) in enumerate((("a", 1), ("b", 3))):
            moves = make_adapter(seed + index, dtype=torch.float64)
            yield make_update(
                {
                    n: t + moves[n] * sent.mask.get(n, torch.tensor(True))
                    for n, t in sent.tensors.items()
                    if re.fullmatch(sent.trainable, n)
                },
                client,
                count,
            )

    return made


@pytest.fixture
def calibrated(make_adapter, updates):
    """Return a state after one dense round, of B's with 28 and 36 entries."""
    strategy = LoRI(sparsity=0.9)
    state = strategy.init(make_adapter(dtype=torch.float64))
    return strategy.aggregate(state, updates(strategy, state))


def test_the_mask_is_the_largest_tenth_of_all_layers_together(calibrated):
    mask = LoRI().broadcast(calibrated, ClientSpec("a")).mask
    assert mask.keys() == set(B)
    sizes = torch.cat([calibrated.adapter[n].abs().flatten() for n in B])
    kept = torch.cat([mask[n].flatten() for n in B])
    assert int(kept.sum()) == 6  # of 64
    assert sizes[kept].min() >= sizes[~kept].max()


def test_equal_entries_do_not_make_the_mask_larger():
    masks = largest({"b": torch.zeros(10), "a": torch.zeros(10)}, 0.15)
    assert masks["a"].tolist() == [True] * 3 + [False] * 7
    assert not masks["b"].any()


def test_calibration_is_dense_and_its_version_stays_so(make_adapter, updates, calibrated):
    strategy = LoRI(calibration=2)
    state = strategy.init(make_adapter(dtype=torch.float64))
    first = strategy.aggregate(state, updates(strategy, state))
    assert not strategy.broadcast(first, ClientSpec("a")).mask
    second = strategy.aggregate(first, updates(strategy, first))
    assert strategy.broadcast(second, ClientSpec("a")).mask
    assert all((second.adapter[n] != 0).all() for n in B)


def test_after_calibration_clients_start_from_zero_once(calibrated, updates):
    strategy = LoRI()
    one, other = (strategy.broadcast(calibrated, ClientSpec(client)) for client in "ab")
    assert one.tensors is other.tensors
    assert not any(one.tensors[n].any() for n in B)
    waiting = strategy.aggregate(calibrated, [])
    assert not any(strategy.broadcast(waiting, ClientSpec("a")).tensors[n].any() for n in B)
    after = strategy.aggregate(calibrated, updates(strategy, calibrated))
    assert strategy.broadcast(after, ClientSpec("a")).tensors is after.adapter


def test_masked_rounds_move_the_mask_alone_and_exactly(calibrated, updates, products):
    strategy, state = LoRI(), calibrated
    mask = strategy.broadcast(state, ClientSpec("a")).mask
    for seed in (5, 9):
        first, second = updates(strategy, state, seed)
        dense = [products({**state.adapter, **u.tensors}) for u in (first, second)]
        state = strategy.aggregate(state, [first, second])
        for name in B:
            assert not state.adapter[name][~mask[name]].any()
            assert state.adapter[name][mask[name]].all()
        for layer, made in products(state.adapter).items():
            assert_close(made, (dense[0][layer] + 3 * dense[1][layer]) / 4)
        assert strategy.broadcast(state, ClientSpec("a")).mask.keys() == mask.keys()


def test_what_a_client_sends_off_the_mask_does_not_count(calibrated, updates):
    strategy = LoRI()
    honest = list(updates(strategy, calibrated))
    odd = replace(honest[0], tensors={n: t + 7.0 for n, t in honest[0].tensors.items()})
    mask = strategy.broadcast(calibrated, ClientSpec("a")).mask
    after = strategy.aggregate(calibrated, [odd, honest[1]]).adapter
    assert not any(after[n][~mask[n]].any() for n in B)


def test_a_is_the_same_in_both_phases(make_adapter, calibrated, updates):
    after = LoRI().aggregate(calibrated, updates(LoRI(), calibrated)).adapter
    adapter = make_adapter(dtype=torch.float64)
    assert all(torch.equal(after[n], t) for n, t in adapter.items() if ".lora_A." in n)


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"calibration": 0}])
def test_a_mask_of_nothing_is_refused(options):
    with pytest.raises(BadOptions):
        STRATEGIES.get("lori").build(**options)
