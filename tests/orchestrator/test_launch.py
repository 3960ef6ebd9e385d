"""Everything that can be wrong with a run is found before anything starts."""

from dataclasses import replace

import pytest

from clients.accounting import BudgetSpent
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of
from orchestrator.recipes import round_recipe
from storage.ledger import ClientRecord, SpendRow
from strategies.plugins import BadOptions

ASYNCHRONOUS = {"buffer": 2, "concurrency": 2}
DP = {"noise_multiplier": 1.0, "delta": 1e-3}


@pytest.fixture
def register(workspace, notes):
    """Return a function that registers a client."""

    def add(name="a", **fields):
        given = {"data": notes(name), "population": name, "num_examples": 12, **fields}
        workspace.ledger.add_client(ClientRecord(name, **given))

    return add


@pytest.fixture
def plan(workspace):
    """Return a function that plans a run in the workspace."""
    return lambda config: plan_of(config, workspace.store, workspace.ledger)


@pytest.fixture
def refused(plan, tiny, workspace):
    """Return a function that says why a run is refused; nothing of it may be on record."""

    def why(**changes):
        with pytest.raises(BadConfig) as caught:
            plan(tiny(**changes))
        assert workspace.ledger.runs() == []
        return str(caught.value)

    return why


@pytest.fixture
def committed(workspace, plan, tiny, tensors):
    """Return a function that commits a version as a run of these options would."""

    def make(name="before", recipe=(), **changes):
        made = round_recipe(plan(tiny(**changes)), 1, []) | dict(recipe)
        version = workspace.store.commit(tensors(), parents={}, recipe=made)
        workspace.store.name(name, version)
        return version

    return make


def test_participants_are_those_with_the_labels_sorted(register, plan, tiny):
    register("c", labels={"ward": "north", "gpu": "a100"})
    register("a", labels={"ward": "north"})
    register("b", labels={"ward": "south"})

    def names(select):
        return [p.name for p in plan(tiny(clients={"select": select})).participants]

    assert names({}) == ["a", "b", "c"]
    assert names({"ward": "north"}) == ["a", "c"]
    assert names({"ward": "north", "gpu": "a100"}) == ["c"]


def test_participants_can_be_named(register, plan, tiny):
    register("a")
    register("b", fields={"text": "note"}, public=True)

    [who] = plan(tiny(clients={"names": ["b"]})).participants

    assert (who.name, who.population, who.num_examples, who.public) == ("b", "b", 12, True)
    assert who.data.fields == {"text": "note"}


def test_a_simulation_splits_one_data_set(plan, tiny, notes):
    by_column = {"data": notes(size=12), "by": "column", "column": "ward"}
    iid = {"data": notes(size=12), "parts": 3}

    privacy = {"epsilon": 8, "delta": 1e-3, "accountant": "rdp"}
    wards = plan(tiny(clients={"simulate": by_column}, privacy=privacy)).participants
    parts = plan(tiny(clients={"simulate": iid})).participants

    assert [(p.name, p.num_examples) for p in wards] == [("w0", 6), ("w1", 6)]  # DP needs sizes
    assert [p.name for p in parts] == [f"part-{i}" for i in range(3)]
    assert [p.population for p in parts] == [f"notes.jsonl#part-{i}" for i in range(3)]


def test_two_values_that_read_alike_are_two_clients(plan, tiny, tmp_path):
    rows = [
        f'{{"text": "a {i}", "label": "cat", "ward": "{w}"}}'
        for i, w in enumerate(["Ward 1", "ward-1", "WARD/1", "x" * 300, "!"])
    ]
    path = tmp_path / "wards.jsonl"
    path.write_text("\n".join(rows))
    simulate = {"data": f"jsonl:{path}", "by": "column", "column": "ward"}

    people = plan(tiny(clients={"simulate": simulate})).participants

    assert [p.name for p in people] == ["part", "ward-1", "ward-1-2", "ward-1-3", "x" * 64]
    assert len({p.data.shard.value for p in people}) == 5


