import pytest
import torch
from torch.testing import assert_close

from strategies.base import Setting
from strategies.directions import summed, with_task
from strategies.sd_lora import SDLoRA
from strategies.tensors import NotLowRank

QUERY = "encoder.query"
A, B, MAGNITUDES = (
    f"{QUERY}.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_magnitudes")
)
PAST_A, PAST_B = f"{QUERY}.past_A.weight", f"{QUERY}.past_B.weight"


@pytest.fixture
def learned(make_adapter):
    return make_adapter(1, rank=2, magnitudes=True, dtype=torch.float64)


def test_a_new_task_leaves_the_product_and_begins_at_zero(learned, products):
    begun = with_task(learned, seed=3)
    assert_close(products(summed(begun)), products(learned))
    assert not begun[B].any()
    assert begun[A].abs().max() <= 12**-0.5
    assert begun[MAGNITUDES][-1] == 1


def test_what_was_learned_is_a_direction_whose_magnitude_is_the_norm_of_its_factors(learned):
    begun = with_task(learned, seed=3)
    assert_close(begun[PAST_A], learned[A] / learned[A].norm())
    assert_close(begun[PAST_B], learned[B] / learned[B].norm())
    wanted = learned[MAGNITUDES][0] * learned[A].norm() * learned[B].norm()
    assert_close(begun[MAGNITUDES][0], wanted)


def test_earlier_directions_stay_bit_identical_when_a_third_task_begins(learned, products):
    second = with_task(learned, seed=3)
    second[B] = torch.ones_like(second[B])
    third = with_task(second, seed=4)
    assert third[PAST_A].shape == (4, 12)
    assert third[MAGNITUDES].shape == (3,)
    assert torch.equal(third[PAST_A][:2], second[PAST_A])
    assert torch.equal(third[PAST_B][:, :2], second[PAST_B])
    assert torch.equal(third[MAGNITUDES][:1], second[MAGNITUDES][:1])
    assert_close(products(summed(third)), products(summed(second)))


def test_an_adapter_that_learned_nothing_is_still_at_its_first_task(make_adapter):
    fresh = make_adapter(magnitudes=True)
    fresh = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in fresh.items()}
    begun = SDLoRA().init(fresh, Setting(seed=1)).adapter
    assert begun.keys() == fresh.keys()
    assert all(torch.equal(begun[n], fresh[n]) for n in fresh)


def test_going_on_with_a_task_changes_nothing(learned):
    kept = SDLoRA(new_task=False).init(learned).adapter
    assert all(torch.equal(kept[n], learned[n]) for n in learned)


def test_the_new_pair_follows_from_the_seed_and_the_layer(learned):
    one, same, other = (with_task(learned, seed)[A] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, with_task(learned, 1)["encoder.value.lora_A.weight"])


def test_an_adapter_without_magnitudes_is_refused(make_adapter):
    with pytest.raises(NotLowRank, match=r"'encoder\.query' has no magnitudes .* adapter sd-lora"):
        SDLoRA().init(make_adapter())
