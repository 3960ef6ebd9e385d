"""A sweep's file: which runs it stands for, their names, and what is wrong with it."""

import pytest

from orchestrator import config
from orchestrator.config import BadConfig, RunConfig
from orchestrator.sweep import Sweep, load_sweep, points


@pytest.fixture
def runs(document):
    """Return a function that gives the runs of a sweep over a small config."""

    def make(base=None, **sweep):
        return points(Sweep(name="rates", base={}, **sweep), document(**(base or {})))

    return make


def test_a_sweep_is_every_setting_times_every_seed(runs):
    found = runs(grid={"adapter.r": [2, 4], "batch_size": [4, 8]}, seeds=[3, 5])

    chosen = [(p.config.adapter.options["r"], p.config.batch_size, p.config.seed) for p in found]
    assert chosen == [(r, b, s) for r in (2, 4) for b in (4, 8) for s in (3, 5)]
    assert len({p.name for p in found}) == 8


def test_a_number_of_seeds_counts_from_zero(runs):
    assert [p.seed for p in runs(seeds=3)] == [0, 1, 2]


def test_a_plug_in_with_options_is_a_value_of_the_grid(runs):
    found = runs(grid={"strategy": ["fedavg", {"name": "fedsvd", "every": 2}]})

    assert [p.config.strategy.name for p in found] == ["fedavg", "fedsvd"]
    assert found[1].config.strategy.options == {"every": 2}


def test_an_option_is_set_after_the_plug_in_that_it_is_of(runs):
    grid = {"adapter.r": [2, 4], "adapter": ["lora", "rslora"]}

    chosen = [(p.config.adapter.name, p.config.adapter.options["r"]) for p in runs(grid=grid)]

    assert chosen == [("lora", 2), ("rslora", 2), ("lora", 4), ("rslora", 4)]


def test_a_run_keeps_its_name_when_the_grid_grows(runs):
    few = {p.name for p in runs(grid={"adapter.r": [2]}, seeds=1)}
    many = {p.name for p in runs(grid={"adapter.r": [4, 2]}, seeds=2)}
    assert few < many


def test_a_run_has_another_name_when_the_base_decides_another_result(runs):
    first, longer = runs()[0], runs(base={"rounds": 9})[0]
    elsewhere = runs(base={"backend": "ray"})[0]
    assert first.name != longer.name
    assert first.name == elsewhere.name


def test_a_run_keeps_its_name_when_a_later_weft_has_more_options(runs, monkeypatch):
    class Later(RunConfig):
        harness: str | None = None
        treadles: tuple[str, ...] = ()

    (before,) = runs()
    monkeypatch.setattr(config, "RunConfig", Later)
    assert [p.name for p in runs()] == [before.name]
    assert [p.name for p in runs(base={"harness": "countermarch"})] != [before.name]


def test_an_option_of_none_is_another_setting_where_it_is_not_the_default(runs):
    flora = [{"name": "flora", "max_rank": None}, "flora"]
    assert len({p.name for p in runs(grid={"strategy": flora})}) == 2


def test_only_and_skip_choose_of_the_grid(runs):
    grid = {"strategy": ["fedavg", {"name": "fedsvd", "every": 2}], "batch_size": [4, 8]}

    def chosen(**rules):
        return [(p.config.strategy.name, p.config.batch_size) for p in runs(grid=grid, **rules)]

    assert chosen(only=[{"strategy": "fedsvd"}]) == [("fedsvd", 4), ("fedsvd", 8)]
    skipped = chosen(skip=[{"strategy": "fedsvd", "batch_size": 8}])
    assert skipped == [("fedavg", 4), ("fedavg", 8), ("fedsvd", 4)]


def test_all_mistakes_of_a_sweep_are_told_at_once(runs):
    with pytest.raises(BadConfig) as error:
        runs(grid={"strategy": ["fedavgg", "fedavg", "krumm"], "batch_size": [4, 8]})
    first, second = str(error.value).splitlines()
    assert first.startswith("strategy=fedavgg, batch_size=4 and 1 more: no strategy is called")
    assert "did you mean 'krum'" in second


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (
            {"grid": {"adapter.r": list(range(1, 60))}, "seeds": 2},
            "118 runs (59 settings, 2 seeds)",
        ),
        ({"grid": {"adapter.r": [8]}, "skip": [{"adapter.r": 8}]}, "leave no run of the grid"),
        ({"grid": {"adapter.r": [8]}, "skip": [{"adapter.r": 9}]}, "adapter.r is nowhere 9"),
        ({"grid": {"adapter.r": [8]}, "only": [{"r": 8}]}, "'r' is no key of the grid (adapter.r)"),
        ({"grid": {"seed": [0, 1]}}, "grid.seed: a run's name follows"),
        ({"grid": {"adapter.r": []}}, "grid.adapter.r: has no values"),
        ({"grid": {"rounds.x": [1]}}, "rounds is not a mapping"),
        ({"seeds": [1, 1]}, "seeds: one is given twice"),
        ({"grid": {"adapter.r": [4, 4]}}, "adapter.r=4 and adapter.r=4 are the same run"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(runs, sweep, said):
    with pytest.raises(BadConfig) as error:
        runs(**sweep)
    assert said in str(error.value)


def test_a_sweep_finds_its_base_beside_itself(run_yaml, tmp_path):
    run_yaml()
    file = tmp_path / "sweep.yaml"
    file.write_text("name: rates\nbase: run.yaml\ngrid: {adapter.r: [1, 2]}\n")

    name, found = load_sweep(file)

    assert name == "rates"
    assert [p.config.adapter.options["r"] for p in found] == [1, 2]


def test_an_unknown_key_of_a_sweep_is_refused(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("name: rates\nbase: {}\ngird: {}\n")
    with pytest.raises(BadConfig, match="gird: Extra inputs are not permitted"):
        load_sweep(file)
