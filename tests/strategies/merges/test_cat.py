import torch
from torch.testing import assert_close

from strategies.merges.cat import cat


def test_factors_are_stacked_with_weight_and_scaling_in_b():
    one = {
        "q.lora_A.weight": torch.tensor([[1.0, 2.0]]),
        "q.lora_B.weight": torch.tensor([[3.0]]),
        "q.scaling": torch.tensor(2.0),
    }
    two = {
        "q.lora_A.weight": torch.tensor([[5.0, 6.0]]),
        "q.lora_B.weight": torch.tensor([[7.0]]),
        "q.scaling": torch.tensor(0.5),
    }
    merged = cat([one, two], [0.5, -2.0])
    assert_close(merged["q.lora_A.weight"], torch.tensor([[1.0, 2.0], [5.0, 6.0]]))
    assert_close(merged["q.lora_B.weight"], torch.tensor([[3.0, -7.0]]))
    assert merged["q.scaling"] == 1.0


def test_unequal_ranks_and_scalings_sum_exactly(make_adapter, products):
    # 8 / 2, and rsLoRA's 8 / sqrt(16), which PEFT 0.21 gets wrong by the root of the new rank
    narrow = make_adapter(1, rank=2, scaling=4.0, dtype=torch.float64, head=False)
    wide = make_adapter(2, rank=16, scaling=2.0, dtype=torch.float64, head=False)
    merged = products(cat([narrow, wide], [0.3, 0.7]))
    for layer, product in merged.items():
        assert_close(product, 0.3 * products(narrow)[layer] + 0.7 * products(wide)[layer])


def test_a_layer_that_one_adapter_has_not_counts_as_zero_there(make_adapter, products):
    both = make_adapter(1, head=False)
    one = make_adapter(2, head=False, layers={"encoder.value": (9, 12)})
    merged = cat([both, one], [0.5, 0.5])
    assert_close(products(merged)["encoder.query"], 0.5 * products(both)["encoder.query"])
    assert merged["encoder.query.lora_A.weight"].shape[0] == 4
    assert merged["encoder.value.lora_A.weight"].shape[0] == 8


def test_the_weight_minus_1_negates(make_adapter, products):
    adapter = make_adapter(head=False)
    negated = products(cat([adapter], [-1.0]))
    assert all(torch.equal(negated[layer], -p) for layer, p in products(adapter).items())


def test_the_product_is_linear_in_the_weights(make_adapter, products):
    adapters = [make_adapter(seed, dtype=torch.float64, head=False) for seed in range(2)]
    x, y, both = (products(cat(adapters, w)) for w in ([0.5, 2.0], [1.0, -3.0], [1.5, -1.0]))
    assert all(torch.allclose(x[n] + y[n], both[n]) for n in both)


def test_merged_and_single_adapters_move_the_base_alike(make_adapter, products):
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(12, 7, dtype=torch.float64)
    inputs = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    adapters = [make_adapter(seed, dtype=torch.float64, head=False) for seed in range(2)]
    name, weights = "encoder.query", [0.5, 2.0]
    merged = cat(adapters, weights)
    outputs = base(inputs) + sum(
        w * inputs @ products(x)[name].T for x, w in zip(adapters, weights, strict=True)
    )
    with torch.no_grad():
        base.weight += merged[f"{name}.lora_B.weight"] @ merged[f"{name}.lora_A.weight"]
    assert_close(base(inputs), outputs)


def test_an_adapter_of_weight_0_takes_no_rank(make_adapter):
    adapters = [make_adapter(seed, head=False) for seed in range(2)]
    assert cat(adapters, [1.0, 0.0])["encoder.query.lora_A.weight"].shape[0] == 4
