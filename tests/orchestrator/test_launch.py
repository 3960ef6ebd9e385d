"""Everything that can be wrong with a run is found before anything starts."""

from dataclasses import dataclass, replace

import pytest
import torch

from clients.accounting import BudgetSpent
from clients.models import shapes
from orchestrator import launch, nodes
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of
from orchestrator.merging import NotAModel
from orchestrator.recipes import round_recipe
from orchestrator.strategy_refusals import adapter_of
from storage.ledger import ClientRecord, SpendRow
from strategies import STRATEGIES
from strategies.fedavg import FedAvg
from strategies.plugins import BadOptions, Plugin
from strategies.tensors import refactored

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


def test_data_at_a_site_are_refused_where_no_worker_could_read_them(register, refused):
    register("a")
    register("b", data="site:notes")
    register("c", data="site:notes")

    assert refused(backend="inline") == (
        "backend: inline trains where data can be read, and those of b (2 of 3 clients) lie at "
        "their sites; use backend: superlink, or leave them out"
    )


@pytest.mark.parametrize("key", ["evaluate", "init_data"])
def test_what_is_read_here_must_not_lie_at_a_site(register, refused, key):
    register()

    said = refused(**{key: {"data": "site:notes"}})

    assert (
        said == f"{key}.data: site:notes lies at a site, and is read here; name data that are here"
    )


@pytest.mark.parametrize("own", ["data", "holdout"])
def test_no_run_is_scored_on_a_clients_own_data_without_its_owners_word(
    register, refused, plan, tiny, notes, tmp_path, own
):
    held = notes("held")
    register("a", **({"data": held} if own == "data" else {"holdout": held}))
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "held.jsonl").read_bytes())
    for place in (held, f"jsonl:{copy}"):
        said = refused(evaluate={"data": place})
        assert f"evaluate.data: {place} has the data of client 'a'" in said
        assert "evaluate.clients" in said
    agreed = plan(tiny(evaluate={"data": held}, accept_unbounded="its owner agreed"))
    assert [who.name for who in agreed.participants] == ["a"]


def test_a_run_is_scored_on_data_of_nobody_or_of_all(register, plan, tiny, notes):
    register("a", public=True)
    register("b", data=notes("other", shift=1))
    for place in (notes("a"), notes("held", shift=3)):
        assert plan(tiny(evaluate={"data": place})).config.evaluate.data == place


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


def test_a_hard_form_on_an_adapter_without_the_factor_is_refused(register, refused):
    register()
    adapter = {"name": "curlora", "r": 4, "layers": [0]}

    why = refused(strategy="fed-sb", adapter=adapter, regularizers=HARD)

    assert "'o-lora' (as set) chooses tensors that adapter 'curlora' does not have" in why


@pytest.mark.parametrize("method", ["gpm", "n-lora", "o-lora"])
def test_what_reads_whole_factors_is_refused_for_an_adapter_of_blocks(register, refused, method):
    register()
    adapter = {"name": "bdlora", "r": 2, "layers": [0]}

    why = refused(adapter=adapter, strategy="fedavg", regularizers=[method], optimizer="sgd")

    assert f"regularizer '{method}' needs every layer's B and A whole" in why


def test_a_soft_penalty_is_not_held_against_the_adapter_that_goes_on(
    register, refused, plan, tiny, workspace
):
    """The memory has the directions of the very adapter: it would be drawn away from itself."""
    register()
    changes = {"strategy": "fedavg", "regularizers": ["o-lora"]}
    made = plan(tiny(**changes))
    tensors = {n: torch.zeros(shape) for n, shape in shapes(made.model, adapter_of(made)).items()}
    version = workspace.store.commit(tensors, parents={}, recipe=round_recipe(made, 1, []))

    why = refused(**changes, start="continue", start_from=version)

    assert "regularizer 'o-lora' keeps a new adapter away from what earlier tasks use" in why


@pytest.mark.parametrize(("strategy", "form"), [("fedsvd", "hard"), ("fedavg", "soft")])
def test_forms_that_fit_the_strategy_are_planned(register, plan, tiny, strategy, form):
    register()
    method = {"name": "o-lora", "form": form}

    assert plan(tiny(strategy=strategy, regularizers=[method])).regularizers[0].name == "o-lora"


@pytest.mark.parametrize("strategy", ["fedsvd", "ffa-lora"])
def test_a_strategy_that_trains_only_what_the_adapter_freezes_is_refused(
    register, refused, strategy
):
    register()

    why = refused(strategy=strategy, adapter={"name": "mica", "r": 2, "layers": [0]})

    assert f"strategy {strategy!r} trains" in why
    assert "adapter 'mica' keeps encoder.layer.0.attention.self.query.lora_B.weight frozen" in why


