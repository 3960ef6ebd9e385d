"""What a site refuses, and that it does so by what is asked alone."""

from dataclasses import replace

import pytest

from clients.assignment import (
    Clipping,
    DataSpec,
    NoiseShare,
    PluginChoice,
    Privacy,
    Report,
    Shard,
)
from clients.node.ledger import Budget
from clients.node.policy import Refused, allowed
from strategies.spends import ClientLevel

PRIVATE = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1)
CENTRAL = ClientLevel(clip=1.0, noise_multiplier=1.0, cohort=4)
NOW = 1_000.0


@pytest.fixture
def judge(asked, terms, versions):
    """Return a function that judges an assignment under a node's settings."""

    def decide(settings, said=None, **changes):
        said = said or terms(deadline=NOW + 60)
        return allowed(asked(**changes), said, settings, versions, NOW)

    return decide


@pytest.fixture
def refusal(judge):
    """Return a function that returns why an assignment is refused."""

    def read(settings, said=None, **changes):
        with pytest.raises(Refused) as caught:
            judge(settings, said, **changes)
        return str(caught.value)

    return read


def test_a_private_round_is_allowed_with_what_node_yaml_lets_it_spend(judge, node):
    found = judge(node({"max_epsilon_per_run": 3.0}, population="north", epsilon=8, delta=1e-6))

    assert (found.data_set, found.population) == ("notes", "north")
    assert found.protection == "examples"
    assert found.budget == Budget(1e-6, 8.0, 3.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": DataSpec("site:scans")}, "clinic-7 has no data set called scans"),
        ({"client": "clinic-8"}, "the order is for clinic-8"),
        ({"client": "../../etc"}, "the order is for ../../etc"),
        ({"data": DataSpec("jsonl:/etc/passwd")}, "never by a place"),
        ({"data": DataSpec("builtin:parameter-types")}, "never by a place"),
        ({"data": DataSpec("site:notes;jsonl:/etc/passwd")}, "has no data set called"),
        ({"data": DataSpec("site:notes", shard=Shard("iid", total=2))}, "taken whole"),
        ({"action": "init"}, "made by the coordinator"),
        ({"public": True}, "node.yaml does not say that they are"),
        ({"device": "meta"}, "computes on cpu or cuda"),
        ({"privacy": None}, "the run has no privacy; only the site's owner"),
        ({"privacy": None, "action": "evaluate"}, "would tell exact scores of private data"),
        ({"privacy": None, "action": "prepare"}, "without noise"),
        ({"privacy": replace(PRIVATE, insecure_seed=1)}, "noise that everybody can compute"),
        ({"privacy": replace(PRIVATE, unit="patient")}, "node.yaml wants example hidden"),
        ({"data": DataSpec("site:notes", unit="patient")}, "node.yaml wants example hidden"),
        ({"steps": None}, "its cost is unknown"),
        ({"central": CENTRAL}, "its cost is of one"),
        ({"privacy": None, "noise_share": NoiseShare(2)}, "in no sum of clients"),
        ({"privacy": None, "central": CENTRAL}, "set privacy.noise_shares, or have"),
        (
            {
                "privacy": None,
                "central": replace(CENTRAL, quantile=0.5),
                "noise_share": NoiseShare(2),
            },
            "hides no count",
        ),
        (
            {"privacy": None, "central": CENTRAL, "noise_share": NoiseShare(2, insecure_seed=3)},
            "noise that everybody can compute",
        ),
        ({"steps": 10_001}, "steps is 10001, and node.yaml's max_steps is 10000"),
        ({"batch_size": 100_000}, "max_batch_size is 65536"),
        ({"microbatch": 5_000}, "max_microbatch is 1024"),
        ({"threads": 100}, "max_threads is 64"),
        ({"privacy": replace(PRIVATE, per_unit=10**9)}, "per_unit is 1e+09, and node.yaml's"),
        (
            {"privacy": replace(PRIVATE, report=Report(1.0, steps=10**12))},
            "steps is 1e+12, and node.yaml's max_steps",
        ),
        ({"answer_tokens": 10**9}, "answer_tokens is 1e+09, and node.yaml's max_length"),
        ({"data": DataSpec("site:notes", part="train", holdout=0.5)}, "splits them otherwise"),
    ],
)
def test_what_node_yaml_does_not_allow_is_refused(refusal, node, change, said):
    assert said in refusal(node(), **change)


