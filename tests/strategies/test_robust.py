"""Rules that withstand hostile clients: what each promises, and where it ends."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from strategies import STRATEGIES
from strategies.base import ServerState, Update, needs_of
from strategies.fed_sb import FedSB
from strategies.fedavg import FedAvg
from strategies.fedsvd import FedSVD
from strategies.ffa_lora import FFALoRA
from strategies.fltrust import FLTrust
from strategies.geometric_median import GeometricMedian
from strategies.krum import Krum
from strategies.median import Median
from strategies.multi_krum import MultiKrum
from strategies.norm_clip import NormClip
from strategies.plugins import BadOptions
from strategies.robust import RobustRule, TooFewUpdates
from strategies.trimmed_mean import TrimmedMean

A, B, SCALING = "q.lora_A.weight", "q.lora_B.weight", "q.scaling"
CORE = "q.lora_core.weight"
HONEST = 9

RULES = {
    "krum": Krum(FFALoRA()),
    "multi-krum": MultiKrum(FFALoRA()),
    "geometric-median": GeometricMedian(FFALoRA()),
    "norm-clip": NormClip(FFALoRA()),
    "fltrust": FLTrust(FFALoRA(), root="c0"),
    "median": Median(FFALoRA()),
    "trimmed-mean": TrimmedMean(FFALoRA()),
}
BLIND_TO_ROTATION = ["krum", "multi-krum", "geometric-median", "norm-clip", "fltrust"]


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


def line(*values, rule=None):
    """A model of one number: A = 1, scaling 1, and clients who set B."""
    eye = torch.ones(1, 1, dtype=torch.float64)
    adapter = {A: eye, B: torch.zeros(1, 1, dtype=torch.float64), SCALING: torch.tensor(1.0)}
    return ServerState(adapter), [
        Update(f"c{i}", 1, "733e", {B: value * eye}, 1) for i, value in enumerate(values)
    ]


def result(rule, *values):
    return rule.aggregate(*line(*values)).adapter[B].item()


def cohort(seed=0, clients=HONEST, spread=0.3):
    """Clients in ten dimensions who mean the same, up to ``spread``, and the state they had."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    adapter = {A: draw(2, 6), B: draw(5, 2), SCALING: torch.tensor(2.0)}
    meant = draw(5, 2)
    updates = [
        Update(f"c{i}", 1, "733e", {B: adapter[B] + meant + spread * draw(5, 2)}, 1)
        for i in range(clients)
    ]
    return ServerState(adapter), updates


def hostile(tensors, client="evil", num_examples=1):
    return Update(client, 1, "733e", tensors, num_examples)


def test_every_rule_is_held_to_the_same_promises():
    factories = {name: STRATEGIES.get(name).factory for name in STRATEGIES.names()}
    found = {n for n, f in factories.items() if isinstance(f, type) and issubclass(f, RobustRule)}
    assert found == set(RULES)


def test_one_hostile_client_of_ten_leaves_the_result_near_the_honest_mean(rule):
    state, updates = cohort()
    mean = sum(u.tensors[B] for u in updates) / HONEST
    furthest = max(float((u.tensors[B] - mean).norm()) for u in updates)
    for attack in (1e6, -1e6, -30.0):
        evil = hostile({B: state.adapter[B] + attack * (mean - state.adapter[B])})
        after = rule.aggregate(state, [*updates, evil]).adapter[B]
        assert float((after - mean).norm()) <= furthest
    plain = FFALoRA().aggregate(state, [*updates, evil]).adapter[B]
    assert float((plain - mean).norm()) > furthest