@pytest.mark.parametrize("strategy", ["fedsvd", "ffa-lora"])
@pytest.mark.parametrize("name", ["monteclora", "velora"])
def test_a_method_for_the_training_of_a_is_refused_where_a_is_frozen(
    register, refused, plan, tiny, strategy, name
):
    register()
    adapter = {"name": name, "r": 2, "layers": [0]}

    why = refused(strategy=strategy, adapter=adapter)

    assert f"strategy {strategy!r} keeps A frozen, and adapter {name!r} (as set) differs" in why
    assert plan(tiny(strategy="fedavg", adapter=adapter)).adapter.name == name


@pytest.mark.parametrize("strategy", ["fedsvd", "ffa-lora"])
def test_a_strategy_of_plain_factors_is_refused_with_blocks(register, refused, strategy):
    register()

    why = refused(strategy=strategy, adapter={"name": "bdlora", "r": 2, "layers": [0]})

    assert f"strategy {strategy!r} needs plain factors B and A, and adapter 'bdlora' has" in why


def test_an_adapter_that_declares_no_engine_is_refused_under_privacy(
    register, refused, monkeypatch
):
    register()
    monkeypatch.setattr("orchestrator.refusals.engines_of", lambda capabilities: [])

    assert "adapter 'lora' declares no engine that gives its exact" in refused(privacy=DP)


def test_an_adapter_for_models_that_generate_is_refused_for_classification(register, refused):
    register()

    why = refused(adapter={"name": "alora", "r": 2, "invocation": [11]})

    assert "adapter 'alora' is for models that generate, and the task is classification" in why


@pytest.mark.parametrize("name", ["velora", "bdlora", "monteclora"])
def test_an_adapter_without_quantised_layers_is_refused_with_them(
    register, refused, tiny_encoder, name
):
    register()
    model = {"id": str(tiny_encoder), "max_length": 16, "quantization": "int8"}

    why = refused(model=model, adapter={"name": name, "r": 2})

    assert (
        f"adapter {name!r} (as set) needs a base model that is not quantised, and model.quant"
        in why
    )


def test_a_strategy_that_changes_what_the_adapter_keeps_is_refused(
    register, refused, plan, tiny, monkeypatch
):
    @dataclass(frozen=True)
    class Orthonormal(FedAvg):
        """FedAvg whose every aggregate is re-split, which rotates B."""

        def aggregate(self, state, updates):
            mean = super().aggregate(state, updates)
            return replace(mean, adapter=refactored(mean.adapter))

    plugin = Plugin("strategy", "fedavg", Orthonormal, "")
    monkeypatch.setitem(STRATEGIES._plugins, "fedavg", plugin)
    register()

    why = refused(strategy="fedavg", adapter={"name": "mica", "r": 2, "layers": [0]})

    assert "strategy 'fedavg' changes encoder.layer.0.attention.self.query.lora_B.weight" in why
    assert plan(tiny(adapter={"name": "lora", "r": 2})).strategy.name == "fedavg"


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

    assert "insecure_seed gives no privacy, and its population 'a' has a budget (ε = 4)" in why


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
    assert "adapter 'dora' cannot be stacked on another adapter" in refused(
        start_from="before", start="stack", adapter={**other, "name": "dora"}
    )


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


def lora(init, name="lora", **options):
    return {"name": name, "r": 2, "layers": [0], "init": init, **options}


HARD = [{"name": "o-lora", "form": "hard"}]
FFA = {"name": "ffa-lora", "orthonormal": True}


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("strategy", ["fedsvd", "ffa-lora"])
def test_a_start_whose_product_would_be_moved_is_refused(register, refused, init, strategy):
    register()

    why = refused(adapter=lora(init), strategy=strategy, regularizers=HARD)

    assert "regularizer 'o-lora' (as set) chooses A anew before round 1, and adapter 'lora'" in why


@pytest.mark.parametrize("strategy", ["fedavg", "fedsvd", "ffa-lora", FFA])
@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_strategies_that_keep_the_product_may_start_from_one(register, plan, tiny, init, strategy):
    register()

    assert plan(tiny(adapter=lora(init), strategy=strategy)).adapter.options["init"] == init


def test_a_factor_that_starts_at_zero_leaves_the_other_free(register, plan, tiny, notes):
    register()
    given = {"data": notes("public"), "public": True}

    for init, extra in (("gaussian", {}), ("eva", {"init_data": given})):
        made = plan(tiny(adapter=lora(init), strategy="fedsvd", regularizers=HARD, **extra))
        assert made.regularizers[0].name == "o-lora"


