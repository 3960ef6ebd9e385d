"""The cryptographic noise stream: distribution, independence, repeatability."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clients.keys import new_key
from clients.noise import BadKey, NoiseStream, discretised, grid_of, insecure_key

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
    assert draws.max() < 9.5
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
        [[picked], [only]] = stream.pick(step, [3, 1])
        counts[picked] += 1
        assert only == 0

    assert (counts - 100).abs().max() < 40  # five standard deviations
    assert stream.pick(5, [1000] * 9) == stream.pick(5, [1000] * 9)
    assert stream.pick(5, [1000] * 9) != stream.pick(6, [1000] * 9)
    assert stream.pick(5, [1000] * 9) != NoiseStream(new_key(), "digest").pick(5, [1000] * 9)
    assert stream.pick(0, []) == []


def test_several_picks_of_one_are_different_and_every_set_is_as_likely():
    stream = NoiseStream(KEY, "digest")
    counts: dict[frozenset[int], int] = {}
    for step in range(600):
        few, both, one = stream.pick(step, [4, 2, 1], 2)
        counts[frozenset(few)] = counts.get(frozenset(few), 0) + 1
        assert (len(few), sorted(both), one) == (2, [0, 1], [0])

    assert len(counts) == 6  # pairs of four
    assert all(abs(count - 100) < 46 for count in counts.values())  # five standard deviations


def test_added_as_they_are_normals_give_away_what_they_were_added_to():
    """The attack (Mironov, 2012) that the grid is there for."""
    noise = stream().normal("w", 0, (10_000,))
    fine = 2.0**-53  # all that 1 + noise can resolve where it is below 1/2
    near_zero = noise.abs() < 0.5
    assert ((noise / fine).round() * fine != noise)[near_zero].any()
    assert ((noise / fine).round() * fine != noise)[near_zero].double().mean() > 0.3
    moved_by_one = 1 + noise
    low = moved_by_one.abs() < 0.5
    assert torch.equal(((moved_by_one / fine).round() * fine)[low], moved_by_one[low])


@settings(max_examples=100, deadline=None)
@given(
    bound=st.floats(1e-6, 1e6),
    size=st.integers(1, 10**8),
    steps=st.integers(-(2**50), 2**50),
    sigma=st.floats(0.01, 1e3),
)
def test_on_the_grid_every_total_has_the_same_results_shifted(bound, size, steps, sigma):
    grid = grid_of(bound, size)
    noise = sigma * bound * stream().normal("w", 0, (64,))
    nothing = discretised(torch.zeros(64, dtype=torch.float64), noise, grid)
    something = discretised(torch.full((64,), steps * grid, dtype=torch.float64), noise, grid)
    assert torch.equal(something - nothing, torch.full((64,), steps * grid, dtype=torch.float64))
    assert torch.equal((something / grid).round() * grid, something)
    assert (nothing - noise).abs().max() <= grid / 2


@settings(max_examples=100, deadline=None)
@given(bound=st.floats(1e-30, 1e30), size=st.integers(1, 10**12))
def test_a_grid_moves_two_sums_apart_by_less_than_its_margin(bound, size):
    grid = grid_of(bound, size)
    assert math.frexp(grid)[0] == 0.5  # a power of two: dividing by it changes no digit
    assert grid * math.sqrt(size) <= bound * 2**-24 * (1 + 1e-12)


def test_rounded_normals_have_the_probabilities_of_the_cells_of_a_coarse_grid():
    noise = 2.0 * stream().normal("w", 0, (200_000,))
    found = discretised(torch.zeros_like(noise), noise, 1.0)
    cells = np.arange(-5, 6)
    counts = [int((found == cell).sum()) for cell in cells]
    chances = stats.norm.cdf(cells + 0.5, scale=2) - stats.norm.cdf(cells - 0.5, scale=2)
    rest = 200_000 - sum(counts), 1 - chances.sum()
    expected = 200_000 * np.append(chances, rest[1])
    assert stats.chisquare(np.append(counts, rest[0]), expected).pvalue > 1e-4