def test_the_base_model_s_hash_is_in_the_plan(register, plan, tiny):
    register()

    made = plan(tiny())

    assert len(made.model.hash) == 64
    assert made.model.labels == ("cat", "dog", "model", "rank")


def test_nobody_to_train_is_refused(refused):
    assert "nobody takes part; weft clients list" in refused()
    assert "nobody takes part" in refused(clients={"select": {"ward": "moon"}})


def test_a_soft_penalty_on_a_frozen_factor_is_refused(register, refused):
    register()

    why = refused(strategy="fedsvd", regularizers=[{"name": "o-lora", "form": "soft"}])

    assert "regularizer 'o-lora' (as set) acts on tensors that strategy 'fedsvd' keeps froz" in why


def test_a_hard_form_on_a_factor_that_trains_is_refused(register, refused):
    register()

    why = refused(strategy="fedavg", regularizers=[{"name": "o-lora", "form": "hard"}])

    assert "regularizer 'o-lora' (as set) needs" in why
    assert "lora_A.weight frozen, and strategy 'fedavg' trains it" in why


@pytest.mark.parametrize(("strategy", "form"), [("fedsvd", "hard"), ("fedavg", "soft")])
def test_forms_that_fit_the_strategy_are_planned(register, plan, tiny, strategy, form):
    register()
    method = {"name": "o-lora", "form": form}

    assert plan(tiny(strategy=strategy, regularizers=[method])).regularizers[0].name == "o-lora"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"name": "lora", "r": 64}}, r"rank must be between 1 and 32 \(.*\), got 64"),
        ({"adapter": {"name": "lora", "target_modules": ["qery"]}}, "did you mean 'query'"),
        ({"adapter": {"name": "lora", "layers": [7]}}, "layers must be among 0, 1, got 7"),
        ({"optimizer": {"name": "sgd", "nesterov": True}}, "nesterov needs momentum > 0"),
        ({"strategy": {"name": "ffa-lora", "row_scale": 0.5}}, "0.5 without orthonormal"),
    ],
)
def test_options_that_do_not_fit_are_refused_without_loading_a_weight(
    register, plan, tiny, changes, message
):
    register()

    with pytest.raises(BadOptions, match=message):
        plan(tiny(**changes))


def test_a_budgeted_population_needs_privacy(register, refused):
    register(epsilon=4.0, delta=1e-5)

    assert "a: its population 'a' has a privacy budget (ε = 4), and this run has no" in refused()


def test_a_budgeted_population_refuses_an_insecure_seed(register, refused):
    register(epsilon=4.0, delta=1e-5)

    why = refused(privacy={**DP, "insecure_seed": 1})

    assert "insecure_seed gives no privacy, and population 'a' has a budget (ε = 4)" in why


def test_privacy_needs_a_declared_size(register, refused):
    register(num_examples=None)

    assert "a: privacy needs its declared number of examples; register" in refused(privacy=DP)


@pytest.mark.parametrize("delta", [1 / 12, 0.5])
def test_a_delta_that_means_nothing_is_refused(register, refused, delta):
    register()

    assert "is not below 1/12, the size of a" in refused(privacy={**DP, "delta": delta})


def test_a_budget_that_is_spent_is_refused_by_client_and_population(
    register, plan, tiny, workspace
):
    register(population="ward", epsilon=0.5, delta=1e-5)
    parameters = {"noise_multiplier": 0.5, "sample_rate": 0.5, "steps": 50.0}
    workspace.ledger.record_spend(
        SpendRow("e", "ward", "a", "r", 1, "d", "gaussian", "example", "add-remove", parameters)
    )

    with pytest.raises(BudgetSpent, match=r"a: its population 'ward' cannot keep within ε = 0\.5"):
        plan(tiny(privacy={"epsilon": 8, "delta": 1e-3, "accountant": "rdp"}))