def test_a_base_model_goes_by_its_hash_alone(judge, refusal, node, asked):
    model = asked().model

    assert "none of node.yaml's models" in refusal(node(), model=replace(model, hash="cd" * 32))
    assert judge(node(), model=replace(model, id="anything/else")).data_set == "notes"


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"adapters": ["dora"]}, "does not allow the adapter lora (allowed: dora)"),
        ({"strategies": []}, "does not allow the strategy fedavg (allowed: none)"),
        ({"min_noise_multiplier": 1.01}, "noise multiplier 1, and node.yaml's"),
        ({"max_steps": 1}, "steps is 2"),
        ({"max_length": 15}, "length is 16"),
    ],
)
def test_an_owner_may_allow_less(refusal, judge, node, policy, said):
    assert said in refusal(node(policy))
    judge(node({"adapters": ["lora"], "strategies": ["fedavg"], "min_noise_multiplier": 1.0}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"deadline": NOW}, "deadline is past"),
        ({"deadline": float("nan")}, "deadline is past"),
        ({"weft": "99.1.0"}, "must be of one minor version; install weft 99.1 here"),
        ({"flwr": "1.40"}, "install flwr 1.40 here, or 1.41 there"),
        ({"flwr": ""}, "must be of one minor version"),
    ],
)
def test_what_comes_too_late_or_from_another_version_is_refused(refusal, node, terms, change, said):
    assert said in refusal(node(), terms(**({"deadline": NOW + 1} | change)))


def test_a_patch_release_apart_is_in_step(judge, node, terms, versions):
    other = ".".join([*versions.weft.split(".")[:2], "999"])

    assert judge(node(), terms(weft=other, deadline=NOW + 1)).data_set == "notes"


@pytest.mark.parametrize("change", [{}, {"action": "evaluate"}, {"central": CENTRAL}])
def test_without_privacy_nothing_is_done_but_where_the_owner_says_so(judge, node, change):
    found = judge(node({"without_privacy": True}), privacy=None, **change)

    assert found.protection == "none"


def test_public_data_have_no_limits(judge, node):
    public = node(public=True, epsilon=None)

    for change in ({"privacy": None}, {"public": True}, {"privacy": None, "central": CENTRAL}):
        found = judge(public, **change)
        assert found.protection == "public"
        assert found.budget == Budget(1e-5)


def test_the_coordinators_noise_counts_for_an_owner_who_trusts_it(judge, node):
    trusting = node({"trust_coordinator_noise": True, "min_noise_multiplier": 1.0})

    found = judge(trusting, privacy=None, central=CENTRAL)
    assert (found.protection, found.budget.sums) == ("client", True)
    assert not judge(node()).budget.sums


def test_of_a_shared_noise_the_site_counts_its_own_part(judge, refusal, node):
    change = {"privacy": None, "central": CENTRAL, "noise_share": NoiseShare(4)}

    assert judge(node({"min_noise_multiplier": 0.5}), **change).protection == "client"
    assert "has noise multiplier 0.5" in refusal(node({"min_noise_multiplier": 0.51}), **change)


def test_a_unit_that_node_yaml_names_must_be_hidden(judge, refusal, node):
    settings = node(unit="patient")
    hidden = {
        "privacy": replace(PRIVATE, unit="patient"),
        "data": DataSpec("site:notes", unit="patient"),
    }

    assert judge(settings, **hidden).protection == "examples"
    assert "node.yaml wants patient hidden" in refusal(settings)
    del hidden["data"]  # calls it so, and would hide examples
    assert "node.yaml wants patient hidden" in refusal(settings, **hidden)


def test_what_is_held_out_is_scored_on_and_never_trained_on(judge, refusal, node):
    settings = node(holdout=0.2)
    train = DataSpec("site:notes", part="train", holdout=0.2)
    held = DataSpec("site:notes", part="holdout", holdout=0.2)

    judge(settings, data=train)
    judge(settings, data=held, action="evaluate")
    for change in (
        {},
        {"data": held},
        {"data": train, "action": "evaluate"},
        {"data": replace(train, holdout=0.1)},
        {"data": replace(train, holdout_by="text")},
    ):
        assert "splits them otherwise" in refusal(settings, **change)


def test_a_reading_of_noised_gradients_is_as_private_as_they_are(judge, refusal, node):
    assert judge(node(), action="consolidate").protection == "examples"
    of_clients = {"privacy": None, "central": CENTRAL, "noise_share": NoiseShare(2)}
    assert "without noise" in refusal(node(), action="consolidate", **of_clients)


def test_other_ways_of_clipping_are_as_good(judge, node):
    clipping = Clipping("quantile")

    assert judge(node(), privacy=replace(PRIVATE, clipping=clipping)).protection == "examples"


def test_a_sentence_that_comes_back_is_printable_and_short(refusal, node):
    said = refusal(node(), adapter=PluginChoice("lora"), client="\x1b[2J" + "x" * 10_000)

    assert said.isprintable()
    assert len(said) < 400
