"""What every encoding owes both sides. A new one is tested by existing."""

import pytest
import torch
from torch.testing import assert_close

from strategies.encodings import ENCODINGS
from strategies.uplink import BadEncoding, decode, encode, outline

pytestmark = pytest.mark.parametrize("name", ENCODINGS.names())
SHAPES = {"q.lora_B.weight": (7, 4), "head.bias": (3,), "head.weight": (3, 5)}


@pytest.fixture
def stage(name):
    return ENCODINGS.get(name).build()


@pytest.fixture
def change():
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}


def again(stage, tensors, seed=3):
    return decode([stage], encode([stage], tensors, seed), outline(tensors), seed)


def test_what_was_decoded_is_encoded_as_before(stage, change):
    first = encode([stage], change, 3)
    second = encode([stage], again(stage, change), 3)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        if tensor.is_floating_point():
            assert_close(second[key], tensor)
        else:
            assert torch.equal(second[key], tensor)


def test_what_is_decoded_has_the_shapes_and_dtypes_of_what_went_in(stage, change):
    for dtype in (torch.float32, torch.float64):
        mine = {n: t.to(dtype) for n, t in change.items()}
        back = again(stage, mine)
        assert {n: (t.shape, t.dtype) for n, t in back.items()} == {
            n: (t.shape, t.dtype) for n, t in mine.items()
        }


def test_a_tensor_without_entries_comes_back(stage, change):
    """Such as the values on a mask that keeps a whole tensor as it is."""
    back = again(stage, {**change, "empty": torch.zeros(0)})
    assert back.keys() == {*change, "empty"}
    assert back["empty"].shape == (0,)


def test_the_layout_tells_what_is_sent(stage, change):
    sent, told = encode([stage], change, 3), stage.layout(outline(change))
    assert {n: (t.shape, t.dtype) for n, t in sent.items()} == {
        n: (t.shape, t.dtype) for n, t in told.items()
    }


def test_it_makes_tensors_smaller(stage):
    big = {"x": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
    sent = encode([stage], big, 3)
    assert sum(t.nbytes for t in sent.values()) <= big["x"].nbytes // 2


def test_it_is_deterministic_and_changes_no_argument(stage, change):
    before = {n: t.clone() for n, t in change.items()}
    first, second = (encode([stage], change, 3) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(before[n], change[n]) for n in change)


def test_no_change_stays_none(stage, change):
    nothing = {n: torch.zeros_like(t) for n, t in change.items()}
    assert all(not t.any() for t in again(stage, nothing).values())


def test_with_feedback_everything_arrives_in_the_end(stage, change):
    """What is left out gets no larger, so that adding it up again and again delivers it."""
    if not stage.feedback:
        return
    left, arrived = change, {n: torch.zeros_like(t) for n, t in change.items()}
    for seed in range(400):
        came = again(stage, left, seed)
        left = {n: t - came[n] for n, t in left.items()}
        arrived = {n: t + came[n] for n, t in arrived.items()}
    for n, tensor in change.items():
        assert float((tensor - arrived[n]).norm()) < 1e-3 * float(tensor.norm())


def test_it_leaves_what_is_no_number_to_round_alone(stage, change):
    places = {"x:at": torch.arange(5, dtype=torch.int32)}
    assert torch.equal(stage.encode(places, 3)["x:at"], places["x:at"])


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "dtype"])
def test_what_has_another_layout_is_refused(stage, change, damage):
    sent = encode([stage], change, 3)
    if damage == "missing":
        sent.pop("head.bias")
    elif damage == "extra":
        sent["more"] = torch.zeros(1)
    elif damage == "shape":
        sent["head.bias"] = torch.zeros(10**4, dtype=sent["head.bias"].dtype)
    else:
        sent["head.bias"] = sent["head.bias"].to(torch.int16)
    with pytest.raises(BadEncoding, match=r"missing|not asked for|expected torch"):
        decode([stage], sent, outline(change), 3)


def test_the_plugin_has_a_summary_and_a_source(name):
    assert ENCODINGS.get(name).summary.endswith(".")
    assert ENCODINGS.get(name).source
