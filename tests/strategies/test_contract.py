"""What every strategy owes its callers. A new strategy is tested by existing."""

import re
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load, save
from torch.testing import assert_close

from strategies import STRATEGIES
from strategies.base import BENEATH, ClientSpec, ServerState, Setting, beneath
from strategies.pruning import pruning_of
from strategies.selection import budget_of

pytestmark = pytest.mark.parametrize("name", STRATEGIES.names())

COUNTS = {"a": 1, "b": 2, "c": 5}


@pytest.fixture
def strategy(name):
    plugin = STRATEGIES.get(name)
    return plugin.build(**plugin.factory.mean_options)


@pytest.fixture
def make_adapter(make_adapter, strategy):
    """Adapters of the kind that the strategy is for."""
    has = strategy.capabilities
    return partial(make_adapter, core="core" in has, magnitudes="directions" in has)


@pytest.fixture
def train(strategy, make_update):
    """Return updates of three clients who each moved the trainable tensors somewhere."""

    def updates(state, *, agree=False):
        result = []
        for index, (client, count) in enumerate(COUNTS.items()):
            broadcast = strategy.broadcast(state, ClientSpec(client))
            generator = torch.Generator().manual_seed(0 if agree else index)
            trained = {
                name: (
                    tensor
                    + torch.randn(tensor.shape, generator=generator)
                    * broadcast.mask.get(name, torch.tensor(True))
                ).to(tensor.dtype)
                for name, tensor in sorted(broadcast.tensors.items())
                if re.fullmatch(broadcast.trainable, name)
                and not re.fullmatch(broadcast.personal, name)
            }
            result.append(make_update(trained, client, count))
        return result

    return updates


def copied(state):
    return ServerState(*({k: v.clone() for k, v in t.items()} for t in both(state)))


def both(state):
    return state.adapter, state.auxiliary


def apart(tensors):
    """Without what lies beneath, whose factors may be in any order: its product counts."""
    return {n: t for n, t in tensors.items() if not n.startswith(BENEATH)}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_init_keeps_the_product_that_a_run_continues_from(strategy, make_adapter, products, whole):
    adapter = make_adapter(dtype=torch.float64)
    assert_close(whole(strategy.init(adapter)), products(adapter))


def test_broadcast_holds_the_whole_adapter_and_trains_some_of_it(strategy, make_adapter):
    broadcast = strategy.broadcast(strategy.init(make_adapter()), ClientSpec("a"))
    trained = {n for n in broadcast.tensors if re.fullmatch(broadcast.trainable, n)}
    assert broadcast.tensors.keys() == make_adapter().keys()
    assert {"head.weight", "head.bias"} < trained
    assert not {n for n in trained if n.endswith(".scaling")}


def test_broadcast_shares_its_tensors_between_clients_that_are_alike(strategy, make_adapter):
    state = strategy.init(make_adapter())
    first, second = (strategy.broadcast(state, ClientSpec(client)) for client in "ab")
    assert first.tensors is second.tensors


