"""Layer-wise weights, for any merge."""

import math

import pytest
from torch.testing import assert_close

from strategies.merges import MERGES
from strategies.merges.layer_wise import layer_wise
from strategies.merges.ties import ties
from strategies.plugins import BadOptions


@pytest.fixture
def adapters(make_adapter):
    return [make_adapter(seed, head=False) for seed in (1, 2)]


def test_each_layer_has_the_weights_of_the_first_pattern_that_fits(adapters, products):
    chosen = {"*.query": [0.5, 0.0], "encoder.*": [1.0, -2.0]}
    merged = products(layer_wise(adapters, [2.0, 1.0], layers=chosen))
    one, two = (products(adapter) for adapter in adapters)
    assert_close(merged["encoder.query"], one["encoder.query"], rtol=1e-5, atol=1e-5)
    expected = 2 * one["encoder.value"] - 2 * two["encoder.value"]
    assert_close(merged["encoder.value"], expected, rtol=1e-5, atol=1e-5)


def test_the_method_and_its_options_are_those_that_are_given(adapters, products):
    options = {"density": 0.5}
    merged = layer_wise(adapters, [1.0, 1.0], layers={}, method="ties", options=options)
    assert_close(products(merged), products(ties(adapters, [1.0, 1.0], density=0.5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": {"*.quary": [1.0, 1.0]}}, "no layer is called like '\\*.quary'; there are"),
        ({"layers": {"*.query": [1.0]}}, "1 numbers for '\\*.query' and there are 2 adapters"),
        ({"layers": {"*.query": [1.0, math.inf]}}, "of '\\*.query' must be finite, got"),
        ({"layers": {}, "method": "ties", "options": {"densety": 1}}, "did you mean 'density'"),
    ],
)
def test_what_does_not_fit_is_refused(adapters, options, message):
    with pytest.raises(BadOptions, match=message):
        MERGES.get("layer-wise").build(adapters, [1.0, 1.0], **options)