def test_one_hostile_client_of_ten_leaves_the_mean_core_near_the_honest_one(rule):
    """Cores are a shared gauge, so that every rule goes with them, on coordinates too."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    adapter = {A: draw(3, 6), B: draw(5, 3), SCALING: torch.tensor(2.0), CORE: draw(3, 3)}
    rule, meant = replace(rule, inner=FedSB()), draw(3, 3)
    updates = [
        Update(f"c{i}", 1, "733e", {CORE: adapter[CORE] + meant + 0.3 * draw(3, 3)}, 1)
        for i in range(HONEST)
    ]
    mean = sum(u.tensors[CORE] for u in updates) / HONEST
    evil = hostile({CORE: adapter[CORE] - 1e6 * meant})
    state = rule.init(adapter)
    assert rule.broadcast(state, None).trainable == FedSB().broadcast(state, None).trainable
    after = rule.aggregate(state, [*updates, evil]).adapter

    def far(core):
        return float((adapter[B] @ (core - mean) @ adapter[A]).norm())

    assert far(after[CORE]) <= max(far(u.tensors[CORE]) for u in updates)
    assert far(FedSB().aggregate(state, [*updates, evil]).adapter[CORE]) > 1e3


def test_clients_that_are_alike_are_believed(rule):
    state, updates = cohort(spread=0.0)
    assert_close(rule.aggregate(state, updates).adapter[B], updates[0].tensors[B])


@pytest.mark.parametrize("name", ["krum", "multi-krum"])
def test_an_outlier_is_never_selected_and_its_name_is_told(name):
    state, updates = cohort()
    evil = hostile({B: torch.full((5, 2), 1e6, dtype=torch.float64)})
    metrics = RULES[name].aggregate(state, [*updates, evil]).metrics
    assert metrics["rejected/evil"] == 1.0
    rejected = sum(key.startswith("rejected/") for key in metrics)
    assert metrics["rejected"] == rejected == (9 if name == "krum" else 3)


@settings(deadline=None, max_examples=60)
@given(
    honest=st.lists(st.floats(-1, 1), min_size=5, max_size=8),
    attacks=st.lists(st.floats(-1e30, 1e30), min_size=0, max_size=2),
    data=st.data(),
)
@pytest.mark.parametrize("name", ["krum", "median", "trimmed-mean"])
def test_no_minority_drives_the_result_out_of_the_honest_spread(name, honest, attacks, data):
    """On a line, wherever the hostile stand and whatever they say."""
    values = data.draw(st.permutations([*honest, *attacks]))
    inner, count = FFALoRA(), len(attacks)
    rules = {"krum": Krum, "median": Median, "trimmed-mean": TrimmedMean}
    if name == "krum" and len(values) < 2 * count + 3:
        values = [*values, *honest[:2]]
    after = result(rules[name](inner, hostile=count), *values)
    slack = (max(honest) - min(honest)) if name == "krum" else 0.0
    assert min(honest) - slack - 1e-9 <= after <= max(honest) + slack + 1e-9


@settings(deadline=None, max_examples=60)
@given(
    honest=st.lists(st.floats(-1, 1), min_size=5, max_size=8),
    attacks=st.lists(st.floats(-1e12, 1e12), min_size=0, max_size=2),
)
def test_the_geometric_median_is_bounded_by_the_honest_and_their_share(honest, attacks):
    """Theorem of Lopuhaa and Rousseeuw: at most 2 (1 - a) / (1 - 2a) times the honest radius."""
    share = len(attacks) / (len(honest) + len(attacks))
    after = result(GeometricMedian(FFALoRA(), hostile=len(attacks)), *honest, *attacks)
    radius = max(abs(value) for value in honest)
    assert abs(after) <= 2 * (1 - share) / (1 - 2 * share) * radius + 1e-4


def test_the_median_is_the_middle_value_and_of_an_even_number_the_mean_of_two():
    assert result(Median(FFALoRA()), 0.0, 2.0, 40.0) == 2.0
    assert result(Median(FFALoRA()), 0.0, 2.0, 4.0, 900.0) == 3.0


def test_the_trimmed_mean_leaves_out_the_extremes():
    assert result(TrimmedMean(FFALoRA()), -100.0, 0.0, 2.0, 4.0, 500.0) == 2.0
    assert result(TrimmedMean(FFALoRA(), hostile=2), -100.0, 0.0, 2.0, 4.0, 500.0) == 2.0
    assert result(TrimmedMean(FFALoRA(), hostile=0), 1.0, 2.0, 6.0) == 3.0


def test_multi_krum_averages_as_many_as_it_keeps():
    rule = MultiKrum(FFALoRA(), hostile=1)
    assert result(rule, 0.0, 1.0, 2.0, 3.0, 1000.0) == 1.5  # 5 - 1 - 2 of them: 1 and 2
    rule = MultiKrum(FFALoRA(), hostile=1, keep=1)
    assert result(rule, 0.0, 1.0, 2.0, 3.0, 1000.0) == 1.0


def test_the_geometric_median_of_a_triangle_is_its_fermat_point():
    """Of (0, 0), (1, 0) and (1/2, sqrt(3)/2) it is the centre."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
    adapter = {
        A: torch.ones(1, 1, dtype=torch.float64),
        B: torch.zeros(2, 1, dtype=torch.float64),
        SCALING: torch.tensor(1.0),
    }
    updates = [Update(f"c{i}", 1, "", {B: c[:, None]}, 1) for i, c in enumerate(corners)]
    after = GeometricMedian(FFALoRA()).aggregate(ServerState(adapter), updates).adapter[B]
    assert_close(after[:, 0], corners.mean(dim=0), rtol=0, atol=1e-9)


