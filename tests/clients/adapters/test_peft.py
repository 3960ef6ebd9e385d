"""PEFT's LoRA family behind weft's adapter protocol."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clients import models, placement
from clients.adapters import ADAPTERS
from clients.adapters.peft import UnsupportedUnderlay
from clients.assignment import ModelSpec
from clients.initialisations import InitInputs
from clients.lora_layers import AdapterMismatch
from strategies.base import Update, beneath
from strategies.fedex_lora import FedExLoRA
from strategies.plugins import BadOptions

QUERY = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    return models.load(ModelSpec(id=str(tiny_encoder), kind="classification", labels=("x", "y")))


@pytest.fixture
def attach(encoder):
    """Attach an adapter by name and options; detached afterwards."""
    made = []

    def attach(name: str = "lora", underlay=None, **options):
        adapter = ADAPTERS.get(name).build(**options)
        made.append(adapter)
        return adapter, adapter.attach(encoder.backbone, underlay or {})

    yield attach
    for adapter in made:
        adapter.detach(encoder.backbone)


def run(model) -> torch.Tensor:
    ids = torch.tensor([[2, 9, 11, 40, 3]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def test_auto_targets_are_pefts_own_for_the_architecture(attach):
    adapter, model = attach(r=4)
    layers = {name.removesuffix(".scaling") for name in adapter.read(model) if "scaling" in name}
    assert layers == {
        f"encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "value")
    }


def test_lora_scaling_is_alpha_over_rank(attach):
    adapter, model = attach("lora", r=4, alpha=6.0)
    assert adapter.read(model)[f"{QUERY}.scaling"] == 1.5


def test_rslora_scaling_is_alpha_over_the_root_of_the_rank(attach):
    adapter, model = attach("rslora", r=4, alpha=6.0)
    assert adapter.read(model)[f"{QUERY}.scaling"] == 3.0


def test_the_default_alpha_gives_every_rank_the_scaling_one(attach):
    adapter, model = attach("lora", r=4, rank_pattern={"value": 2})
    scalings = [t for name, t in adapter.read(model).items() if name.endswith(".scaling")]
    assert all(scaling == 1.0 for scaling in scalings)


def test_patterns_give_layers_their_own_rank_and_alpha(attach):
    adapter, model = attach("lora", r=4, rank_pattern={"layer.1.*": 2}, alpha_pattern={QUERY: 8.0})
    tensors = adapter.read(model)
    assert tensors[f"{QUERY}.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{QUERY}.scaling"] == 2.0
    assert tensors["encoder.layer.1.attention.self.value.lora_B.weight"].shape == (32, 2)


def test_the_first_pattern_that_names_a_layer_counts(attach):
    adapter, model = attach("lora", r=4, rank_pattern={QUERY: 3, "query": 2})
    tensors = adapter.read(model)
    assert tensors[f"{QUERY}.lora_A.weight"].shape == (3, 32)
    assert tensors["encoder.layer.1.attention.self.query.lora_A.weight"].shape == (2, 32)


def test_all_linear_adapts_every_linear_layer_and_no_embedding(attach):
    adapter, model = attach(r=2, target_modules="all-linear")
    assert sum("scaling" in name for name in adapter.read(model)) == 2 * 6


def test_all_linear_leaves_the_output_embedding_of_a_decoder_alone(tiny_decoder):
    backbone = models.skeleton(ModelSpec(id=str(tiny_decoder), kind="causal-lm"))
    assert "lm_head" not in placement.targets(backbone, "all-linear", None)


def test_layers_restrict_the_targets(attach):
    adapter, model = attach(r=2, layers=[1])
    assert all(name.startswith("encoder.layer.1.") for name in adapter.read(model))


def test_excluded_modules_are_left_out(attach):
    adapter, model = attach(
        r=2, target_modules="all-linear", exclude_modules=["key", r"output\.dense"]
    )
    layers = {name.removesuffix(".scaling") for name in adapter.read(model) if "scaling" in name}
    assert layers == {
        f"encoder.layer.{i}.{part}"
        for i in (0, 1)
        for part in ("attention.self.query", "attention.self.value", "intermediate.dense")
    }


def test_an_excluded_module_that_is_no_target_is_refused(attach):
    with pytest.raises(BadOptions, match="exclude_modules: no adapted layer is called 'kye'"):
        attach(target_modules="all-linear", exclude_modules=["kye"])


def test_excluding_every_target_is_refused(attach):
    with pytest.raises(BadOptions, match=r"leaves no layer to adapt \(there were: query, value\)"):
        attach(exclude_modules=["query", "value"])


def test_a_regular_expression_of_whole_names_is_a_target(attach):
    adapter, model = attach(r=2, target_modules=r"encoder\.layer\.[01]\.output\.dense")
    assert {n for n in adapter.read(model) if "scaling" in n} == {
        "encoder.layer.0.output.dense.scaling",
        "encoder.layer.1.output.dense.scaling",
    }


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_every_initialisation_starts_at_zero_delta(attach, init):
    adapter, model = attach(r=4, init=init)
    tensors = adapter.read(model)
    product = tensors[f"{QUERY}.lora_B.weight"] @ tensors[f"{QUERY}.lora_A.weight"]
    assert product.abs().max() < 1e-6
    assert tensors[f"{QUERY}.lora_A.weight"].abs().max() > 0


def test_dora_starts_with_the_norms_of_the_base_rows(attach, encoder):
    weight = encoder.backbone.get_submodule(QUERY).weight.detach().clone()
    adapter, model = attach("dora", r=4)
    magnitude = adapter.read(model)[f"{QUERY}.lora_magnitude_vector"]
    torch.testing.assert_close(magnitude, weight.norm(dim=1))


def test_tensors_of_another_rank_and_scaling_load_as_they_are(attach):
    adapter, model = attach("lora", r=2)
    tensors = adapter.read(model)
    source = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 32, generator=source), torch.randn(32, 4, generator=source)
    zeros = {n: torch.zeros_like(t) for n, t in tensors.items() if "lora_B" in n}
    wide = {f"{QUERY}.lora_A.weight": a, f"{QUERY}.lora_B.weight": b}
    adapter.write(model, {**tensors, **zeros, **wide, f"{QUERY}.scaling": torch.tensor(0.5)})
    wide_output = run(model)
    # The same product from factors split in another way is the same function.
    halves = {f"{QUERY}.lora_A.weight": a * 0.5, f"{QUERY}.lora_B.weight": b}
    adapter.write(model, {**tensors, **zeros, **halves, f"{QUERY}.scaling": torch.tensor(1.0)})
    torch.testing.assert_close(run(model), wide_output)
    assert adapter.read(model)[f"{QUERY}.lora_A.weight"].shape == (4, 32)
    assert adapter.parameters(model)[f"{QUERY}.lora_A.weight"].requires_grad


def test_a_layer_whose_rank_changed_still_trains(attach):
    adapter, model = attach("lora", r=2)
    tensors = adapter.read(model)
    wide = {
        f"{QUERY}.lora_A.weight": torch.ones(5, 32),
        f"{QUERY}.lora_B.weight": torch.ones(32, 5),
    }
    run_with_grad = model(input_ids=torch.tensor([[2, 9, 3]])).last_hidden_state.sum()
    run_with_grad.backward()
    adapter.write(model, {**tensors, **wide})
    model(input_ids=torch.tensor([[2, 9, 3]])).last_hidden_state.square().sum().backward()
    live = adapter.parameters(model)[f"{QUERY}.lora_A.weight"]
    assert live.grad.shape == (5, 32)


def test_head_tensors_among_the_adapters_are_ignored(attach):
    adapter, model = attach()
    adapter.write(model, {**adapter.read(model), "head.weight": torch.zeros(2, 32)})
    assert not any("head" in name for name in adapter.read(model))


def test_a_rank_above_the_layer_is_refused_with_the_layer(attach, encoder):
    with pytest.raises(BadOptions) as error:
        attach(r=64)
    assert str(error.value) == f"rank must be between 1 and 32 ({QUERY} is [32, 32]), got 64"
    assert not hasattr(encoder.backbone, "peft_config")


def test_an_unknown_target_is_refused_with_the_nearest(attach):
    with pytest.raises(BadOptions, match=r"'qeury'; did you mean 'query'\? \(linear layers: dense"):
        attach(target_modules=["qeury"])


def test_an_unknown_layer_index_is_refused(attach):
    with pytest.raises(BadOptions, match="layers must be among 0, 1, got 7"):
        attach(layers=[0, 7])


def test_a_pattern_that_names_no_layer_is_refused(attach):
    with pytest.raises(BadOptions, match="rank_pattern: no adapted layer is called 'key'"):
        attach(rank_pattern={"key": 2})


def test_a_broken_regular_expression_is_refused(attach):
    with pytest.raises(BadOptions, match="not a regular expression"):
        attach(target_modules="(query")


def test_auto_refuses_an_architecture_it_does_not_know():
    with pytest.raises(BadOptions, match="'all-linear' or some of: 0"):
        placement.targets(nn.Sequential(nn.Linear(2, 2)), "auto", None)


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("mica", "also freezes B, and is an adapter"),
        ("arrow", "routes between adapters that are finished"),
        ("qalora", "starts from GPTQ weights"),
    ],
)
def test_what_weft_does_not_start_from_is_refused_with_the_reason(init, reason):
    with pytest.raises(BadOptions, match=f"init '{init}' {reason}.*use one of 'kaiming'"):
        ADAPTERS.get("lora").build(init=init)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga", "loftq"])
def test_a_start_from_a_product_is_refused_where_the_delta_is_more_than_one(init):
    with pytest.raises(
        BadOptions, match=r"the delta of dora \(as set\) is more than that; use lora"
    ):
        ADAPTERS.get("dora").build(init=init)


@pytest.mark.parametrize("options", [{"name": "velora"}, {"name": "lora", "init": "lora_ga"}])
def test_what_needs_an_unquantised_base_is_not_attached_to_another(attach, encoder, options):
    query = encoder.backbone.get_submodule(QUERY)
    whole = query.weight.data
    query.weight.data = whole.to(torch.int8)
    try:
        with pytest.raises(BadOptions, match=f"not quantised, and {QUERY} is; choose another"):
            attach(**options)
    finally:
        query.weight.data = whole
    assert not hasattr(query, "lora_A")


def test_kasa_starts_in_its_own_way():
    with pytest.raises(BadOptions, match="adapter 'kasa' has no option 'init'"):
        ADAPTERS.get("kasa").check({"init": "pissa"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be >= 1, got 0"),
        ({"alpha": 0}, "alpha must be > 0, got 0"),
        ({"dropout": 1.0}, "dropout must be >= 0 and < 1"),
        ({"init": "zeros"}, "init must be one of 'kaiming', 'gaussian', 'orthogonal'.*got 'zeros'"),
        ({"init": "pissa_niter_0"}, "got 'pissa_niter_0'"),
        ({"init": "pissa_niter_N"}, "got 'pissa_niter_N'"),
        ({"init_options": {"rho": 1.0}}, r"init 'kaiming' has no option 'rho' \(options: none\)"),
        ({"init": "eva", "init_options": {"rho": 0.5}}, "rho must be >= 1, got 0.5"),
        (
            {"init": "corda", "init_options": {"corda_method": "x"}},
            "corda_method must be one of 'ipm', 'kpm', got 'x'",
        ),
        ({"r": 3, "init": "orthogonal"}, "the rank of r must be even"),
        ({"rank_pattern": {"query": 0}}, "the rank of query must be >= 1, got 0"),
        ({"alpha_pattern": {"query": -1.0}}, "the alpha of query must be > 0"),
        ({"target_modules": 3}, "target_modules must be str or list of str"),
    ],
)
def test_a_bad_option_is_refused_before_any_model(options, message):
    with pytest.raises(BadOptions, match=message):
        ADAPTERS.get("lora").build(**options)


def test_a_missing_tensor_is_named_and_nothing_is_written(attach):
    adapter, model = attach(r=2)
    before = adapter.read(model)
    changed = {name: tensor + 1.0 for name, tensor in before.items()}
    del changed[f"{QUERY}.lora_B.weight"]
    with pytest.raises(AdapterMismatch, match=f"no tensor {QUERY}.lora_B.weight"):
        adapter.write(model, changed)
    after = adapter.read(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_unexpected_tensor_is_named(attach):
    adapter, model = attach(r=2)
    with pytest.raises(
        AdapterMismatch, match=r"pooler\.lora_A\.weight, for which this model has no"
    ):
        adapter.write(model, {**adapter.read(model), "pooler.lora_A.weight": torch.ones(2, 32)})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora_A.weight", (2, 31), r"lora_A.weight must be \[2, 32\], got \[2, 31\]"),
        ("lora_B.weight", (32, 3), r"lora_B.weight must be \[32, 2\], got \[32, 3\]"),
        ("scaling", (1,), r"scaling must be \[\], got \[1\]"),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(attach, name, shape, message):
    adapter, model = attach(r=2)
    with pytest.raises(AdapterMismatch, match=message):
        adapter.write(model, {**adapter.read(model), f"{QUERY}.{name}": torch.ones(shape)})


def test_dora_is_not_stacked_on_another_adapter(attach):
    adapter, model = attach("lora", r=2)
    tensors = adapter.read(model)
    adapter.detach(model)
    with pytest.raises(UnsupportedUnderlay, match="dora cannot be trained on top"):
        attach("dora", tensors)


def test_nothing_is_stacked_on_dora(attach):
    adapter, model = attach("dora", r=2)
    tensors = adapter.read(model)
    adapter.detach(model)
    with pytest.raises(UnsupportedUnderlay, match="lora_magnitude_vector, so its delta is not"):
        attach("lora", tensors)


def test_an_underlay_of_another_base_model_is_refused_and_leaves_the_base_alone(attach, encoder):
    names = [name for name, _ in encoder.backbone.named_modules()]
    with pytest.raises(AdapterMismatch, match=r"has the layer model\.q_proj, which the base"):
        attach("lora", {"model.q_proj.scaling": torch.tensor(1.0)})
    wrong = {f"{QUERY}.lora_A.weight": torch.ones(2, 8), f"{QUERY}.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(AdapterMismatch, match=r"must be \[2, 32\], got \[2, 8\]"):
        attach("lora", {**wrong, f"{QUERY}.scaling": torch.tensor(1.0)})
    assert [name for name, _ in encoder.backbone.named_modules()] == names
    assert not hasattr(encoder.backbone, "peft_config")


def test_frozen_underlay_tensors_stay_exactly_as_they_are_in_training(attach):
    adapter, model = attach("lora", r=2)
    below = {name: tensor + 0.1 for name, tensor in adapter.read(model).items()}
    adapter.detach(model)
    adapter, model = attach("lora", below, r=4)
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".underlay" in n}
    assert len(frozen) == 8
    trained = list(adapter.parameters(model).values())
    optimizer = torch.optim.SGD(trained, lr=0.1, weight_decay=0.1)
    model(input_ids=torch.tensor([[2, 9, 3]])).last_hidden_state.square().sum().backward()
    optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    assert not any(now[name].requires_grad for name in frozen)


def test_adapters_of_a_half_precision_base_are_float32(tiny_decoder, tiny_options):
    spec = ModelSpec(id=str(tiny_decoder), kind="causal-lm", compute_dtype="bf16")
    backbone = models.load(spec).backbone
    for name in ADAPTERS.names():
        adapter = ADAPTERS.get(name).build(r=2, **tiny_options.get(name, {}))
        model = adapter.attach(backbone, {})
        adapter.initialise(model, InitInputs(model, list, list, list))
        dtypes = {parameter.dtype for parameter in adapter.parameters(model).values()}
        assert model(input_ids=torch.tensor([[2, 9, 11, 40]])).logits.dtype == torch.bfloat16
        adapter.detach(model)
        assert dtypes == {torch.float32}, name


def test_gpt2s_transposed_layers_are_adapted():
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    backbone = GPT2Model(config).eval()
    adapter = ADAPTERS.get("lora").build(r=2)
    model = adapter.attach(backbone, {})
    tensors = adapter.read(model)
    adapter.detach(model)
    assert tensors["h.0.attn.c_attn.lora_A.weight"].shape == (2, 8)
    assert tensors["h.0.attn.c_attn.lora_B.weight"].shape == (24, 2)


def test_what_lies_beneath_transposed_layers_is_the_mean_of_the_products():
    """Square and not, where FedEx-LoRA's own code adds a transpose; rsLoRA and alphas by layer."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    backbone, ids = GPT2Model(config).eval(), torch.tensor([[3, 1, 4, 1, 5]])
    options = {"r": 2, "target_modules": ["c_attn", "attn.c_proj"], "alpha_pattern": {"c_attn": 5}}
    adapter, strategy = ADAPTERS.get("rslora").build(**options), FedExLoRA(weighting="uniform")
    model = adapter.attach(backbone, {})
    state = strategy.init(adapter.read(model))
    adapter.detach(model)
    generator = torch.Generator().manual_seed(0)
    updates = [
        Update(
            client,
            1,
            "",
            {
                n: t + torch.randn(t.shape, generator=generator)
                for n, t in sorted(state.adapter.items())
                if not n.endswith(".scaling")
            },
            1,
        )
        for client in "abc"
    ]
    state = strategy.aggregate(state, updates)

    model = adapter.attach(backbone, beneath(state.auxiliary))
    adapter.write(model, state.adapter)
    with torch.no_grad():
        adapted = model(ids).last_hidden_state
    adapter.detach(model)
    for name in ("h.0.attn.c_attn", "h.0.attn.c_proj"):
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        mean = sum(u.tensors[b] @ u.tensors[a] for u in updates) / 3
        weight = backbone.get_submodule(name).weight  # [in, out]
        weight.data += state.adapter[f"{name}.scaling"] * mean.T
    with torch.no_grad():
        dense = backbone(ids).last_hidden_state
    torch.testing.assert_close(adapted, dense, rtol=1e-4, atol=1e-5)


def test_gaussian_rows_have_the_spread_of_the_inverse_rank(attach):
    adapter, model = attach(r=8, init="gaussian")
    a = adapter.read(model)[f"{QUERY}.lora_A.weight"]
    assert a.std() == pytest.approx(1 / 8, rel=0.2)


def test_kaiming_rows_have_pefts_bound(attach):
    adapter, model = attach(r=8)
    a = adapter.read(model)[f"{QUERY}.lora_A.weight"]
    bound = 1 / math.sqrt(32)
    assert 0.9 * bound < a.abs().max() <= bound