def test_noise_is_calibrated_for_the_rounds_that_a_client_may_take_part_in(register, plan, tiny):
    register(num_examples=100)

    def noise(**privacy):
        made = plan(
            tiny(rounds=6, privacy={"epsilon": 2, "delta": 1e-3, "accountant": "rdp", **privacy})
        )
        return made.participants[0].privacy

    assert noise().noise_multiplier > noise(max_participations=2).noise_multiplier
    assert noise(max_participations=99) == noise()
    assert noise().sample_rate == 4 / 100


def test_another_base_model_is_refused(register, refused, committed):
    register()
    committed(recipe={"model": {"hash": "1" * 64, "id": "other/base", "labels": []}})

    why = refused(start_from="before", start="stack")

    assert "before was trained on base model 111111111111 (other/base), this run has" in why


def test_another_label_set_is_refused(register, refused, committed):
    register()
    committed()

    why = refused(start_from="before", start="continue", labels=["cat", "dog"])

    assert "before has the label set ['cat', 'dog', 'model', 'rank'], this run ['cat', 'd" in why


def test_going_on_with_another_adapter_is_refused(register, refused, committed, plan, tiny):
    register()
    committed()
    other = {"name": "lora", "r": 4, "layers": [0]}

    assert "start: continue goes on with the same adapter" in refused(
        start_from="before", start="continue", adapter=other
    )
    assert plan(tiny(start_from="before", start="stack", adapter=other)).start.mode == "stack"


def test_a_stack_grows_by_the_version_it_starts_from(register, plan, tiny, committed):
    register()
    ground = committed("ground", task_labels=["cat"])
    first = committed("first", task_labels=["dog"], start="stack", start_from="ground")

    def start(mode):
        return plan(tiny(start=mode, start_from="first", task_labels=["rank"])).start

    assert start("stack").stack == (ground, first)
    assert start("continue").stack == (ground,)
    assert start("fresh").stack == ()
    assert start("stack").seen_labels == ("cat", "dog")


def test_every_run_has_an_id_of_its_own(register, plan, tiny):
    register()
    first, second = plan(tiny()), plan(tiny())

    assert first.run != second.run
    assert replace(first, run=second.run) == second


@pytest.mark.parametrize("changes", [{"late": "keep"}, {"asynchronous": ASYNCHRONOUS}])
def test_updates_of_older_versions_are_refused_where_the_basis_changes(register, refused, changes):
    register("a")
    register("b")

    why = refused(strategy="fedsvd", **changes)

    assert "strategy 'fedsvd' changes from round to round what an update is relative to" in why
    assert "use ffa-lora or fedavg" in why


@pytest.mark.parametrize("strategy", ["ffa-lora", "fedavg"])
def test_updates_of_older_versions_are_taken_where_the_basis_stays(register, plan, tiny, strategy):
    register("a")
    register("b")

    assert plan(tiny(strategy=strategy, asynchronous=ASYNCHRONOUS)).config.stale is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort": {"where": {"gpu": "a100"}}}, "cohort.where: no client that takes part has the"),
        ({"quorum": 3}, "quorum: 3 is more than the 2 clients that may be asked"),
        (
            {"asynchronous": {"buffer": 3, "concurrency": 9}},
            "asynchronous.buffer: 3 updates are more than the 2 clients that may be asked can send",
        ),
        ({"cohort": {"weight": "examples"}}, "examples needs every client's declared number"),
    ],
)
def test_rounds_that_could_never_get_what_they_need_are_refused(
    register, refused, changes, message
):
    register("a")
    register("b", num_examples=None)

    assert message in refused(**changes)


def test_simulated_clients_are_counted_where_they_are_drawn_by_size(plan, tiny, notes):
    clients = {"simulate": {"data": notes(size=9), "parts": 2}}

    weighted = plan(tiny(clients=clients, cohort={"size": 1, "weight": "examples"}))

    assert [p.num_examples for p in weighted.participants] == [5, 4]
    assert [p.num_examples for p in plan(tiny(clients=clients)).participants] == [0, 0]