def test_the_geometric_median_minimises_the_sum_of_distances():
    state, updates = cohort(clients=7, spread=1.0)
    rule = GeometricMedian(FFALoRA())
    after = rule.aggregate(state, updates).adapter[B]

    def total(b):
        a = state.adapter[A]
        return sum(float(((u.tensors[B] - b) @ a).norm()) for u in updates)

    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        aside = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        assert total(after) <= total(after + 1e-3 * aside)


def test_trust_is_the_cosine_with_the_trusted_client_at_its_length():
    """Root (3, 0): of (0, 9) nothing, of (-5, 0) nothing, of (1, 1) its direction at length 3."""
    adapter = {
        A: torch.ones(1, 1, dtype=torch.float64),
        B: torch.zeros(2, 1, dtype=torch.float64),
        SCALING: torch.tensor(1.0),
    }
    moves = {
        "a": (0.0, 9.0),
        "b": (-5.0, 0.0),
        "c": (1.0, 1.0),
        "d": (7.0, 0.0),
        "root": (3.0, 0.0),
    }
    updates = [
        Update(n, 1, "", {B: torch.tensor(m, dtype=torch.float64)[:, None]}, 1)
        for n, m in moves.items()
    ]
    after = FLTrust(FFALoRA()).aggregate(ServerState(adapter), updates)
    cosine = math.sqrt(0.5)
    expected = torch.tensor([cosine * 3 * cosine + 3.0, cosine * 3 * cosine]) / (cosine + 1)
    assert_close(after.adapter[B][:, 0], expected.double())
    assert after.metrics == {"rejected": 2.0, "rejected/a": 1.0, "rejected/b": 1.0}


def test_without_the_trusted_client_a_round_changes_nothing():
    state, updates = cohort()
    after = FLTrust(FFALoRA(), root="gone").aggregate(state, updates)
    assert torch.equal(after.adapter[B], state.adapter[B])
    assert after.metrics["rejected"] == HONEST


def test_clipping_leaves_short_changes_as_they_are_and_tells_how_many_were_long():
    after = NormClip(FFALoRA(), bound=2.0).aggregate(*line(1.0, -3.0, 5.0))
    assert after.adapter[B].item() == pytest.approx((1 - 2 + 2) / 3)
    assert (after.metrics["clipped"], after.metrics["clip_bound"]) == (2.0, 2.0)
    assert result(NormClip(FFALoRA()), 1.0, -3.0, 5.0) == pytest.approx((1 - 3 + 3) / 3)


def test_clipping_bounds_the_change_of_the_product_where_both_factors_are_trained():
    state, updates = cohort(clients=1)
    a = state.adapter[A] + 1.0
    update = replace(updates[0], tensors={**updates[0].tensors, A: a})
    after = NormClip(FedAvg(), bound=0.5).aggregate(state, [update]).adapter
    change = 2.0 * (after[B] @ after[A] - state.adapter[B] @ state.adapter[A])
    assert float(change.norm()) == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_only_rules_on_products_are_blind_to_a_rotation_of_the_basis(name):
    rule = RULES[name]
    state, updates = cohort(clients=6, spread=1.0)
    generator = torch.Generator().manual_seed(5)
    q, _ = torch.linalg.qr(torch.randn(2, 2, generator=generator, dtype=torch.float64))
    adapter = {**state.adapter, A: q @ state.adapter[A], B: state.adapter[B] @ q.T}
    turned = [replace(u, tensors={B: u.tensors[B] @ q.T}) for u in updates]
    plain = rule.aggregate(state, updates).adapter
    after = rule.aggregate(ServerState(adapter), turned).adapter
    blind = torch.allclose(plain[B] @ plain[A], after[B] @ after[A], rtol=0, atol=1e-9)
    assert blind is (name in BLIND_TO_ROTATION)


