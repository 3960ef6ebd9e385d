"""``weft privacy plan``: what a run would spend, before anything is trained."""

from clients.accounting import approximate_epsilon, epsilon
from strategies.spends import PrivacySpend

DELTA = 1e-3
FIXED = {"noise_multiplier": 2.0, "delta": DELTA}


def of_rounds(rounds, one, unit="example", adjacency="add-remove"):
    parameters = {
        "noise_multiplier": one["noise_multiplier"],
        "sample_rate": one["sample_rate"],
        "steps": float(one["steps"] * rounds),
    }
    return [PrivacySpend("gaussian", unit, adjacency, parameters)]


def test_a_plan_says_noise_and_epsilon_of_a_round_and_of_all(read, ok, run_yaml):
    path = run_yaml(privacy=FIXED, rounds=3)

    found = read("privacy", "plan", path)

    one = found["clients"][0]
    assert (one["noise_multiplier"], one["rounds"], found["rounds"]) == (2.0, 3, 3)
    assert one["one_round"]["epsilon"] == epsilon(of_rounds(1, one), DELTA)
    assert one["whole"]["epsilon"] == epsilon(of_rounds(3, one), DELTA)
    said = ok("privacy", "plan", path)
    assert f"a round ε = {one['one_round']['epsilon']:.2f} (δ = 0.001, unit example" in said


def test_a_plan_shows_every_accountant_and_that_one_of_them_bounds_nothing(read, ok, run_yaml):
    path = run_yaml(privacy=FIXED, rounds=3)

    one = read("privacy", "plan", path)["clients"][0]

    whole = of_rounds(3, one)
    assert one["by_accountant"] == {
        "prv": epsilon(whole, DELTA),
        "rdp": epsilon(whole, DELTA, "rdp"),
        "gdp": approximate_epsilon(whole, DELTA),
    }
    assert f"gdp {approximate_epsilon(whole, DELTA):.2f}, an approximation" in ok(
        "privacy", "plan", path
    )


def test_a_plan_counts_what_clients_tell(read, run_yaml):
    plain, telling = (
        read("privacy", "plan", run_yaml(privacy=privacy, rounds=3))["clients"][0]
        for privacy in (FIXED, {**FIXED, "report": {"loss": 4, "steps": 3}})
    )
    assert telling["steps"] == plain["steps"] + 3
    assert telling["whole"]["epsilon"] > plain["whole"]["epsilon"]


def test_a_plan_says_what_runs_of_the_same_task_reached_and_with_which_privacy(
    ok, read, run_yaml, notes
):
    alike = {"evaluate": {"data": notes("held", size=8)}, "rounds": 1}
    other = {"name": "other", "adapter": {"name": "lora", "r": 1, "layers": [0]}}
    planned = {**alike, "privacy": FIXED}
    unknown = ok("privacy", "plan", run_yaml(**planned))
    for changes in ({"name": "plain"}, {"name": "noisy", "privacy": FIXED}, other):
        ok("run", run_yaml(**alike, **changes))

    path = run_yaml(**planned)

    assert "what the noise costs in accuracy is not known before it is tried" in unknown
    found = read("privacy", "plan", path)["precedents"]
    assert [one["name"] for one in found] == ["noisy", "plain"]
    assert [bool(one["privacy"]) for one in found] == [True, False]
    accuracy = read("show", "noisy")["metrics"]["accuracy"]
    assert found[0]["metrics"]["accuracy"] == accuracy
    said = ok("privacy", "plan", path)
    assert (
        f"noisy (run {found[0]['run']}), noise multiplier 2 (δ = 0.001, unit example): "
        f"accuracy {accuracy:.3f}"
    ) in said
    assert f"plain (run {found[1]['run']}), without DP: accuracy " in said
    assert read("privacy", "plan", run_yaml(privacy=FIXED))["precedents"] == []


def test_a_run_judged_by_an_approximation_is_refused(refused, run_yaml):
    path = run_yaml(privacy={**FIXED, "accountant": "gdp"})
    assert "gdp is an approximation that can say less" in refused("privacy", "plan", path)


def test_a_run_without_privacy_has_no_plan(refused, run_yaml):
    assert "no ε bounds what it tells" in refused("privacy", "plan", run_yaml())


def test_a_plan_trains_and_spends_nothing(ok, read, run_yaml):
    ok("privacy", "plan", run_yaml(privacy=FIXED))
    assert read("runs", "list") == []
    assert read("privacy", "status") == []
