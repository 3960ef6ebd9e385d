"""SLERP against its formula on dense vectors."""

import pytest
import torch
from torch.testing import assert_close

from strategies.merges import MERGES
from strategies.merges.slerp import slerp
from strategies.plugins import BadOptions

LAYER = "encoder.query"


@pytest.fixture
def adapters(make_adapter):
    return [
        make_adapter(1, head=False, dtype=torch.float64, scaling=0.5),
        make_adapter(2, head=False, dtype=torch.float64, rank=2),
    ]


def by_formula(x, y, t):
    angle = torch.acos((x * y).sum() / (x.norm() * y.norm()))
    turned = torch.sin((1 - t) * angle) * x / x.norm() + torch.sin(t * angle) * y / y.norm()
    return turned / torch.sin(angle) * ((1 - t) * x.norm() + t * y.norm())


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_of_two_it_is_the_classical_slerp(adapters, products, t):
    merged = slerp(adapters, [1 - t, t])
    x, y = (products(one)[LAYER] for one in adapters)
    assert_close(products(merged)[LAYER], by_formula(x, y, t), rtol=1e-6, atol=1e-6)


def test_the_whole_model_turns_as_one_vector(adapters, products):
    x, y = (torch.cat([part.flatten() for part in products(one).values()]) for one in adapters)
    merged = products(slerp(adapters, [0.3, 0.7], scope="model"))
    found = torch.cat([part.flatten() for part in merged.values()])
    assert_close(found, by_formula(x, y, 0.7), rtol=1e-6, atol=1e-6)


def test_the_middle_of_three_at_right_angles_has_equal_shares(products):
    def row(*values):
        return {
            "q.lora_A.weight": torch.tensor([values]),
            "q.lora_B.weight": torch.ones(1, 1),
            "q.scaling": torch.tensor(1.0),
        }

    three = [row(3.0, 0.0, 0.0), row(0.0, 3.0, 0.0), row(0.0, 0.0, 3.0)]
    merged = products(slerp(three, [1.0, 1.0, 1.0]))["q"].float()
    assert_close(merged, torch.full((1, 3), 3 / 3**0.5))


def test_opposite_directions_are_refused(make_adapter):
    adapter = make_adapter(head=False)
    with pytest.raises(BadOptions, match="these cancel; merge with task-arithmetic"):
        MERGES.get("slerp").build([adapter, adapter], [1.0, -1.0])


def test_a_layer_that_was_never_trained_has_no_direction_and_counts_as_length_0(
    make_adapter, products
):
    adapter = make_adapter(head=False)
    zero = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in adapter.items()}
    merged = slerp([adapter, zero], [0.25, 0.75])
    assert_close(products(merged)[LAYER], 0.25 * products(adapter)[LAYER], rtol=1e-5, atol=1e-5)
    assert not products(slerp([zero, zero], [0.5, 0.5]))[LAYER].any()
