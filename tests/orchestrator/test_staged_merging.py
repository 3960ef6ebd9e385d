"""Merges by a file: stages, weights that are looked for, and what is refused before it begins."""

import pytest
import torch
import yaml
from torch.testing import assert_close

from clients.assignment import DataSpec, PluginChoice
from orchestrator import merge_search, service, staged_merging
from orchestrator.config import BadConfig
from orchestrator.merge_draft import draft_of
from orchestrator.merge_file import parse_merge
from orchestrator.merge_parts import Allow, parts_of
from orchestrator.merge_search import Looking, search, searched_merge
from orchestrator.merging import BadMerge
from orchestrator.recipes import round_recipe
from orchestrator.staged_merging import StageFailed, merge_in_stages
from orchestrator.versions import EvaluationFailed
from strategies.plugins import BadOptions
from strategies.tensors import lora_layers

STAGES = {
    "into": "bot",
    "stages": [
        {"name": "both", "of": ["one", {"ref": "two", "weight": 0.5}], "method": "cat"},
        {
            "name": "without",
            "of": ["both", {"ref": "three", "weight": -1}],
            "method": {"name": "task-arithmetic", "scale": 2.0},
        },
    ],
}


@pytest.fixture
def named(workspace, make_plan, tensors):
    """Commit three versions under names."""
    for seed, name in enumerate(("one", "two", "three")):
        recipe = round_recipe(make_plan(), 1, [])
        workspace.store.name(name, workspace.store.commit(tensors(seed), parents={}, recipe=recipe))
    return workspace


def product(workspace, ref):
    factors = lora_layers(workspace.store.tensors(ref))["q"]
    return factors.scaling.double() * factors.b.double() @ factors.a.double()


def test_each_stage_is_a_version_whose_parents_are_what_it_merged(named):
    first, last = merge_in_stages(named, parse_merge(STAGES, "merge.yaml"))

    one, two, three = (product(named, name) for name in ("one", "two", "three"))
    assert_close(product(named, "bot"), 2 * (one + 0.5 * two - three), rtol=1e-5, atol=1e-5)
    assert named.store.version(first.version).names == ()
    assert named.store.version("bot").id == last.version
    parents = {edge.parent for edge in service.lineage(named, "bot").lineage.edges}
    assert {first.version, *(named.store.resolve(n) for n in ("one", "two", "three"))} == parents


def test_a_file_that_runs_again_makes_nothing_new(named):
    file = parse_merge(STAGES, "merge.yaml")
    assert [one.version for one in merge_in_stages(named, file)] == [
        one.version for one in merge_in_stages(named, file)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wieght": 2}, r"stages\.0\.wieght: there is no such option .*options: name, of"),
        ({"metod": "cat"}, r"there is no such option; did you mean 'method'\? \(options"),
        ({"of": [{"ref": "one", "wieght": 1}, "two"]}, r"did you mean 'weight'\? \(options: ref"),
        ({"method": "tise"}, r"stages\.both: method: no merge is called 'tise'; did you mean 't"),
        ({"method": {"name": "ties", "densety": 1}}, r"no option 'densety'; did you mean 'dens"),
        ({"of": ["one"]}, r"stages\.0\.of: .*at least 2"),
        ({"of": ["one", "without"]}, "stage 'without' is not done yet; a stage merges those befor"),
        ({"name": "without"}, "two stages are called 'without'"),
        ({"search": "jsonl:/x.jsonl"}, "is not known to be public, and weights that are found on"),
        ({"search": {"data": "builtin:parameter-types", "trails": 9}}, r"mean 'trials'\?"),
        (
            {"of": ["one", {"ref": "two", "weight": 3}], "search": "builtin:parameter-types"},
            r"stages\.0: 'two' has weight 3, and weights are looked for between -1 and 2; give one",
        ),
    ],
)
def test_mistakes_are_told_with_what_was_meant(change, message):
    first, last = STAGES["stages"]
    with pytest.raises(BadConfig, match=message):
        parse_merge({**STAGES, "stages": [first | change, last]}, "merge.yaml")