@pytest.mark.parametrize("strategy", ["fedsvd", "ffa-lora"])
def test_a_diagonal_between_the_factors_is_not_refactored(register, refused, strategy):
    register()

    why = refused(adapter={"name": "kasa", "r": 2}, strategy=strategy)

    assert f"strategy '{strategy}' needs plain factors B and A, and adapter 'kasa' has oth" in why
    assert "has a diagonal between its factors, so that B A is not its delta" in why


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_a_start_from_data_needs_data_that_everyone_may_see(register, refused, plan, tiny, init):
    register()
    chosen = {"adapter": lora(init), "start": "fresh"}

    assert "makes its first tensors from data; give init_data: {data: URI, pub" in refused(**chosen)
    why = refused(**chosen, init_data={"data": "jsonl:mine.jsonl"})
    assert "init_data: jsonl:" in why
    assert "is not known to be public, and what is made of it goes to every client" in why
    declared = {"data": "jsonl:mine.jsonl", "public": True}
    assert plan(tiny(**chosen, init_data=declared)).config.init_data.data.startswith("jsonl:/")
    assert plan(tiny(**chosen, init_data={"data": "builtin:parameter-types"}))


def test_data_that_nothing_reads_are_refused(register, refused):
    register()

    why = refused(adapter=lora("pissa"), init_data={"data": "builtin:parameter-types"})

    assert "init_data: adapter 'lora' (as set) reads no data; leave it out" in why


@pytest.mark.parametrize(
    ("init", "quantization", "message"),
    [
        ("loftq", "none", "what quantisation to nf4 lost, and model.quantization is 'none'"),
        ("loftq", "int8", "what quantisation to nf4 lost, and model.quantization is 'int8'"),
        ("lora_ga", "nf4", "needs a base model that is not quantised, and model.quantization is"),
    ],
)
def test_a_start_that_the_base_model_cannot_give_is_refused(
    register, refused, tiny_encoder, init, quantization, message
):
    register()
    model = {"id": str(tiny_encoder), "quantization": quantization}

    assert message in refused(
        adapter=lora(init), model=model, init_data={"data": "builtin:parameter-types"}
    )


def test_a_version_from_before_an_option_is_still_continued(register, plan, tiny, committed):
    register()
    recipe = round_recipe(plan(tiny()), 1, [])
    older = {k: v for k, v in recipe["adapter"]["options"].items() if k != "init_options"}
    committed(recipe={"adapter": {"name": "lora", "options": older}})

    assert plan(tiny(start_from="before", start="continue")).start.mode == "continue"


def test_what_is_only_a_part_of_versions_starts_nothing(register, plan, tiny, committed):
    register()
    committed(recipe={"kind": "offset"})

    with pytest.raises(NotAModel, match="is the offset that other versions took out of the base"):
        plan(tiny(start_from="before", start="stack"))


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


def test_a_strategy_that_trains_one_factor_after_the_other_trains_both(
    register, refused, plan, tiny
):
    register()
    velora = {"name": "velora", "r": 2, "layers": [0]}
    soft, hard = ({"name": "o-lora", "form": form} for form in ("soft", "hard"))

    assert plan(tiny(strategy="rolora", adapter=velora, regularizers=[soft]))
    assert "lora_A.weight frozen" in refused(strategy="rolora", regularizers=[hard])
    assert "changes from round to round" in refused(strategy="rolora", late="keep")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "with optimizer 'adamw' (as set) that is no sum of gradients; use sgd without"),
        ({"optimizer": {"name": "sgd", "momentum": 0.9}}, "optimizer 'sgd' (as set) that is no"),
        ({"optimizer": "sgd", "steps": None}, "epochs are not as many steps for everybody; give"),
        ({"optimizer": "sgd", "late": "keep"}, "changes from round to round"),
    ],
)
def test_control_variates_are_refused_where_none_can_be_learnt(
    register, refused, plan, tiny, changes, message
):
    register()

    assert message in refused(strategy="scaffold", **changes)
    assert plan(tiny(strategy="scaffold", optimizer="sgd"))


def test_a_part_that_stays_at_the_clients_is_in_the_recipe_and_evaluates_nothing(
    register, refused, plan, tiny
):
    register()
    held_back = {"data": "jsonl:/held-back"}

    recipe = round_recipe(plan(tiny(strategy={"name": "fedavgm", "inner": "fedsa-lora"})), 1, [])
    assert recipe["personal"] is True
    assert "personal" not in round_recipe(plan(tiny(strategy="fedavg")), 1, [])
    assert "no version is a whole model" in refused(strategy="fedsa-lora", evaluate=held_back)


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


