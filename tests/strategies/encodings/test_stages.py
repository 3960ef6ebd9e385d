"""What each encoding promises, with numbers small enough to check by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from strategies.encodings.fp16 import Fp16
from strategies.encodings.int8 import Int8
from strategies.encodings.sketch import Sketch
from strategies.encodings.top_k import TopK
from strategies.uplink import BadEncoding, decode, encode, outline, refuse_chain


def back(stages, tensor, seed=0):
    tensors = {"x": tensor}
    return decode(stages, encode(stages, tensors, seed), outline(tensors), seed)["x"]


def test_half_precision_is_the_identity_on_what_it_can_say():
    exact = torch.tensor([0.0, -1.5, 2.0**-14, 65504.0, 1 / 1024])
    assert torch.equal(back([Fp16()], exact), exact)


def test_half_precision_sends_the_most_it_can_for_what_is_larger():
    assert back([Fp16()], torch.tensor([1e9, -1e9])).tolist() == [65504.0, -65504.0]


def test_eight_bits_are_steps_of_a_row_s_largest_number():
    matrix = torch.tensor([[127.0, 1.0, -63.4], [0.0, 0.0, 0.0]])
    sent = encode([Int8()], {"x": matrix}, 0)
    assert sent["x"].tolist() == [[127, 1, -63], [0, 0, 0]]
    assert sent["x:scale"].tolist() == [1.0, 0.0]


def test_one_scale_may_serve_a_whole_tensor():
    matrix = torch.tensor([[127.0, 1.0], [0.3, 2.6]])
    sent = encode([Int8(scale="tensor")], {"x": matrix}, 0)
    assert sent["x"].tolist() == [[127, 1], [0, 3]]
    assert sent["x:scale"].shape == ()


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_a_hostile_scale_is_refused(scale):
    sent = encode([Int8()], {"x": torch.ones(2, 2)}, 0)
    sent["x:scale"][0] = scale
    with pytest.raises(BadEncoding, match="x:scale must hold finite scales of at least 0"):
        decode([Int8()], sent, outline({"x": torch.ones(2, 2)}), 0)


def test_the_largest_changes_travel_with_their_places():
    sent = encode([TopK(density=0.5)], {"x": torch.tensor([[1.0, -5.0], [3.0, 0.0]])}, 0)
    assert sent["x"].tolist() == [-5.0, 3.0]
    assert sent["x:at"].tolist() == [1, 2]


def test_of_equal_changes_the_first_travels():
    sent = encode([TopK(density=0.01)], {"x": torch.tensor([2.0, -2.0, 2.0])}, 0)
    assert sent["x:at"].tolist() == [0]


def test_all_of_the_changes_are_the_changes():
    change = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back([TopK(density=1.0)], change), change)


@pytest.mark.parametrize("places", [[2, 1], [1, 1], [-1, 2], [0, 4], [0, 2**31 - 1]])
def test_hostile_places_are_refused(places):
    like = outline({"x": torch.zeros(2, 2)})
    sent = {"x": torch.ones(2), "x:at": torch.tensor(places, dtype=torch.int32)}
    with pytest.raises(BadEncoding, match="x:at must hold ascending places from 0 to 3"):
        decode([TopK(density=0.5)], sent, like, 0)


def test_a_sketch_of_every_entry_is_the_change():
    change = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for feedback in (True, False):
        assert_close(back([Sketch(density=1.0, feedback=feedback)], change), change)


def test_a_sketch_with_feedback_is_an_orthogonal_projection():
    """What arrives and what is left out are orthogonal, and neither is longer than the change."""
    change = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    arrived = back([Sketch(density=0.3)], change)
    assert float(arrived @ (change - arrived)) == pytest.approx(0.0, abs=1e-12)
    assert 0 < float(arrived.norm()) < float(change.norm())


def test_a_sketch_without_feedback_is_right_in_the_mean():
    change = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stage = Sketch(density=0.25, feedback=False)
    mean = sum(back([stage], change, seed) for seed in range(3000)) / 3000
    assert float((mean - change).abs().max()) < 6 * float(change.norm()) / math.sqrt(3000)


def test_tensors_and_rounds_are_sketched_apart():
    x = torch.ones(40)
    stage = Sketch(density=0.25)
    one, other = encode([stage], {"x": x, "y": x}, 0), encode([stage], {"x": x}, 1)
    assert not torch.equal(one["x"], one["y"])
    assert not torch.equal(one["x"], other["x"])


def test_stages_are_done_in_order_and_undone_in_reverse():
    change = {"x": torch.tensor([[1.0, -5.0], [3.0, 0.1]])}
    chain = [TopK(density=0.5), Int8()]
    sent = encode(chain, change, 0)
    assert {n: t.dtype for n, t in sent.items()} == {
        "x": torch.int8,
        "x:at": torch.int32,
        "x:scale": torch.float32,
    }
    assert sent["x"].tolist() == [-127, 76]
    arrived = decode(chain, sent, outline(change), 0)["x"]
    assert_close(arrived, torch.tensor([[0.0, -5.0], [76 * 5 / 127, 0.0]]))


def test_a_sketch_can_be_thinned_and_a_thinned_tensor_sketched():
    change = torch.randn(100, generator=torch.Generator().manual_seed(0))
    one = back([Sketch(density=0.5), TopK(density=0.1)], change)
    other = back([TopK(density=0.1), Sketch(density=0.5)], change)
    assert int((other != 0).sum()) == 10  # ten places; five sums
    assert int((one != 0).sum()) == 10  # five sums of two entries each
    assert not torch.equal(one, other)


def test_nothing_follows_what_leaves_no_numbers():
    refuse_chain([("top-k", TopK()), ("fp16", Fp16())])
    with pytest.raises(ValueError, match=r"'top-k' cannot follow 'int8', .* put 'int8' last"):
        refuse_chain([("int8", Int8()), ("top-k", TopK())])
