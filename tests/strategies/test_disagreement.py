"""Where adapters work against each other, beside the products formed whole."""

import pytest
import torch

from strategies import disagreement as module
from strategies.disagreement import conflicts
from strategies.tensors import lora_layers
from strategies.terms import BadMerge


def adapter(b, a, scaling=1.0, layer="q"):
    return {
        f"{layer}.lora_A.weight": torch.tensor(a),
        f"{layer}.lora_B.weight": torch.tensor(b),
        f"{layer}.scaling": torch.tensor(scaling),
    }


@pytest.fixture
def drawn(seeded):
    """Returns a function that draws an adapter of 7 x 5."""

    def make(seed, rank=2):
        generator = seeded(seed)
        b, a = (torch.randn(shape, generator=generator) for shape in ((7, rank), (rank, 5)))
        return adapter(b.tolist(), a.tolist(), scaling=0.5 + seed)

    return make


@pytest.fixture
def seeded():
    return lambda seed: torch.Generator().manual_seed(seed)


def dense(tensors):
    (factors,) = lora_layers(tensors).values()
    return factors.scaling * factors.b @ factors.a


@pytest.mark.parametrize("block", [1, 12, 1 << 20])
def test_signs_are_those_of_the_whole_products(drawn, monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    weights, adapters = (1.0, -0.5, 2.0), [drawn(seed) for seed in range(3)]
    parts = torch.stack([w * dense(x) for w, x in zip(weights, adapters, strict=True)])
    opposed = ((parts > 0).any(0) & (parts < 0).any(0)).float().mean()
    cancelled = 1 - parts.sum(0).abs().sum() / parts.abs().sum()

    (found,) = conflicts(adapters, weights)

    assert found.disagreement == pytest.approx(float(opposed))
    assert found.cancelled == pytest.approx(float(cancelled), abs=1e-5)
    assert found.adapters == (0, 1, 2)


def test_an_adapter_agrees_with_itself_and_not_with_its_opposite(drawn):
    (same,) = conflicts([drawn(1), drawn(1)], (1.0, 3.0))
    assert (same.disagreement, same.cancelled) == (0, pytest.approx(0, abs=1e-6))
    (against,) = conflicts([drawn(1), drawn(1)], (1.0, -1.0))
    assert (against.disagreement, against.cancelled) == (1, 1)
    for one in (same, against):
        assert (one.input_overlap, one.output_overlap) == (pytest.approx(1), pytest.approx(1))


def test_subspaces_overlap_by_the_directions_that_they_share():
    one = adapter([[1.0], [0.0]], [[1.0, 0.0, 0.0]])
    other = adapter([[0.0], [1.0]], [[1.0, 1.0, 0.0]])
    (found,) = conflicts([one, other], (1.0, 1.0))
    assert (found.input_overlap, found.output_overlap) == (pytest.approx(0.5), pytest.approx(0))
    assert (found.disagreement, found.cancelled) == (0, 0)


def test_a_layer_of_one_adapter_conflicts_with_nothing(drawn):
    alone = adapter([[1.0]], [[2.0]], layer="k")
    key, query = conflicts([drawn(1) | alone, drawn(2)], (1.0, 1.0))
    assert (key.layer, key.adapters, key.disagreement, key.cancelled) == ("k", (0,), 0, 0)
    assert key.input_overlap is None
    assert query.adapters == (0, 1)


def test_an_adapter_that_changes_nothing_shares_nothing(drawn):
    nothing = adapter([[0.0]] * 7, [[1.0] * 5])
    (found,) = conflicts([drawn(1), nothing], (1.0, 1.0))
    assert (found.disagreement, found.cancelled, found.input_overlap) == (
        0,
        pytest.approx(0, abs=1e-6),
        0,
    )


def test_what_does_not_fit_is_refused(drawn):
    with pytest.raises(BadMerge):
        conflicts([drawn(1), adapter([[1.0]], [[2.0]])], (1.0, 1.0))
