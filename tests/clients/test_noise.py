"""The cryptographic noise stream: distribution, independence, repeatability."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from scipy import stats

from clients.keys import new_key
from clients.noise import BadKey, NoiseStream, insecure_key

KEY = insecure_key(0, "clinic-1")
PINNED_NORMALS = [-0.6726909329374487, 0.19857470444241584, -0.7273378158476967]
PINNED_SAMPLE = [0, 5, 10, 14, 16]


def stream(key=KEY, digest="digest"):
    return NoiseStream(key, digest)


def test_normals_pass_a_kolmogorov_smirnov_test():
    draws = stream().normal("layer.lora_B.weight", 0, (200_000,)).numpy()
    assert stats.kstest(draws, "norm").pvalue > 1e-4


def test_normals_have_normal_tails():
    draws = stream().normal("w", 0, (1_000_000,)).abs()
    expected = 1_000_000 * 2 * stats.norm.sf(4)  # 63
    assert abs((draws > 4).sum().item() - expected) < 5 * math.sqrt(expected)
    assert draws.max() < 8.6
    assert draws.isfinite().all()


def test_neighbouring_normals_are_uncorrelated():
    draws = stream().normal("w", 0, (100_000,))
    for lag in (1, 2, 50_000):  # the two halves of Box-Muller share a radius
        correlation = torch.corrcoef(torch.stack([draws[:-lag], draws[lag:]]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(len(draws) - lag)


def test_normals_are_float64_of_the_asked_shape():
    for shape in ((), (0,), (3,), (3, 5), torch.Size([2, 3, 4])):
        draws = stream().normal("w", 0, shape)
        assert draws.dtype == torch.float64
        assert draws.shape == torch.Size(shape)


def test_the_same_draw_repeats_byte_for_byte():
    assert torch.equal(stream().normal("w", 3, (9,)), stream().normal("w", 3, (9,)))
    assert torch.equal(stream().poisson_sample(3, 99, 0.3), stream().poisson_sample(3, 99, 0.3))


def test_a_draw_is_what_it_was_in_the_first_release():
    found = stream().normal("w", 0, (3,)).tolist()
    assert found == pytest.approx(PINNED_NORMALS, rel=1e-12)
    assert stream().poisson_sample(0, 20, 0.25).tolist() == PINNED_SAMPLE


@pytest.mark.parametrize(
    "other",
    [
        stream(digest="another").normal("w", 0, (50_000,)),
        stream(key=insecure_key(0, "clinic-2")).normal("w", 0, (50_000,)),
        stream(key=insecure_key(1, "clinic-1")).normal("w", 0, (50_000,)),
        stream().normal("v", 0, (50_000,)),
        stream().normal("w", 1, (50_000,)),
        stream().normal("w", 0, (25_000, 2)).flatten(),
    ],
    ids=["digest", "client", "seed", "name", "step", "shape"],
)
def test_draws_for_different_purposes_are_uncorrelated(other):
    draws = stream().normal("w", 0, (50_000,))
    assert not torch.equal(draws[:10], other[:10])
    correlation = torch.corrcoef(torch.stack([draws, other]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(50_000)


def test_names_cannot_be_confused_with_steps():
    assert not torch.equal(stream().normal("w1", 0, (4,)), stream().normal("w", 10, (4,)))


def test_every_example_is_drawn_with_the_sample_rate():
    counts = torch.zeros(200)
    for step in range(1000):
        counts[stream().poisson_sample(step, 200, 0.1)] += 1
    p_value = stats.chisquare(np.array([counts.sum(), 200_000 - counts.sum()]), [2e4, 1.8e5]).pvalue
    assert p_value > 1e-4
    spread = 5 * math.sqrt(1000 * 0.1 * 0.9)
    assert (counts - 100).abs().max() < spread


def test_the_size_of_a_poisson_sample_varies_like_a_binomial():
    sizes = [len(stream().poisson_sample(step, 200, 0.1)) for step in range(1000)]
    assert statistics.mean(sizes) == pytest.approx(20, abs=5 * math.sqrt(18 / 1000))
    assert statistics.variance(sizes) == pytest.approx(18, rel=0.25)


def test_a_poisson_sample_is_ascending_and_without_repeats():
    drawn = stream().poisson_sample(0, 500, 0.5)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, drawn.unique())


def test_a_rate_of_one_takes_every_example():
    assert stream().poisson_sample(0, 7, 1.0).tolist() == list(range(7))


def test_a_poisson_sample_can_be_empty():
    assert stream().poisson_sample(0, 0, 0.5).shape == (0,)
    assert stream().poisson_sample(0, 3, 1e-12).shape == (0,)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match="sample rate must be > 0 and <= 1"):
        stream().poisson_sample(0, 3, rate)


def test_a_key_of_the_wrong_length_is_refused():
    with pytest.raises(BadKey, match="32 bytes, got 5"):
        NoiseStream(b"short", "digest")


def test_keys_are_32_bytes_and_new_ones_differ():
    assert len(KEY) == len(new_key()) == 32
    assert new_key() != new_key()


def test_the_key_does_not_show_in_the_representation():
    assert repr(KEY) not in repr(stream())
    assert "digest" in repr(stream())


def test_a_pick_is_even_secret_and_another_in_every_step():
    stream = NoiseStream(KEY, "digest")
    counts = torch.zeros(3)
    for step in range(300):
        [picked, only] = stream.pick(step, [3, 1])
        counts[picked] += 1
        assert only == 0

    assert (counts - 100).abs().max() < 40  # five standard deviations
    assert stream.pick(5, [1000] * 9) == stream.pick(5, [1000] * 9)
    assert stream.pick(5, [1000] * 9) != stream.pick(6, [1000] * 9)
    assert stream.pick(5, [1000] * 9) != NoiseStream(new_key(), "digest").pick(5, [1000] * 9)
    assert stream.pick(0, []) == []