def test_a_name_that_is_no_version_is_told_before_anything_is_merged(named):
    first, last = STAGES["stages"]
    wrong = {**STAGES, "stages": [first, last | {"of": ["bohth", "four"]}]}
    before = named.store.versions()
    with pytest.raises(BadConfig) as told:
        merge_in_stages(named, parse_merge(wrong, "merge.yaml"))
    lines = str(told.value).splitlines()
    assert lines[0].endswith("'bohth' is no version and no stage before it; did you mean 'both'?")
    assert lines[1].startswith("stages.without: of: 'four' is no version")
    assert named.store.versions() == before


def test_a_stage_that_cannot_be_merged_is_named(named):
    first, last = STAGES["stages"]
    wrong = {**STAGES, "stages": [first, last | {"of": ["one", "one"]}]}
    with pytest.raises(StageFailed, match="stage 'without': a version is given twice") as told:
        merge_in_stages(named, parse_merge(wrong, "merge.yaml"))
    assert isinstance(told.value.__cause__, BadMerge)


class Odd(ValueError):
    """An error that is not made of its text alone."""

    def __init__(self, value, *, allowed):
        super().__init__(f"{value} is none of {allowed}")


def test_a_stage_that_fails_by_an_error_of_any_shape_is_named(named, monkeypatch):
    def fails(*args):
        raise Odd(3, allowed="1 and 2")

    monkeypatch.setattr(staged_merging, "draft", fails)
    with pytest.raises(StageFailed, match="stage 'both': 3 is none of 1 and 2"):
        merge_in_stages(named, parse_merge(STAGES, "merge.yaml"))


def test_a_search_finds_the_lowest_point_within_bounds_and_never_loses_the_start():
    asked = []

    def bowl(weights):
        asked.append(weights)
        return (weights[0] - 0.3) ** 2 + 2 * (weights[1] + 5) ** 2

    found = search(bowl, [1.0, 1.0], trials=60)
    assert found.weights == pytest.approx((0.3, -1.0), abs=0.02)  # -1 is the bound
    assert found.value == bowl(found.weights) < found.first == bowl((1.0, 1.0))
    assert found.trials == len(asked) - 2 <= 60


def test_the_start_stays_where_nothing_is_better():
    assert search(lambda weights: abs(weights[0] - 1), [1.0], trials=8).weights == (1.0,)


def test_weights_that_are_looked_for_lower_the_loss_and_are_in_the_recipe(home, tiny, notes):
    for number in (1, 2):
        service.launch(home, tiny(name=f"task-{number}", seed=number, steps=4))
    refs = ["task-1", "task-2"]
    looking = Looking(DataSpec(notes("dev")), trials=6)
    parts = parts_of(home, refs, Allow())
    made = searched_merge(home, parts, PluginChoice("cat", {}), [1.0, 1.0], looking)
    told = made.metrics
    assert told["search_trials"] <= 6
    assert told["search_loss_after"] <= told["search_loss_before"]
    weights = [made.recipe["weights"][v.id] for v in made.parts]
    again = service.merge(home, refs, PluginChoice("cat", {}), "again", weights)
    stored = home.store.tensors(again)
    assert all(torch.equal(made.tensors[n], t) for n, t in stored.items())
    scored = service.evaluate(home, again, looking.data)
    assert scored.metrics["loss"] == pytest.approx(told["search_loss_after"])


