"""LoRI: masked B's, side by side and in one."""

import pytest
import torch
from torch.testing import assert_close

from strategies.merges.lori import lori
from strategies.terms import BadMerge

LAYER = "encoder.query"


@pytest.fixture
def masked(make_adapter):
    """Adapters of one A whose B's have every third entry, the next task the next."""
    first = make_adapter(0, head=False)
    shared = {n: t for n, t in first.items() if ".lora_A." in n}
    made = []
    for task in range(3):
        own = {**make_adapter(task, head=False, scaling=2.0**task), **shared}
        for name in [n for n in own if ".lora_B." in n]:
            places = torch.arange(own[name].numel()).reshape(own[name].shape)
            own[name] = own[name] * (places % 3 == task)
        made.append(own)
    return made


def test_disjoint_masks_add_up_in_one_b_of_the_rank_of_one(masked, products):
    merged = lori(masked, [1.0, 0.5, -1.0], form="linear")
    parts = [products(one)[LAYER] for one in masked]
    assert_close(products(merged)[LAYER], parts[0] + 0.5 * parts[1] - parts[2])
    assert len(merged[f"{LAYER}.lora_A.weight"]) == 4
    assert merged.metrics == {"mask_overlap": 0}


def test_both_forms_are_one_product(masked, products):
    cat, linear = (lori(masked, [0.4] * 3, form=form) for form in ("cat", "linear"))
    assert_close(products(cat)[LAYER], products(linear)[LAYER], rtol=1e-5, atol=1e-5)


def test_an_entry_that_several_use_can_be_that_of_largest_magnitude(masked, products):
    twice = {n: t * 2 if n.endswith(".scaling") else t for n, t in masked[0].items()}
    merged = lori([masked[0], twice], [1.0, 1.0], form="linear", overlap="largest")
    assert_close(products(merged)[LAYER], products(twice)[LAYER])
    assert merged.metrics == {"mask_overlap": 1}


def test_adapters_that_were_trained_whole_can_be_masked_here(make_adapter):
    adapters = [make_adapter(seed, head=False) for seed in range(2)]
    merged = lori(adapters, [1.0, 1.0], sparsity=0.75)
    kept = sum(int((t != 0).sum()) for n, t in merged.items() if ".lora_B." in n)
    total = sum(t.numel() for one in adapters for n, t in one.items() if ".lora_B." in n)
    assert kept == total // 4


def test_different_a_s_are_refused_in_one_b(make_adapter):
    adapters = [make_adapter(seed, head=False) for seed in range(2)]
    with pytest.raises(BadMerge, match=r"needs adapters with one lora_A, but at 'encoder\.query'"):
        lori(adapters, [1.0, 1.0], form="linear")


def test_the_largest_of_an_overlap_needs_one_b(masked):
    with pytest.raises(BadMerge, match="only form: linear has"):
        lori(masked, [1.0] * 3, overlap="largest")
