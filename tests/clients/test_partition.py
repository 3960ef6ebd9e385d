import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients import partition

LABELS = [i % 4 for i in range(400)]


def flat(parts):
    return sorted(itertools.chain.from_iterable(parts))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 5))
def test_iid_puts_every_example_in_exactly_one_part(num_examples, total, seed):
    parts = partition.iid(num_examples, total, seed)
    assert flat(parts) == list(range(num_examples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=60),
    st.integers(1, 9),
    st.floats(1e-4, 1e4),
    st.integers(0, 5),
)
def test_dirichlet_puts_every_example_in_exactly_one_part(labels, total, alpha, seed):
    parts = partition.dirichlet(labels, total, alpha, seed)
    assert len(parts) == total
    assert flat(parts) == list(range(len(labels)))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(0, 30), st.floats(1e-3, 10), st.integers(0, 5))
def test_dirichlet_leaves_no_part_empty_where_there_are_enough_examples(total, more, alpha, seed):
    parts = partition.dirichlet([0] * (total + more), total, alpha, seed)
    assert all(parts)


def test_parts_are_the_same_in_every_process():
    # written down, so that a change of the algorithm, or of Python, shows
    assert partition.iid(8, 3, 0) == [[0, 1, 6], [2, 3, 4], [5, 7]]
    assert partition.dirichlet([0, 1] * 5, 2, 2.0, 1) == [[1, 2, 5, 6], [0, 3, 4, 7, 8, 9]]


def test_another_seed_gives_other_parts():
    assert partition.iid(50, 5, 0) != partition.iid(50, 5, 1)
    assert partition.dirichlet(LABELS, 5, 1.0, 0) != partition.dirichlet(LABELS, 5, 1.0, 1)


def test_iid_does_not_follow_the_order_of_the_records():
    assert partition.iid(100, 2, 0)[0] != list(range(0, 100, 2))


def largest_share(alpha):
    """Mean over seeds of the largest class's share in a part: 0.25 where parts are alike."""
    shares = [
        max(sum(LABELS[i] == label for i in part) for label in range(4)) / len(part)
        for seed in range(5)
        for part in partition.dirichlet(LABELS, 4, alpha, seed)
    ]
    return sum(shares) / len(shares)


def test_a_smaller_alpha_makes_parts_less_alike():
    assert largest_share(1e5) < 0.27
    assert largest_share(0.05) > 0.6


def test_an_alpha_whose_gamma_variates_underflow_still_splits():
    parts = partition.dirichlet(LABELS, 4, 1e-300, 0)
    assert flat(parts) == list(range(400))


def test_column_gives_one_sorted_part_for_each_value():
    parts = partition.column(["b", "a", "b", "c"])
    assert list(parts.items()) == [("a", [1]), ("b", [0, 2]), ("c", [3])]


@pytest.mark.parametrize("values", [[], ["a"]])
def test_column_of_few_values_gives_few_parts(values):
    assert len(partition.column(values)) == len(values)
