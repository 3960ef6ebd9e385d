from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from strategies.base import ClientSpec, Setting
from strategies.cores import cored_layers
from strategies.eigenlorax import EigenLoRAx
from strategies.library import BadLibrary

LAYERS = "encoder.query", "encoder.value"


@pytest.fixture
def library(make_adapter):
    """Two adapters of other ranks and scalings, and so of three directions in all."""
    return [
        make_adapter(11, rank=1, scaling=0.5, head=False, dtype=torch.float64),
        make_adapter(12, rank=2, scaling=3.0, head=False, dtype=torch.float64),
    ]


@pytest.fixture
def adapter(make_adapter):
    """An adapter with a core of zeros."""

    def make(rank=4, seed=0, **options):
        made = make_adapter(seed, rank=rank, core=True, dtype=torch.float64, **options)
        return {n: torch.zeros_like(t) if "lora_core" in n else t for n, t in made.items()}

    return make


def started(adapter, library, strategy=None, seed=0):
    setting = Setting(seed=seed, library=library)
    return (strategy or EigenLoRAx()).init(adapter, setting)


def test_both_bases_are_orthonormal_and_the_start_changes_nothing(adapter, library, products):
    state = started(adapter(), library)
    for layer in cored_layers(state.adapter).values():
        eye = torch.eye(4, dtype=torch.float64)
        assert_close(layer.b.T @ layer.b, eye, rtol=0, atol=1e-10)
        assert_close(layer.a @ layer.a.T, eye, rtol=0, atol=1e-10)
    assert not any(made.any() for made in products(state.adapter).values())


def test_every_adapter_of_the_library_can_be_written_as_a_core(adapter, library, products):
    state = started(adapter(), library)
    assert state.metrics["captured_energy"] == pytest.approx(1.0)
    for member in library:
        for name, dense in products(member).items():
            layer = cored_layers(state.adapter)[name]
            core = layer.b.T @ dense @ layer.a.T
            assert_close(layer.b @ core @ layer.a, dense, rtol=0, atol=1e-10)


def test_too_low_a_rank_keeps_the_strongest_directions_and_says_how_much(adapter, library):
    state = started(adapter(rank=2), library)
    shares = [state.metrics[f"captured_energy/{layer}"] for layer in LAYERS]
    assert all(0.5 < share < 1 for share in shares)
    one = started(adapter(rank=2), library[1:])
    assert one.metrics["captured_energy"] == pytest.approx(1.0)


def test_random_directions_take_the_place_of_the_weakest(adapter, library):
    plain, mixed = (
        cored_layers(started(adapter(), library, EigenLoRAx(random=random)).adapter)
        for random in (0, 3)
    )
    for name in LAYERS:
        assert_close(plain[name].b[:, :1], mixed[name].b[:, :1])
        assert not torch.allclose(plain[name].b[:, 1], mixed[name].b[:, 1])
    other = cored_layers(started(adapter(), library, EigenLoRAx(random=3), seed=1).adapter)
    assert not torch.allclose(mixed[LAYERS[0]].b[:, 1:], other[LAYERS[0]].b[:, 1:])


def test_the_directions_depend_on_neither_order_nor_drawn_factors(adapter, library):
    one, other = started(adapter(), library), started(adapter(seed=5), library[::-1])
    for name in (n for n in one.adapter if "lora" in n):
        assert_close(one.adapter[name], other.adapter[name], rtol=0, atol=1e-9)


def test_layers_that_the_library_has_not_keep_their_factors(adapter, library):
    given = [{n: t for n, t in one.items() if "query" in n} for one in library]
    begun = adapter()
    state = started(begun, given)
    assert state.adapter["encoder.value.lora_A.weight"] is begun["encoder.value.lora_A.weight"]
    assert "captured_energy/encoder.value" not in state.metrics


