import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from storage.encoding import DTYPES, encoded

SHAPES = st.lists(st.integers(0, 4), max_size=3)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"  # the format's own
)


@settings(deadline=None)
@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES)), SHAPES), max_size=5))
def test_the_bytes_are_those_that_safetensors_writes(chosen):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 100, shape, generator=generator).to(dtype)
        for name, (dtype, shape) in chosen.items()
    }
    assert encoded(tensors) == save(tensors)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype):
    tensor = torch.arange(-3, 4).to(dtype)
    again = load(encoded({"x": tensor, "y": tensor[0].clone()}))
    assert again["x"].dtype == dtype
    assert torch.equal(again["x"], tensor)
    assert again["y"].shape == ()


def test_two_names_may_share_memory():
    tensor = torch.arange(6.0)
    again = load(encoded({"x": tensor, "y": tensor, "z": tensor[2:4]}))
    assert torch.equal(again["y"], tensor)
    assert torch.equal(again["z"], torch.tensor([2.0, 3.0]))
