import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from strategies import STRATEGIES
from strategies.base import ClientSpec, Setting
from strategies.library import BadLibrary
from strategies.lori import LoRI, largest
from strategies.plugins import BadOptions

A = "encoder.query.lora_A.weight"
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


def fresh(adapter):
    """Return an adapter as a run begins: in float64, with B = 0."""
    return {n: t.double() * 0 if n in B else t.double() for n, t in adapter.items()}


def masked(adapter, seed, count, taken=()):
    """Return an adapter whose B has ``count`` entries in each layer, none at those of ``taken``."""
    generator = torch.Generator().manual_seed(seed)
    made = dict(adapter)
    for name in B:
        free = torch.ones(adapter[name].numel())
        for other in taken:
            free[other[name].flatten() != 0] = 0
        places = torch.multinomial(free, count, generator=generator)
        b = torch.zeros_like(adapter[name]).flatten()
        b[places] = torch.randn(count, generator=generator, dtype=b.dtype) + 3
        made[name] = b.reshape(adapter[name].shape)
    return {n: t for n, t in made.items() if not n.startswith("head.")}


@pytest.fixture
def earlier(make_adapter):
    """The adapters of two earlier tasks, on one A, with 4 and 3 entries in each layer."""
    adapter = make_adapter(7, dtype=torch.float64)
    one = masked(adapter, 1, 4)
    return [one, masked(adapter, 2, 3, [one])]


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=2), seed=st.integers(0, 2**16))
def test_no_entry_of_the_mask_is_one_that_the_library_uses(make_adapter, updates, counts, seed):
    adapter = make_adapter(seed, dtype=torch.float64)
    library = []
    for index, count in enumerate(counts):
        library.append(masked(adapter, seed + index, count, library))
    strategy = LoRI(sparsity=0.5)
    state = strategy.init(fresh(make_adapter(3)), Setting(library=library))
    state = strategy.aggregate(state, updates(strategy, state, seed))
    mask = strategy.broadcast(state, ClientSpec("a")).mask
    assert sum(int(m.sum()) for m in mask.values()) == 32  # of 64
    for one in library:
        assert not any(mask[n][one[n] != 0].any() for n in B)


def test_with_a_library_the_sum_of_the_adapters_is_each_of_them(
    make_adapter, updates, products, earlier
):
    strategy = LoRI(sparsity=0.75)
    state = strategy.init(fresh(make_adapter(3)), Setting(library=earlier))
    assert all(torch.equal(state.adapter[n], earlier[0][n]) for n in earlier[0] if "lora_A" in n)
    for seed in (1, 5):
        state = strategy.aggregate(state, updates(strategy, state, seed))
    parts = [*earlier, state.adapter]
    whole = {**state.adapter, **{n: sum(part[n] for part in parts) for n in B}}
    for part in parts:
        assert all(torch.equal(whole[n][part[n] != 0], part[n][part[n] != 0]) for n in B)
    dense = [products({n: t for n, t in part.items() if "head" not in n}) for part in parts]
    for layer, made in products(whole).items():
        assert_close(made, sum(one[layer] for one in dense), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("sparsity", "change", "why"),
    [
        (
            0.8,
            lambda a, one: {**one, A: one[A] + 1},
            "have not the same A in layer 'encoder.query'",
        ),
        (0.8, lambda a, one: a, "adapters use 64 of the 64 entries of B, and 12 are .*sparsity"),
        (0.2, lambda a, one: one, "adapters use 14 of the 64 entries of B, and 51 are to be"),
    ],
)
def test_a_library_that_leaves_no_mask_is_refused(make_adapter, earlier, sparsity, change, why):
    dense = {n: t for n, t in make_adapter(7, dtype=torch.float64).items() if "head" not in n}
    library = [earlier[0], change(dense, earlier[1])]
    with pytest.raises(BadLibrary, match=why):
        LoRI(sparsity=sparsity).init(fresh(make_adapter(3)), Setting(library=library))


def test_a_library_of_another_rank_is_refused(make_adapter, earlier):
    with pytest.raises(BadLibrary, match=r"have rank 4 .* this one has 2; set adapter.r to 4"):
        LoRI().init(make_adapter(rank=2), Setting(library=earlier))


def test_a_b_that_was_trained_on_another_a_is_refused(make_adapter, earlier):
    with pytest.raises(BadLibrary, match=r"goes on from has another A in layer 'encoder.query'"):
        LoRI().init(make_adapter(3), Setting(library=earlier))
