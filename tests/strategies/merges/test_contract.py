"""What every merge owes its callers. A new merge is tested by existing."""

import sys

import pytest
import torch
from safetensors.torch import load, save
from torch.testing import assert_close

from strategies.merges import MERGES
from strategies.plugins import BadOptions

pytestmark = pytest.mark.parametrize("name", MERGES.names())


@pytest.fixture
def merge(name):
    """The merge at the options where it is a weighted sum."""
    plugin = MERGES.get(name)
    options = sys.modules[plugin.factory.__module__].MEAN_OPTIONS
    return lambda adapters, weights: plugin.build(adapters, weights, **options)


@pytest.fixture
def relatives(make_adapter):
    """Three adapters that any merge takes: they share A."""

    def make(**options):
        adapters = [make_adapter(seed, head=False, **options) for seed in range(3)]
        shared = {n: t for n, t in adapters[0].items() if ".lora_A." in n}
        return [{**adapter, **shared} for adapter in adapters]

    return make


def test_merging_copies_of_x_gives_x(merge, make_adapter, products):
    adapter = make_adapter(head=False)
    merged = merge([adapter] * 3, [0.2, 0.3, 0.5])
    assert_close(products(merged), products(adapter), rtol=1e-5, atol=1e-5)


def test_merging_one_adapter_is_the_identity(merge, make_adapter, products):
    adapter = make_adapter(head=False)
    assert_close(products(merge([adapter], [1.0])), products(adapter), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_weight_0_does_not_matter(merge, relatives, products):
    adapters = relatives()
    merged = merge(adapters, [0.0, 1.0, 0.0])
    assert_close(products(merged), products(adapters[1]), rtol=1e-5, atol=1e-5)


def test_the_order_of_adapters_does_not_matter(merge, relatives, products):
    adapters, weights = relatives(), [0.2, -0.3, 1.5]
    forth, back = merge(adapters, weights), merge(adapters[::-1], weights[::-1])
    assert_close(products(forth), products(back), rtol=1e-5, atol=1e-4)


def test_the_result_has_low_rank_layers_of_the_same_base(merge, relatives):
    adapters = relatives()
    merged = merge(adapters, [0.5, 0.25, 0.25])
    assert merged.keys() == adapters[0].keys()
    for layer in ("encoder.query", "encoder.value"):
        a, b = merged[f"{layer}.lora_A.weight"], merged[f"{layer}.lora_B.weight"]
        assert a.shape[0] == b.shape[1]
        assert a.shape[1] == adapters[0][f"{layer}.lora_A.weight"].shape[1]
        assert b.shape[0] == adapters[0][f"{layer}.lora_B.weight"].shape[0]
        assert merged[f"{layer}.scaling"].shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_are_kept(merge, relatives, dtype):
    merged = merge(relatives(dtype=dtype), [0.5, 0.25, 0.25])
    assert {t.dtype for n, t in merged.items() if ".lora_" in n} == {dtype}
    assert all(t.dtype == torch.float32 for n, t in merged.items() if n.endswith(".scaling"))


def test_no_argument_is_changed(merge, relatives):
    adapters = relatives()
    merge(adapters, [0.5, 0.25, 0.25])
    for adapter, fresh in zip(adapters, relatives(), strict=True):
        assert all(torch.equal(adapter[n], fresh[n]) for n in fresh)


def test_merging_is_deterministic(merge, relatives):
    first, second = (merge(relatives(), [0.5, 0.25, 0.25]) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_the_result_can_be_saved(merge, relatives):
    merged = merge(relatives(), [0.5, 0.25, 0.25])
    assert_close(load(save(merged)), merged, rtol=0, atol=0)


def test_the_result_can_be_merged_again(merge, relatives, products):
    merged = merge(relatives(), [0.5, 0.25, 0.25])
    again = merge([merged, merged], [0.5, 0.5])
    assert_close(products(again), products(merged), rtol=1e-5, atol=1e-5)


def test_adapters_of_different_base_models_are_refused(merge, make_adapter):
    adapters = [
        make_adapter(head=False, layers={"q": (8, 16)}),
        make_adapter(head=False, layers={"q": (8, 24)}),
    ]
    message = r"'q' is \[8, 16\] in adapter 0, \[8, 24\] in adapter 1: .* different base models"
    with pytest.raises(BadOptions, match=message):
        merge(adapters, [0.5, 0.5])


def test_a_head_is_refused_by_name(merge, make_adapter):
    with pytest.raises(BadOptions, match=r"adapter 1 has 'head\.bias', which is no part"):
        merge([make_adapter(head=False), make_adapter()], [0.5, 0.5])


def test_an_incomplete_adapter_is_refused_by_number(merge, make_adapter):
    broken = make_adapter(head=False)
    del broken["encoder.query.scaling"]
    with pytest.raises(BadOptions, match=r"adapter 1 cannot be merged: .*'encoder\.query\.scal"):
        merge([make_adapter(head=False), broken], [0.5, 0.5])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "2 adapters and 1 weights"),
        ([0.0, 0.0], "nothing to merge"),
        ([1.0, float("nan")], "weight 1 is nan"),
    ],
)
def test_weights_that_do_not_fit_are_refused(merge, make_adapter, weights, message):
    with pytest.raises(BadOptions, match=message):
        merge([make_adapter(head=False)] * 2, weights)


def test_the_plugin_has_a_summary_and_a_source(name):
    assert MERGES.get(name).summary.endswith(".")
    assert MERGES.get(name).source