def test_the_mean_of_cores_is_the_mean_of_the_products(adapter, library, products, make_update):
    strategy = EigenLoRAx()
    state = started(adapter(), library, strategy)
    assert strategy.broadcast(state, ClientSpec("a")).tensors is state.adapter
    updates = []
    for index, (client, count) in enumerate((("a", 1), ("b", 3))):
        cores = {n: t + index + 1 for n, t in state.adapter.items() if "lora_core" in n}
        updates.append(make_update(cores, client, count))
    after = products(strategy.aggregate(state, updates).adapter)
    first, second = (products({**state.adapter, **u.tensors}) for u in updates)
    for name in LAYERS:
        mean = (first[name] + 3 * second[name]) / 4
        assert_close(after[name], mean, rtol=0, atol=1e-10)


def test_a_run_that_goes_on_takes_its_core_into_the_extended_directions(adapter, library, products):
    begun = adapter(rank=4)
    small = {**begun, **{n: t.clone() for n, t in begun.items() if "lora_core" in n}}
    for name in LAYERS:
        small[f"{name}.lora_core.weight"][0, 0] = 5.0  # one direction, and the library has three
    state = started(small, library)
    before, after = products(small), products(state.adapter)
    for name in LAYERS:
        assert_close(after[name], before[name], rtol=0, atol=1e-9)
    assert state.metrics["carried_energy"] == pytest.approx(1.0)
    assert state.metrics["captured_energy"] == pytest.approx(1.0)


def test_a_core_that_does_not_fit_beside_the_library_is_cut_and_told(adapter, library):
    begun = adapter(rank=4)
    full = {n: torch.eye(4).double() if "lora_core" in n else t for n, t in begun.items()}
    metrics = started(full, library).metrics
    assert 0 < metrics["carried_energy"] < 1
    assert 0 < metrics["captured_energy"] < 1


def test_a_rank_grows_until_the_directions_keep_the_energy(adapter, library, products):
    begun = adapter(rank=4)
    full = {n: torch.eye(4).double() if "lora_core" in n else t for n, t in begun.items()}
    state = started(full, library, EigenLoRAx(energy=1.0))  # 4 directions, and the library's 3
    before, after = products(full), products(state.adapter)
    for name in LAYERS:
        assert len(state.adapter[f"{name}.lora_core.weight"]) == 7
        assert_close(after[name], before[name], rtol=0, atol=1e-9)
    assert state.metrics["carried_energy"] == pytest.approx(1.0)
    assert state.metrics["captured_energy"] == pytest.approx(1.0)


def test_a_rank_does_not_grow_where_the_directions_keep_enough(adapter, library):
    kept = started(adapter(rank=2), library).metrics["captured_energy"]
    for energy, rank in ((kept / 2, 2), (1.0, 3), (1e-9, 2)):
        state = started(adapter(rank=2), library, EigenLoRAx(energy=energy))
        assert {len(core.core) for core in cored_layers(state.adapter).values()} == {rank}


def test_a_rank_grows_no_further_than_the_layer(adapter, make_adapter):
    library = [make_adapter(3, rank=5, head=False, layers={"q": (4, 6)}, dtype=torch.float64)]
    small = adapter(rank=3, layers={"q": (4, 6)})
    state = started(small, library, EigenLoRAx(energy=1.0, random=1))
    assert state.adapter["q.lora_core.weight"].shape == (4, 4)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda one: {n.replace("encoder", "decoder"): t for n, t in one.items()}, "none of the"),
        (lambda one: {n: t.repeat(2, 1) if "B" in n else t for n, t in one.items()}, r"\[14, 12\]"),
    ],
)
def test_a_library_of_other_layers_is_refused(adapter, library, change, why):
    with pytest.raises(BadLibrary, match=f"adapter 2 of the library has .*{why}"):
        started(adapter(), [library[0], change(library[1])])


@pytest.mark.parametrize(("rank", "random"), [(8, 0), (3, 3)])
def test_a_rank_without_place_for_directions_is_refused(adapter, library, rank, random):
    with pytest.raises(BadLibrary, match=f"has rank {rank}, of which {random} directions"):
        started(adapter(rank=rank), library, replace(EigenLoRAx(), random=random))