@pytest.mark.parametrize("name", ["krum", "multi-krum", "geometric-median", "norm-clip", "fltrust"])
def test_decisions_do_not_depend_on_the_gauge_of_clients_that_train_both_factors(name):
    """(B G^-1, G A) is the same model: weights and selections of every client are the same."""
    state, updates = cohort(clients=6)
    rule = replace(RULES[name], inner=FedAvg())
    generator = torch.Generator().manual_seed(6)
    plain, turned = [], []
    for update in updates:
        g = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        tensors = {A: state.adapter[A] + 0.1, B: update.tensors[B]}
        plain.append(replace(update, tensors=tensors))
        other = {A: g @ tensors[A], B: tensors[B] @ torch.linalg.inv(g)}
        turned.append(replace(update, tensors=other))
    (one, told), (two, told_too) = (rule.judged(state.adapter, u) for u in (plain, turned))
    assert [u.client for u in one] == [u.client for u in two]
    assert [u.weight for u in one] == pytest.approx([u.weight for u in two], rel=1e-6)
    assert told == pytest.approx(told_too)


def test_a_hostile_count_of_examples_counts_for_nothing(rule):
    state, updates = cohort()
    evil = hostile({B: state.adapter[B] + 50.0})
    loud = replace(evil, num_examples=2**53)
    quiet, after = (rule.aggregate(state, [*updates, e]).adapter[B] for e in (evil, loud))
    assert torch.equal(quiet, after)


def test_the_inner_strategy_does_what_is_its_own(rule):
    state, updates = cohort()
    outer = replace(rule, inner=FedSVD())
    first = outer.init(state.adapter)
    after = outer.aggregate(first, updates)
    assert_close(after.adapter[A] @ after.adapter[A].T, torch.eye(2, dtype=torch.float64))
    assert int(after.auxiliary["round"]) == 1
    assert outer.broadcast(first, None).trainable == FedSVD().broadcast(first, None).trainable


def test_rules_can_be_wrapped_in_each_other():
    both = STRATEGIES.get("krum").build(
        inner={"name": "norm-clip", "inner": "ffa-lora", "bound": 1}
    )
    assert result(both, 4.0, 4.5, 4.6, 5.0, 900.0) == 1.0


def test_what_wraps_a_rule_needs_what_the_rule_needs():
    wrapped = STRATEGIES.get("fedavgm").build(inner={"name": "krum", "inner": "ffa-lora"})
    assert needs_of(wrapped).updates == 5
    assert needs_of(FFALoRA()).updates == 1


def test_too_few_updates_are_refused_by_a_sentence(rule):
    state, updates = cohort()
    enough = needs_of(rule).updates
    rule.aggregate(state, updates[:enough])
    if enough > 1:
        with pytest.raises(TooFewUpdates, match=f"{enough - 1} updates are too few .* {enough}"):
            rule.aggregate(state, updates[: enough - 1])


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        (
            "median",
            {"inner": "fedavg"},
            "median.*: it compares single coordinates, .* wrap ffa-lora",
        ),
        ("trimmed-mean", {"inner": "fedavg"}, "trimmed-mean.*: it compares single coordinates"),
        ("krum", {"inner": {"name": "krum", "inner": "ffa-lora"}}, "needs 5 updates every round"),
        ("krum", {"inner": {"name": "fltrust", "inner": "ffa-lora"}}, "needs that of 'root'"),
        ("krum", {"inner": "ffa-lora", "hostile": -1}, "hostile must be >= 0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(name, options, reason):
    with pytest.raises(BadOptions, match=reason):
        STRATEGIES.get(name).build(**options)


def test_a_part_that_stays_at_the_client_cannot_be_compared():
    class Personal(FFALoRA):
        capabilities = frozenset({"personal"})

    with pytest.raises(ValueError, match="leaves a part of each product at its client"):
        Krum(Personal())


def test_what_an_inner_strategy_can_do_is_passed_on_as_far_as_it_stays_true(rule):
    assert rule.capabilities == {"additive", "private", "shared-gauge"}
    assert Krum(FedAvg()).capabilities == {"private"}
