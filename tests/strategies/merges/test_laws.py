"""What is true of every merge, whatever the ranks, scalings, weights and gauge of the factors."""

import math
import sys
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch.testing import assert_close

from strategies.energy import captured_energy
from strategies.merges import MERGES

pytestmark = pytest.mark.parametrize("name", MERGES.names())
LAYERS = ("q", "v")
few = settings(max_examples=8, deadline=None, derandomize=True)


@st.composite
def cases(draw):
    """Adapters of one A, which every merge takes, with the scalings of LoRA and of rsLoRA."""
    number, rank = draw(st.integers(2, 3)), draw(st.integers(1, 3))
    out, width = draw(st.integers(3, 7)), draw(st.integers(3, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared = {f"{layer}.lora_A.weight": drawn(rank, width) for layer in LAYERS}
    adapters = []
    for _ in range(number):
        alpha, rs = draw(st.integers(1, 32)), draw(st.booleans())
        scaling = torch.tensor(alpha / (math.sqrt(rank) if rs else rank), dtype=torch.float64)
        own = {f"{layer}.lora_B.weight": drawn(out, rank) for layer in LAYERS}
        adapters.append({**shared, **own, **{f"{layer}.scaling": scaling for layer in LAYERS}})
    size = st.floats(0.1, 2)
    weights = draw(st.lists(size, min_size=number, max_size=number))
    return adapters, weights


def merge(name, adapters, weights):
    """Merge at the options where copies merge into themselves."""
    plugin = MERGES.get(name)
    options = sys.modules[plugin.factory.__module__].MEAN_OPTIONS
    return plugin.build(adapters, weights, **options)


def products(tensors):
    return {
        layer: tensors[f"{layer}.scaling"].double()
        * tensors[f"{layer}.lora_B.weight"].double()
        @ tensors[f"{layer}.lora_A.weight"].double()
        for layer in LAYERS
    }


def same(one, other):
    for layer, wanted in products(other).items():
        size = float(wanted.norm())
        assert_close(products(one)[layer], wanted, rtol=1e-6, atol=1e-6 * size + 1e-12)


def turned(adapter, turn):
    """The same products in another gauge."""
    found = dict(adapter)
    for layer in LAYERS:
        a, b = adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"]
        gauge = torch.linalg.qr(torch.eye(len(a), dtype=a.dtype) + turn).Q * 3
        found[f"{layer}.lora_A.weight"] = gauge @ a
        found[f"{layer}.lora_B.weight"] = b @ torch.linalg.inv(gauge)
    return found


def scaled(merged, factor):
    return {n: t * factor if n.endswith(".scaling") else t for n, t in merged.items()}


@given(case=cases())
@few
def test_copies_whose_weights_sum_to_1_give_the_adapter(name, case):
    (adapter, *_), weights = case
    copies = [adapter] * len(weights)
    same(merge(name, copies, [w / sum(weights) for w in weights]), adapter)
    same(merge(name, [adapter], [1.0]), adapter)


@given(case=cases(), factor=st.floats(0.25, 4))
@few
def test_weights_scale_the_product_or_only_their_ratios_count_as_declared(name, case, factor):
    adapters, weights = case
    declared = sys.modules[MERGES.get(name).factory.__module__].WEIGHTS
    more = merge(name, adapters, [w * factor for w in weights])
    same(more, scaled(merge(name, adapters, weights), {"sums": factor, "ratios": 1}[declared]))


@given(case=cases())
@few
def test_negated_weights_give_the_negated_product(name, case):
    """Unlearning by negation, as far as a method has it: of one adapter, every one does."""
    (adapter, *_), _ = case
    same(merge(name, [adapter], [-1.0]), scaled(adapter, -1))


@given(case=cases())
@few
def test_no_order_of_adapters_changes_the_product(name, case):
    adapters, weights = case
    first = merge(name, adapters, weights)
    for order in permutations(range(len(adapters))):
        same(merge(name, [adapters[i] for i in order], [weights[i] for i in order]), first)


@given(case=cases(), seed=st.integers(0, 100))
@few
def test_the_gauge_of_the_factors_does_not_reach_the_product(name, case, seed):
    """``(B G^-1)(G A)`` is the same model: what is merged on factors, as PEFT does, fails here."""
    adapters, weights = case
    rank = len(adapters[0]["q.lora_A.weight"])
    turn = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed)).double()
    same(
        merge(name, [turned(one, turn) for one in adapters], weights),
        merge(name, adapters, weights),
    )


@given(case=cases())
@few
def test_a_scaling_counts_as_if_it_were_in_the_factors(name, case):
    adapters, weights = case
    plain = []
    for adapter in adapters:
        b = {n: t * adapter["q.scaling"] for n, t in adapter.items() if ".lora_B." in n}
        one = {n: torch.ones_like(t) for n, t in adapter.items() if n.endswith(".scaling")}
        plain.append({**adapter, **b, **one})
    same(merge(name, plain, weights), merge(name, adapters, weights))


@given(case=cases())
@few
def test_what_is_saved_and_loaded_is_the_same_and_its_energy_a_share(name, case):
    adapters, weights = case
    merged = merge(name, adapters, weights)
    loaded = load(save(dict(merged)))
    assert loaded.keys() == merged.keys()
    assert all(torch.equal(loaded[n], t) for n, t in merged.items())
    assert all(0 <= share <= 1 for share in captured_energy(adapters, weights, loaded).values())
