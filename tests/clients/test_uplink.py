"""What a client sends through encodings: what it keeps, and what the other side makes of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from clients.assignment import PluginChoice, Privacy
from clients.site import Site
from clients.trainer import train
from clients.uplink import LEFT_OUT, decoded, encoded
from strategies.base import Broadcast

TOP_1 = PluginChoice("top-k", {"density": 0.25})
FP16 = PluginChoice("fp16")
SENT = Broadcast({"x": torch.ones(4)})


def sent_and_kept(values, kept=(), uplink=(TOP_1,), sent=SENT):
    return encoded({"x": torch.tensor(values)}, sent, uplink, 0, dict(kept))


def test_the_other_side_adds_the_change_to_what_it_had_sent():
    travels, _ = sent_and_kept([1.0, 1.0, 4.0, 1.5])
    assert decoded(travels, SENT, [TOP_1], 0)["x"].tolist() == [1.0, 1.0, 4.0, 1.0]


def test_what_is_left_out_is_sent_in_a_later_round():
    _, kept = sent_and_kept([1.0, 1.0, 4.0, 1.5])
    assert kept[LEFT_OUT + "x"].tolist() == [0.0, 0.0, 0.0, 0.5]
    travels, kept = sent_and_kept([1.0, 1.25, 1.0, 1.0], kept)
    assert decoded(travels, SENT, [TOP_1], 0)["x"].tolist() == [1.0, 1.0, 1.0, 1.5]
    assert kept[LEFT_OUT + "x"].tolist() == [0.0, 0.25, 0.0, 0.0]


def test_without_feedback_nothing_is_kept():
    assert sent_and_kept([1.0, 2.0, 3.0, 4.0], uplink=[FP16])[1] == {}


def test_what_was_left_out_of_tensors_that_this_round_does_not_train_stays_kept():
    before = {LEFT_OUT + "y": torch.ones(2), "head.bias": torch.ones(3)}
    _, kept = sent_and_kept([1.0, 1.0, 4.0, 1.5], before)
    assert sorted(kept) == [LEFT_OUT + "x", LEFT_OUT + "y"]


def test_a_change_that_is_not_finite_is_not_carried_on():
    travels, kept = sent_and_kept([float("nan"), 1.0, 4.0, 1.5])
    assert not torch.isfinite(travels["x"]).all()
    assert torch.isfinite(kept[LEFT_OUT + "x"]).all()


HALF = Broadcast(
    {"x": torch.tensor([[0.1, 0.2], [0.3, 0.4]]), "y": torch.ones(3)},
    mask={"x": torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "z": torch.ones(2)},
)


def test_of_a_masked_tensor_the_values_on_the_mask_travel_and_arrive_exactly():
    trained = {"x": torch.tensor([[0.1, 5.0], [1 / 3, 0.4]]), "y": torch.zeros(3)}
    travels, kept = encoded(trained, HALF, (), 0, {})
    assert travels["x"].tolist() == [5.0, float(torch.tensor(1 / 3))]
    assert (travels["y"] is trained["y"], kept) == (True, {})
    arrived = decoded(travels, HALF, (), 0)
    assert arrived.keys() == trained.keys()
    assert all(torch.equal(arrived[name], tensor) for name, tensor in trained.items())
    assert HALF.tensors["x"].tolist() == torch.tensor([[0.1, 0.2], [0.3, 0.4]]).tolist()


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    kind=st.sampled_from([torch.bool, torch.float32]),
)
def test_every_mask_is_decoded_exactly(shape, seed, dtype, kind):
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    mask = torch.randint(0, 2, shape, generator=generator).to(kind)
    sent = Broadcast({"x": before}, mask={"x": mask})
    travels, _ = encoded({"x": torch.where(mask != 0, after, before)}, sent, (), 0, {})
    assert travels["x"].shape == (int((mask != 0).sum()),)
    assert torch.equal(decoded(travels, sent, (), 0)["x"], torch.where(mask != 0, after, before))


def test_a_client_may_send_a_masked_tensor_whole_and_what_is_off_the_mask_does_not_count():
    arrived = decoded({"x": torch.full((2, 2), 9.0)}, HALF, (), 0)["x"]
    assert arrived.tolist() == torch.tensor([[0.1, 9.0], [9.0, 0.4]]).tolist()


@pytest.mark.parametrize("odd", [torch.zeros(3), torch.zeros(2).double(), torch.zeros(2, 3)])
def test_what_does_not_fit_a_mask_is_left_to_be_refused(odd):
    assert decoded({"x": odd}, HALF, (), 0)["x"] is odd


def test_a_client_that_kept_what_it_left_out_adds_it_on_the_mask():
    trained = {"x": torch.tensor([[0.1, 4.2], [1.3, 0.4]]), "y": torch.ones(3)}
    top = PluginChoice("top-k", {"density": 0.5})
    _, kept = encoded(trained, HALF, [top], 0, {})
    assert_close(kept[LEFT_OUT + "x"], torch.tensor([0.0, 1.0]))
    travels, _ = encoded(dict(HALF.tensors), HALF, [top], 0, kept)
    arrived = decoded(travels, HALF, [top], 0)["x"]
    assert_close(arrived, torch.tensor([[0.1, 0.2], [1.3, 0.4]]))


@pytest.mark.parametrize("stage", ["sketch", "top-k", "int8", "fp16"])
def test_masked_entries_stay_bit_identical_whatever_was_sent(stage):
    mask = torch.tensor([0.0, 1.0, 1.0, 0.0])
    sent = Broadcast({"x": torch.tensor([0.1, 0.2, 0.3, 0.4])}, mask={"x": mask})
    uplink = [PluginChoice(stage)]
    travels, _ = encoded({"x": sent.tensors["x"] + mask}, sent, uplink, 0, {})
    arrived = decoded(travels, sent, uplink, 0)["x"]
    assert torch.equal(arrived[mask == 0], sent.tensors["x"][mask == 0])
    assert not torch.equal(arrived, sent.tensors["x"])


def test_an_adapter_in_bfloat16_comes_back_in_it():
    sent = Broadcast({"x": torch.ones(4, dtype=torch.bfloat16)})
    travels, _ = encoded({"x": sent.tensors["x"] * 2}, sent, [FP16], 0, {})
    arrived = decoded(travels, sent, [FP16], 0)["x"]
    assert (arrived.dtype, arrived.tolist()) == (torch.bfloat16, [2.0] * 4)


def test_a_client_trains_as_without_encodings_and_sends_less(assign):
    plain = assign()
    whole, small = train(plain), train(replace(plain, uplink=(FP16,)))
    assert all(tensor.dtype == torch.float16 for tensor in small.tensors.values())
    arrived = decoded(small.tensors, plain.broadcast, [FP16], plain.seed)
    assert arrived.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert_close(arrived[name], tensor, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "privacy", [None, Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5)]
)
def test_a_client_keeps_what_it_left_out_of_what_it_may_show(assign, privacy):
    asked = replace(assign(privacy=privacy), uplink=(TOP_1,))
    train(asked)
    kept = Site(asked.site).state(asked.run, asked.client, 1)
    assert {n.removeprefix(LEFT_OUT) for n in kept} == {
        n for n in asked.broadcast.tensors if not n.endswith(".scaling")
    }
    assert any(tensor.any() for tensor in kept.values())


def test_a_client_sends_on_what_it_left_out(assign, tmp_path):
    first = replace(assign(), uplink=(TOP_1,))
    train(first)
    second = replace(first, round=2, base="e" * 64)
    with_it, without = train(second), train(replace(second, site=str(tmp_path / "new")))
    same = [torch.equal(with_it.tensors[n], without.tensors[n]) for n in with_it.tensors]
    assert not all(same)