def test_clients_that_agree_get_their_answer(strategy, make_adapter, train, whole):
    state = strategy.init(make_adapter())
    updates = train(state, agree=True)
    after = strategy.aggregate(state, updates)
    expected = ServerState({**state.adapter, **updates[0].tensors}, state.auxiliary)
    assert_close(whole(after), whole(expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(after.adapter["head.weight"], expected.adapter["head.weight"])


def test_aggregate_ignores_the_order_of_updates(strategy, make_adapter, train, whole):
    state = strategy.init(make_adapter())
    updates = train(state)
    one, other = (strategy.aggregate(state, some) for some in (updates, updates[::-1]))
    assert_close(one.adapter, other.adapter)
    assert_close(whole(one), whole(other))
    for left, right in zip(map(apart, both(one)), map(apart, both(other)), strict=True):
        assert_close(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_aggregate_keeps_names_shapes_and_dtypes(strategy, make_adapter, train, dtype):
    adapter = make_adapter(dtype=dtype)
    state = strategy.init(adapter)
    for tensors in (state.adapter, strategy.aggregate(state, train(state)).adapter):
        assert tensors.keys() == adapter.keys()
        assert all(tensors[n].shape == adapter[n].shape for n in adapter)
        assert all(tensors[n].dtype == adapter[n].dtype for n in adapter)


def test_no_argument_is_changed(strategy, make_adapter, train):
    adapter = make_adapter()
    state = strategy.init(adapter)
    assert same(adapter, make_adapter())
    updates = train(state)
    before, sent = copied(state), [{k: v.clone() for k, v in u.tensors.items()} for u in updates]
    strategy.aggregate(state, updates)
    assert all(same(x, y) for x, y in zip(both(before), both(state), strict=True))
    assert all(same(x, u.tensors) for x, u in zip(sent, updates, strict=True))


def test_updates_are_read_once_and_lazily(strategy, make_adapter, train):
    state = strategy.init(make_adapter())
    expected = strategy.aggregate(state, train(state))
    assert same(strategy.aggregate(state, (u for u in train(state))).adapter, expected.adapter)


def test_updates_of_another_version_may_be_moved_onto_this_one_if_the_strategy_says_so(
    strategy, make_adapter, train
):
    """Additive: what is not trained stays, and a shift of adapter and updates shifts the result.

    And the next round asks for the same tensors, and tells nothing else that they depend on.
    """
    state = strategy.init(make_adapter(dtype=torch.float64))
    updates = train(state)
    trained = updates[0].tensors.keys()
    generator = torch.Generator().manual_seed(9)
    shift = {n: torch.randn(state.adapter[n].shape, generator=generator) for n in sorted(trained)}

    def shifted(tensors):
        return {n: t + shift[n].to(t.dtype) if n in shift else t for n, t in tensors.items()}

    moved_state = ServerState(shifted(state.adapter), state.auxiliary)
    moved = [replace(u, tensors=shifted(u.tensors)) for u in updates]
    result = strategy.aggregate(state, updates).adapter
    after = strategy.aggregate(moved_state, moved).adapter

    now, later = (
        strategy.broadcast(s, ClientSpec("a")) for s in (state, strategy.aggregate(state, updates))
    )
    told = same(now.extra, later.extra) and same(now.mask, later.mask)
    alike = now.trainable == later.trainable and told
    kept = all(torch.equal(result[n], t) for n, t in state.adapter.items() if n not in trained)
    along = all(torch.allclose(after[n], t) for n, t in shifted(result).items())
    assert (kept and along and alike) is ("additive" in strategy.capabilities)


def test_some_of_what_is_trained_stays_at_the_client_if_the_strategy_says_so(
    strategy, make_adapter, train
):
    state = strategy.init(make_adapter())
    sent = strategy.broadcast(state, ClientSpec("a"))
    own = {
        n
        for n in sent.tensors
        if re.fullmatch(sent.trainable, n) and re.fullmatch(sent.personal, n)
    }
    after = strategy.aggregate(state, train(state)).adapter
    assert bool(own) is ("personal" in strategy.capabilities)
    assert all(torch.equal(after[n], state.adapter[n]) for n in own)


def test_a_round_without_updates_leaves_the_adapter_as_it_is(strategy, make_adapter):
    state = strategy.init(make_adapter())
    assert same(strategy.aggregate(state, []).adapter, state.adapter)


def test_tensors_that_the_strategy_does_not_know_are_kept(strategy, make_adapter, train):
    """Such as what lies beneath a version that another strategy made."""
    state = strategy.init(make_adapter())
    state = replace(state, auxiliary={**state.auxiliary, "of another": torch.arange(3)})
    for updates in (train(state), []):
        after = strategy.aggregate(state, updates).auxiliary
        assert torch.equal(after["of another"], torch.arange(3))


def test_something_lies_beneath_only_if_the_strategy_says_so(strategy, make_adapter, train):
    state = strategy.aggregate(s := strategy.init(make_adapter()), train(s))
    assert bool(beneath(state.auxiliary)) is ("beneath" in strategy.capabilities)


def test_a_round_in_which_nobody_moves_keeps_the_adapter_and_what_lies_beneath_together(
    strategy, make_adapter, train, whole
):
    if "beneath" not in strategy.capabilities:
        pytest.skip("it does not say so")
    state = strategy.aggregate(s := strategy.init(make_adapter()), train(s))
    still = [replace(u, tensors={n: state.adapter[n] for n in u.tensors}) for u in train(state)]
    assert_close(whole(strategy.aggregate(state, still)), whole(state), rtol=1e-5, atol=1e-5)


def test_an_exact_strategy_makes_the_mean_of_the_products(
    strategy, make_adapter, train, products, whole
):
    if "exact" not in strategy.capabilities:
        pytest.skip("it does not say so")
    adapter = make_adapter(dtype=torch.float64, layers={"small": (3, 5)})  # any rank fits into 4
    state = strategy.init(adapter)
    for _ in range(2):
        updates = train(state)
        clients = [ServerState({**state.adapter, **u.tensors}, state.auxiliary) for u in updates]
        total = sum(u.num_examples for u in updates)
        parts = [
            whole(c)["small"] * (u.num_examples / total)
            for c, u in zip(clients, updates, strict=True)
        ]
        state = strategy.aggregate(state, updates)
        assert_close(whole(state)["small"], sum(parts), rtol=0, atol=1e-10)


def test_clients_may_have_ranks_of_their_own_if_the_strategy_says_so(
    strategy, make_adapter, make_update
):
    state = strategy.init(make_adapter())
    if "any-rank" not in strategy.capabilities:
        pytest.skip("it does not say so")
    updates = []
    for rank, client in ((1, "a"), (2, "b"), (4, "c")):
        sent = strategy.broadcast(state, ClientSpec(client, rank=rank))
        again = strategy.broadcast(state, ClientSpec("like it", rank=rank))
        assert sent.tensors is again.tensors
        assert sent.tensors.keys() == state.adapter.keys()
        for name, tensor in sent.tensors.items():
            axis = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
            assert axis is None or tensor.shape[axis] == rank
            assert axis is not None or torch.equal(tensor, state.adapter[name])
        trained = {n: t + 1.0 for n, t in sent.tensors.items() if re.fullmatch(sent.trainable, n)}
        updates.append(make_update(trained, client))
    after = strategy.aggregate(state, updates).adapter
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in state.adapter.items()}
    assert strategy.broadcast(state, ClientSpec("d", rank=9)).tensors is state.adapter
    assert all(torch.isfinite(t).all() for t in after.values())


def test_a_streaming_strategy_keeps_a_few_updates_however_many_there_are(
    strategy, make_adapter, train
):
    if "streaming" not in strategy.capabilities:
        pytest.skip("it does not say so")
    state = strategy.init(make_adapter())
    gone = []

    def one_at_a_time():
        for update in train(state) * 20:
            copy = replace(update, tensors={n: t.clone() for n, t in update.tensors.items()})
            gone.append([weakref.ref(t) for t in copy.tensors.values()])
            yield copy
            del copy
            kept = sum(any(ref() is not None for ref in refs) for refs in gone)
            assert kept <= 16, f"of {len(gone)}"

    strategy.aggregate(state, one_at_a_time())
    assert len(gone) == 20 * len(COUNTS)


def test_aggregate_is_deterministic(strategy, make_adapter, train):
    state = strategy.init(make_adapter())
    first, second = (strategy.aggregate(state, train(state)) for _ in range(2))
    assert all(same(x, y) for x, y in zip(both(first), both(second), strict=True))


def test_a_run_continued_from_saved_state_is_the_same_run(strategy, make_adapter, train):
    state = strategy.aggregate(s := strategy.init(make_adapter()), train(s))
    restored = ServerState(*(load(save(dict(t))) for t in both(state)))
    on, again = (strategy.aggregate(s, train(s)) for s in (state, restored))
    assert all(same(x, y) for x, y in zip(both(on), both(again), strict=True))


def test_all_clients_hold_the_factor_that_is_not_trained_if_the_strategy_says_so(
    strategy, make_adapter
):
    state = strategy.init(make_adapter())
    one, other = (strategy.broadcast(state, ClientSpec(client)) for client in "ab")
    trained = {n for n in one.tensors if re.fullmatch(one.trainable, n)}
    both_trained = [
        n for n in trained if n.replace("lora_A", "lora_B") in trained and "lora_A" in n
    ]
    alike = same(one.tensors, other.tensors) and one.trainable == other.trainable
    shared = alike and not both_trained and not one.personal
    assert shared or "shared-gauge" not in strategy.capabilities


def test_clients_choose_which_ranks_they_send_if_the_strategy_says_so(strategy, make_adapter):
    sent = strategy.broadcast(strategy.init(make_adapter()), ClientSpec("a"))
    told = bool(budget_of(sent.extra) or pruning_of(sent.extra))
    assert told is ("selects" in strategy.capabilities)


def test_an_update_of_weight_two_counts_like_two_of_it(strategy, make_adapter, train):
    """Rules hand their weights on to what they wrap by it, and may count otherwise themselves."""
    state = strategy.init(make_adapter(dtype=torch.float64))
    first, *others = train(state)
    weighed = strategy.aggregate(state, [replace(first, weight=2.0), *others]).adapter
    twice = strategy.aggregate(state, [first, replace(first, client="aa"), *others]).adapter
    alike = all(torch.allclose(weighed[n], t, atol=1e-9) for n, t in twice.items())
    assert alike or not strategy.capabilities & {"exact", "streaming"}


def test_a_library_changes_how_a_run_starts_if_the_strategy_says_so(strategy, make_adapter):
    adapter = make_adapter()
    own = {n: t for n, t in adapter.items() if not n.startswith("head.") and "core" not in n}
    one_entry = {n: t * (torch.arange(t.numel()).reshape(t.shape) == 0) for n, t in own.items()}
    library = [{n: one_entry[n] if ".lora_B." in n else t for n, t in own.items()}]
    without, given = (strategy.init(adapter, Setting(library=some)) for some in ((), library))
    alike = all(same(x, y) for x, y in zip(both(without), both(given), strict=True))
    assert alike is ("recycles" not in strategy.capabilities)


def test_the_mean_of_the_updates_does_as_well_as_they_do_if_the_strategy_says_so(
    strategy, make_adapter, train
):
    """Client-level DP hands on nothing but a noised mean."""
    if "mean-only" not in strategy.capabilities:
        pytest.skip("it does not say so")
    state = strategy.aggregate(s := strategy.init(make_adapter(dtype=torch.float64)), train(s))
    updates = train(state)
    total = sum(u.num_examples for u in updates)
    mean = {
        n: sum(u.tensors[n] * (u.num_examples / total) for u in updates) for n in updates[0].tensors
    }
    one = strategy.aggregate(state, [replace(updates[0], client="", tensors=mean)])
    for left, right in zip(both(one), both(strategy.aggregate(state, updates)), strict=True):
        assert_close(left, right)


def test_the_plugin_has_a_summary_and_a_source(name):
    assert STRATEGIES.get(name).summary.endswith(".")
    assert STRATEGIES.get(name).source