def test_a_rule_that_needs_more_updates_than_a_round_makes_do_with_is_refused(
    register, refused, plan, tiny
):
    for name in "abcde":
        register(name)
    krum = {"name": "krum", "inner": "ffa-lora"}
    assert "needs 5 updates in every round, and a round makes do with 1 (quorum)" in refused(
        strategy=krum
    )
    assert plan(tiny(strategy=krum, quorum=5)).strategy.options["hostile"] == 1


def test_a_strategy_that_needs_a_client_in_every_round_is_refused_without_it(
    register, refused, plan, tiny
):
    for name in ("a", "b", "roof"):
        register(name)
    trust = {"name": "fltrust", "inner": "ffa-lora", "root": "root"}
    assert "needs client 'root', which takes no part; did you mean 'roof'" in refused(
        strategy=trust, quorum=2
    )
    trust["root"] = "roof"
    why = refused(strategy=trust, quorum=2, cohort=2)
    assert "needs client 'roof' in every round, and a round closes with 2 of 3 clients" in why
    assert plan(tiny(strategy=trust, quorum=2)).strategy.options["root"] == "roof"


@pytest.mark.parametrize(
    ("strategy", "uplink", "why"),
    [
        ("ffa-lora", ["int8", "top-k"], "uplink: 'top-k' cannot follow 'int8'"),
        ("fedsvd", ["top-k"], "with 'top-k' (as set) clients send later what they left out, and"),
    ],
)
def test_encodings_that_make_no_sense_are_refused(
    register, refused, plan, tiny, strategy, uplink, why
):
    register()
    assert why in refused(strategy=strategy, uplink=uplink)
    kept = [{"name": "top-k", "feedback": False}, "fp16"]
    assert [c.name for c in plan(tiny(strategy=strategy, uplink=kept)).uplink] == ["top-k", "fp16"]


def test_encodings_are_in_the_recipe_where_there_are_any(register, plan, tiny):
    register()
    made = round_recipe(plan(tiny(strategy="ffa-lora", uplink=[{"name": "top-k"}])), 1, [])
    assert made["uplink"] == [{"name": "top-k", "options": {"density": 0.05, "feedback": True}}]
    assert "uplink" not in round_recipe(plan(tiny(strategy="ffa-lora")), 1, [])


def simulated(notes, **more):
    return {"simulate": {"data": notes("s"), "parts": 2, **more}}


def test_simulated_clients_train_on_what_they_do_not_hold_out(plan, tiny, notes):
    chosen = simulated(notes, holdout=0.25)
    for who in plan(tiny(clients=chosen, privacy=DP)).participants:
        assert (who.data.part, who.data.holdout) == ("train", 0.25)
        assert who.holdout == replace(who.data, part="holdout")
        assert who.num_examples == 4  # of six records, as declared sizes are: about


def test_a_holdout_that_is_not_split_by_the_runs_unit_is_refused(refused, tiny, plan, notes):
    private = {**DP, "unit": "ward", "delta": 1e-2}
    said = refused(clients=simulated(notes, holdout=0.25), privacy=private)
    assert "its holdout is split by record" in said
    assert "0.25:ward" in said
    whole = plan(tiny(clients=simulated(notes, holdout="0.25:ward"), privacy=private))
    assert {who.holdout.unit for who in whole.participants} == {"ward"}


def test_a_site_says_of_how_many_people_its_data_are(workspace, plan, tiny, site, monkeypatch):
    # the one backend that reaches sites is not this one
    monkeypatch.setattr(launch, "_refuse_unreachable", lambda config, participants: None)
    people = {"examples": 100, "population": "north", "unit": "patient_id", "units": 40}
    budget = {"epsilon": 8.0, "delta": 1e-3, "holdout": 0.1}
    nodes.admit(workspace.ledger, site().join({"notes": people | budget}), nodes.Terms())

    [who] = plan(tiny(privacy={**DP, "unit": "patient_id"})).participants

    assert (who.num_examples, who.data.unit) == (40, "patient_id")
    assert (who.data.part, who.data.holdout, who.data.holdout_by) == ("train", 0.1, "patient_id")
    assert who.privacy.sample_rate == pytest.approx(4 / 40)
    with pytest.raises(BadConfig, match="split by patient_id"):
        plan(tiny(privacy={**DP, "unit": "ward"}))
