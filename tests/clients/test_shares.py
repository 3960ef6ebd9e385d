"""A client's share of the noise in a sum: its size, its stream, and what may come of it."""

import math
from dataclasses import replace

import pytest
import torch

from clients.assignment import Assignment, DataSpec, ModelSpec, NoiseShare, PluginChoice
from clients.noise import NoiseStream
from clients.shares import NoiseTooFine, bounded, counted, grid, meant, with_share
from clients.site import Site
from clients.uplink import encoded
from strategies.base import Broadcast
from strategies.spends import ClientLevel, PrivacySpend, of_a_share
from strategies.uplink import BadEncoding

SIZE, OF = 20_000, 4
TERMS = ClientLevel(clip=0.5, noise_multiplier=2.0, cohort=5)
KEY = bytes(range(32))


def asked(terms=TERMS, of=OF, mask=None, size=SIZE, client="a", site="/site"):
    sent = Broadcast({"x": torch.ones(size), "y": torch.zeros(3)}, mask=mask or {})
    spec = ModelSpec("m", "classification", labels=("a", "b"))
    return Assignment(
        action="train",
        run="run-1",
        client=client,
        round=1,
        base="base",
        model=spec,
        adapter=PluginChoice("lora"),
        broadcast=sent,
        data=DataSpec("jsonl:x"),
        optimizer=PluginChoice("sgd"),
        site=str(site),
        central=terms,
        noise_share=NoiseShare(of, insecure_seed=3),
    )


def sent_by(assignment, trained=None):
    stream = NoiseStream(KEY, assignment.digest())
    return with_share(trained or assignment.broadcast.tensors, assignment, stream)


def noise(assignment):
    return sent_by(assignment)["x"].double() * grid(assignment)


def test_a_share_has_its_part_of_the_sum_s_variance_and_the_shares_together_have_all():
    shares = [noise(asked(client=name)) for name in "abcd"]
    # 20,000 draws: their variance is within 4 % of its expectation, at 4 standard deviations
    for share in shares:
        assert float(share.square().mean()) == pytest.approx(1.0 / OF, rel=0.04)
    whole = torch.stack(shares).sum(0)
    assert float(whole.square().mean()) == pytest.approx(1.0, rel=0.04)


def test_a_retry_has_the_same_share_and_anything_else_an_independent_one():
    first = noise(asked())
    assert torch.equal(first, noise(asked()))
    a, other = asked(), Broadcast({"x": torch.ones(SIZE) + 1e-6, "y": torch.zeros(3)})
    for changed in (replace(a, client="b"), replace(a, round=2), replace(a, broadcast=other)):
        against = torch.corrcoef(torch.stack([first, noise(changed)]))[0, 1]
        assert abs(float(against)) < 4 / math.sqrt(SIZE)


def test_a_change_is_clipped_before_it_gets_noise_and_moves_by_no_more_than_the_margin_on_a_grid():
    a = asked(size=400)
    trained = {"x": torch.full((400,), 9.0), "y": torch.full((3,), -7.0)}
    change = with_share(trained, a, None)
    norm = math.hypot(*(float((grid(a) * c.double()).norm()) for c in change.values()))
    assert norm == pytest.approx(0.5, rel=2**-12)
    noisy, silent = sent_by(a, trained), sent_by(a)
    for name, counts in change.items():
        assert torch.equal(noisy[name] - silent[name], counts)


def test_training_that_diverged_is_a_share_of_the_noise_alone():
    a = asked(size=5)
    lost = sent_by(a, {"x": torch.full((5,), torch.nan), "y": torch.zeros(3)})
    assert all(torch.equal(lost[name], counts) for name, counts in sent_by(a).items())


def test_what_a_mask_keeps_from_training_gets_no_noise_and_does_not_travel():
    mask = {"x": torch.tensor([1.0, 0.0, 1.0, 0.0])}
    a = asked(mask=mask, size=4)
    made = sent_by(a, {"x": torch.full((4,), 5.0), "y": torch.zeros(3)})
    assert made["x"][[1, 3]].tolist() == [0, 0]
    assert made["x"][[0, 2]].ne(0).all()
    travels, left = encoded(made, a.broadcast, (), 0, {})
    assert (travels["x"].shape, left) == ((2,), {})
    whole = counted(travels, a)
    assert all(torch.equal(whole[name], counts.long()) for name, counts in made.items())


@pytest.mark.parametrize("noise_multiplier", [1e-4, 0.05, 2.0, 5.0])
def test_a_share_is_sixteen_steps_of_the_grid_at_least(noise_multiplier):
    a = asked(ClientLevel(0.5, noise_multiplier, 5), size=10)
    assert 0.5 * noise_multiplier / math.sqrt(OF) >= 16 * grid(a)


@pytest.mark.parametrize(("noise_multiplier", "of"), [(1e7, 1), (1e-12, 4)])
def test_noise_that_does_not_fit_into_32_bits_is_refused(noise_multiplier, of):
    with pytest.raises(NoiseTooFine, match=r"32 bits hold 2\.1e9"):
        grid(asked(ClientLevel(0.5, noise_multiplier, 5), of))


def test_an_update_that_is_no_share_is_refused_and_no_honest_one_is():
    a = asked(size=50)
    honest = sent_by(a, {"x": torch.full((50,), 9.0), "y": torch.zeros(3)})
    assert meant(honest, a)["x"].dtype == torch.float32
    for name, odd, reason in (
        ("x", torch.ones(50), "travels as torch.int32"),
        ("x", torch.ones(49, dtype=torch.int32), r"travels as torch.int32 \[50\]"),
        ("z", torch.ones(1, dtype=torch.int32), "z is not asked for"),
        ("x", honest["x"] * 10, "none that is clipped to 0.5 is longer than"),
    ):
        with pytest.raises(BadEncoding, match=reason):
            meant({**honest, name: odd}, a)


def test_without_shares_a_client_sends_its_clipped_tensors(tmp_path):
    a = replace(asked(size=4, site=tmp_path), noise_share=None)
    trained = {"x": torch.full((4,), 2.0), "y": torch.zeros(3)}
    assert bounded(trained, a, Site(tmp_path))["x"].tolist() == [1.25] * 4


def test_a_share_is_bound_to_its_assignment_which_says_how_many_make_the_whole():
    a = asked()
    assert a.digest() != replace(a, noise_share=NoiseShare(5, insecure_seed=3)).digest()
    assert a.digest() != replace(a, noise_share=None).digest()


def test_a_share_costs_against_who_sees_it_alone_what_its_own_noise_does():
    spend = PrivacySpend(
        "gaussian", "client", "zero-out", {"noise_multiplier": 6.0, "sample_rate": 1.0, "steps": 3}
    )
    assert of_a_share(spend, 9).parameters == {**spend.parameters, "noise_multiplier": 2.0}
    assert of_a_share(spend, 1) == spend