def test_a_search_passes_over_weights_that_cannot_be_merged(named, monkeypatch):
    tried = []

    def refusing(workspace, parts, method, weights, rank=None):
        tried.append(weights[1])
        if weights[1] < 0:
            raise BadOptions("these cancel")
        return draft_of(workspace, parts, method, weights, rank)

    monkeypatch.setattr(merge_search, "draft_of", refusing)
    monkeypatch.setattr(merge_search, "_loss", lambda workspace, made, *_: made.weights[1])
    parts = parts_of(named, ["one", "two"], Allow())
    looking = Looking(DataSpec("builtin:parameter-types"), trials=20)
    made = searched_merge(named, parts, PluginChoice("cat", {}), [0.5, 0.5], looking)
    assert min(tried) < 0 <= made.weights[1] < 0.5


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ([0.0, 0.0], BadOptions, "nothing to merge"),
        ([1.0, 1.0], EvaluationFailed, "begins with has no finite loss on jsonl:/x.jsonl; give"),
    ],
)
def test_a_search_that_cannot_begin_says_why(named, monkeypatch, start, error, message):
    monkeypatch.setattr(merge_search, "_loss", lambda *args: float("inf"))
    parts = parts_of(named, ["one", "two"], Allow())
    looking = Looking(DataSpec("jsonl:/x.jsonl"), trials=3)
    with pytest.raises(error, match=message):
        searched_merge(named, parts, PluginChoice("cat", {}), start, looking)


def test_the_command_line_merges_by_a_file_and_refuses_what_does_not_go_with_it(
    named, read, refused, tmp_path
):
    file = tmp_path / "merge.yaml"
    file.write_text(yaml.safe_dump(STAGES))
    merged = read("merge", "--recipe", file)
    assert merged["names"] == ["bot:v1"]
    assert "--union" in refused("merge", "one", _wider(named), "--into", "x")
    assert read("merge", "one", _wider(named), "--into", "x", "--union")["names"] == ["x:v1"]
    file.write_text(yaml.safe_dump({**STAGES, "intoo": "x"}))
    assert "did you mean 'into'?" in refused("merge", "--recipe", file)


def test_the_command_line_looks_for_weights_by_the_data_it_is_given(
    named, read, refused, monkeypatch
):
    monkeypatch.setattr(merge_search, "_loss", lambda _, made, *rest: (made.weights[1] - 0.3) ** 2)
    given = ("merge", "one", "two", "--into", "bot", "-m", "svd", "--option", "rank=2")
    told = refused(*given, "--search", "jsonl:dev.jsonl")
    assert "jsonl:dev.jsonl is not known to be public" in told
    assert "--public" in told
    found = read(*given, "--search", "jsonl:dev.jsonl", "--public", "--trials", "7")
    assert found["names"] == ["bot:v1"]
    assert found["metrics"]["search_trials"] <= 7
    assert found["metrics"]["search_loss_after"] < found["metrics"]["search_loss_before"]


def test_a_search_is_seen_before_it_is_committed(named, read, ok, monkeypatch):
    monkeypatch.setattr(merge_search, "_loss", lambda _, made, *rest: (made.weights[1] - 0.3) ** 2)
    given = ("merge", "one", "two", "--into", "bot", "-m", "svd", "--option", "rank=2")
    given += ("--search", "jsonl:dev.jsonl", "--public", "--trials", "7")
    before = named.store.versions()
    (seen,) = read(*given, "--preview")
    told = ok(*given, "--preview")
    assert named.store.versions() == before
    made = named.store.version(read(*given)["id"])
    assert seen["weights"] == [made.recipe["weights"][one] for one in seen["parents"]]
    assert seen["metrics"] == made.metrics
    after, trials = (made.metrics[f"search_{key}"] for key in ("loss_after", "trials"))
    assert f"loss 0.49, and {after:.4g} after {trials:.0f} merges" in " ".join(told.split())


def _wider(workspace):
    """A version of one more layer than the others."""
    version = workspace.store.version("two")
    tensors = workspace.store.tensors(version.id)
    more = {n.replace("q.", "v."): t for n, t in tensors.items() if n.startswith("q.")}
    return workspace.store.commit({**tensors, **more}, parents={}, recipe=version.recipe)
