"""The initialisations that come from the base weights or from data, against PEFT and by hand."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, KasaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import AutoModel, BitsAndBytesConfig, GPT2Config, GPT2Model

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec
from clients.base_factors import NotSettled, residual_factors
from clients.data import Batch
from clients.initialisations import InitInputs
from clients.weights import stored_tensor
from strategies import STRATEGIES
from strategies.plugins import BadOptions

WEIGHTS = ("pissa", "pissa_niter_4", "olora")
DATA = ("eva", "corda", "lora_ga")
EVERY = [("lora", init) for init in (*WEIGHTS, *DATA)]
EVERY += [("rslora", "pissa"), ("rslora", "eva"), ("dora", "eva"), ("kasa", "kaiming")]
QUERY = "encoder.layer.0.attention.self.query"


def spec_of(folder, kind):
    labels = ("x", "y", "z") if kind == "classification" else ()
    return ModelSpec(id=str(folder), kind=kind, labels=labels)


@pytest.fixture(scope="module")
def bases(tiny_encoder, tiny_decoder):
    folders = {"classification": tiny_encoder, "causal-lm": tiny_decoder}
    return {kind: models.load(spec_of(path, kind)) for kind, path in folders.items()}


@pytest.fixture(params=["classification", "causal-lm"])
def base(request, bases):
    return bases[request.param]


def texts(kind: str, size: int) -> list[Batch]:
    """Eight texts of one length, in batches of at most ``size``."""
    source = torch.Generator().manual_seed(11)
    ids = torch.randint(5, 60, (8, 9), generator=source)
    labels = torch.arange(8) % 3 if kind == "classification" else ids
    mask = torch.ones_like(ids)
    return [
        Batch(ids[i : i + size], mask[i : i + size], labels[i : i + size])
        for i in range(0, 8, size)
    ]


def task_model(backbone, spec) -> models.TaskModel:
    torch.manual_seed(3)
    return models.TaskModel(backbone, spec)


def inputs_of(model, kind: str, batches=None) -> InitInputs:
    def losses(batch):
        return model.example_losses(model(batch), batch)

    return InitInputs(
        model,
        batches or (lambda size: texts(kind, size)),
        losses,
        lambda name: pytest.fail(f"nobody asked for {name}"),
    )


def build(method: str, init: str, **options):
    plugin = ADAPTERS.get(method)
    return plugin.build(**({"init": init} if "init" in plugin.options else {}), **options)


class Started:
    """An adapter that was attached, initialised and taken off again."""

    def __init__(self, base, method="lora", init="kaiming", underlay=None, **options):
        self.base, self.kind = base, base.spec.kind
        self.adapter = build(method, init, **{"r": 4, "alpha": 6.0, **options})
        torch.manual_seed(7)
        attached = self.adapter.attach(base.backbone, underlay or {})
        try:
            model = task_model(attached, base.spec)
            self.head = model.head_tensors()
            self.offset = dict(self.adapter.initialise(attached, inputs_of(model, self.kind)))
            self.tensors = self.adapter.read(attached)
        finally:
            self.adapter.detach(attached)

    def run(self, tensors=None, underlay=None) -> torch.Tensor:
        attached = self.adapter.attach(
            self.base.backbone, self.offset if underlay is None else underlay
        )
        try:
            self.adapter.write(attached, tensors or self.tensors)
            return run(attached)
        finally:
            self.adapter.detach(attached)


def run(model) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 11, 40, 8], [6, 7, 30, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask)[0]


def shaken(tensors):
    source = torch.Generator().manual_seed(1)
    return {
        name: t if name.endswith(".scaling") else t + 0.3 * torch.randn(t.shape, generator=source)
        for name, t in tensors.items()
    }


def product(tensors, layer):
    return (
        tensors[f"{layer}.scaling"]
        * tensors[f"{layer}.lora_B.weight"]
        @ tensors[f"{layer}.lora_A.weight"]
    )


def close(one, other, tolerance=1e-4):
    return float((one - other).norm() / other.norm()) <= tolerance


# --- what every initialisation promises -------------------------------------------------------


@pytest.mark.parametrize(("method", "init"), [e for e in EVERY if e[0] != "kasa"])
def test_the_adapter_and_its_offset_start_as_the_base_model(base, method, init):
    before = run(base.backbone)

    assert close(Started(base, method, init).run(), before)


@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("strategy", ["fedsvd", "ffa-lora"])
@pytest.mark.parametrize("init", ["orthogonal", *WEIGHTS, *DATA])
def test_strategies_that_refactor_before_round_one_keep_the_start(
    bases, init, strategy, orthonormal
):
    base = bases["classification"]
    started = Started(base, init=init)
    state = STRATEGIES.get(strategy).build(orthonormal=orthonormal).init(started.tensors)

    assert close(started.run(state.adapter), run(base.backbone))


@pytest.mark.parametrize(("method", "init"), EVERY)
def test_the_base_model_is_bit_identical_after_an_initialisation(base, method, init):
    before = {name: tensor.clone() for name, tensor in base.backbone.state_dict().items()}
    modules = {n: sorted(vars(m)) for n, m in base.backbone.named_modules()}
    trained = {n: p.requires_grad for n, p in base.backbone.named_parameters()}

    Started(base, method, init)

    after = base.backbone.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {n: sorted(vars(m)) for n, m in base.backbone.named_modules()} == modules
    assert {n: p.requires_grad for n, p in base.backbone.named_parameters()} == trained
    assert all(p.grad is None for p in base.backbone.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in base.backbone.modules())


@pytest.mark.parametrize(("method", "init"), EVERY)
def test_an_initialisation_gives_the_same_bytes_twice(base, method, init):
    one, same = Started(base, method, init), Started(base, method, init)

    assert one.tensors.keys() == same.tensors.keys()
    assert all(torch.equal(one.tensors[n], same.tensors[n]) for n in one.tensors)
    assert all(torch.equal(one.offset[n], same.offset[n]) for n in one.offset | same.offset)


@pytest.mark.parametrize(("method", "init"), EVERY)
def test_only_the_initialisation_pays_for_a_decomposition(base, method, init, monkeypatch):
    started = Started(base, method, init)
    for name in ("svd", "qr", "inv"):
        monkeypatch.setattr(torch.linalg, name, lambda *a, **k: pytest.fail("decomposed again"))
    monkeypatch.setattr(torch, "svd_lowrank", lambda *a, **k: pytest.fail("decomposed again"))

    started.run()


@pytest.mark.parametrize(("method", "init"), EVERY)
def test_what_starts_at_zero_says_so(base, method, init):
    started = Started(base, method, init)
    zero = all(not t.any() for n, t in started.tensors.items() if n.endswith("lora_B.weight"))

    assert zero == ("zero-b" in started.adapter.capabilities)
    assert bool(started.offset) == ("offset" in started.adapter.capabilities)


@pytest.mark.parametrize("init", [*WEIGHTS, "corda", "lora_ga"])
def test_the_offset_takes_away_what_the_adapter_starts_with(base, init):
    started = Started(base, init=init, rank_pattern={"layers.1.*|encoder.layer.1.*": 3})
    layers = {name.removesuffix(".scaling") for name in started.offset if "scaling" in name}

    assert len(layers) == 4
    for layer in layers:
        assert torch.equal(product(started.offset, layer), -product(started.tensors, layer))


@pytest.mark.parametrize("init", DATA)
def test_an_initialisation_that_reads_data_needs_some(base, init):
    adapter = ADAPTERS.get("lora").build(init=init, r=2)
    attached = adapter.attach(base.backbone, {})
    inputs = inputs_of(task_model(attached, base.spec), base.spec.kind, lambda size: [])
    try:
        with pytest.raises(BadOptions, match=f"init '{init}' reads data, and there are none"):
            adapter.initialise(attached, inputs)
    finally:
        adapter.detach(attached)


# --- equality with plain PEFT -----------------------------------------------------------------


def targets(started) -> str:
    names = [n.removesuffix(".scaling") for n in started.tensors if n.endswith(".scaling")]
    return "|".join(name.replace(".", r"\.") for name in names)


def peft_model(started, init, **options):
    """PEFT's own model on a copy of the base, started by PEFT's own code."""
    backbone, kind = copy.deepcopy(started.base.backbone), started.kind
    config = LoraConfig(
        init_lora_weights=init, r=4, lora_alpha=6, target_modules=targets(started), **options
    )
    whole = task_model(backbone, started.base.spec)
    if init == "corda":
        config.target_modules = "backbone.(" + config.target_modules + ")"
        preprocess_corda(whole, config, lambda: [whole(b) for b in texts(kind, 1)])
    if init == "lora_ga":
        config.target_modules = "backbone.(" + config.target_modules + ")"

        def step():
            for batch in texts(kind, 1):
                whole.example_losses(whole(batch), batch).mean().backward()

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook")
            preprocess_loraga(whole, config, step)
    config.target_modules = targets(started)
    torch.manual_seed(0)
    model = get_peft_model(backbone, config, low_cpu_mem_usage=init == "eva")
    if init == "eva":
        rows = [
            {
                "input_ids": b.input_ids,
                "attention_mask": b.attention_mask,
                **({} if kind == "classification" else {"labels": b.labels}),
            }
            for b in texts(kind, 64)
        ]

        def forward(model, batch):
            return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

        initialize_lora_eva_weights(model, rows, forward_fn=forward, show_progress_bar=False)
    return model


def put(model, tensors) -> None:
    """Write weft's tensors into PEFT's model."""
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith(".scaling"):
                continue
            place = f"base_model.model.{name.removesuffix('.weight')}.default"
            state[place + ".weight" * name.endswith(".weight")].copy_(tensor)


PEFT_OPTIONS = {
    "eva": {"eva_config": EvaConfig(rho=1.0)},
    "corda": {"corda_config": CordaConfig()},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
}


@pytest.mark.parametrize("init", [*WEIGHTS, *DATA])
def test_an_adapter_computes_what_pefts_own_does_from_the_start_and_trained(base, init):
    options = {"init_options": {"rho": 1.0}} if init == "eva" else {}
    started = Started(base, init=init, **options)
    theirs = peft_model(started, init, **PEFT_OPTIONS.get(init, {}))
    assert close(started.run(), run(theirs), 1e-5)

    live = dict(theirs.named_parameters())
    for name, tensor in started.tensors.items():
        if not name.endswith(".scaling"):
            place = f"base_model.model.{name.removesuffix('.weight')}.default.weight"
            torch.testing.assert_close(live[place].detach(), tensor, rtol=1e-3, atol=1e-4)
    trained = shaken(started.tensors)
    put(theirs, trained)
    assert close(started.run(trained), run(theirs), 1e-4)


def test_kasa_computes_what_pefts_own_does(base):
    started = Started(base, "kasa")
    theirs = peft_model(started, True, kasa_config=KasaConfig())
    put(theirs, started.tensors)
    truncated = run(theirs)
    assert close(started.run(), truncated, 1e-5)
    assert not close(truncated, run(base.backbone), 1e-3)  # the base gave something up

    trained = shaken(started.tensors)
    put(theirs, trained)
    assert close(started.run(trained), run(theirs), 1e-4)


# --- the papers' own properties ---------------------------------------------------------------


@pytest.fixture
def diagonal(bases):
    """The encoder with one weight that is a diagonal matrix, 32 down to 1."""
    base = copy.deepcopy(bases["classification"])
    weight = base.backbone.get_submodule(QUERY).weight
    weight.data.copy_(torch.diag(torch.arange(32, 0, -1.0)))
    return base


ONE = {"target_modules": [QUERY], "r": 2, "alpha": 2.0}


def test_pissa_starts_with_the_principal_components(diagonal):
    started = Started(diagonal, init="pissa", **ONE)

    expected = torch.zeros(2, 32)
    expected[0, 0], expected[1, 1] = 32**0.5, 31**0.5
    torch.testing.assert_close(started.tensors[f"{QUERY}.lora_A.weight"].abs(), expected)
    torch.testing.assert_close(started.tensors[f"{QUERY}.lora_B.weight"].abs(), expected.T)
    torch.testing.assert_close(
        product(started.tensors, QUERY), torch.diag(torch.tensor([32.0, 31.0] + [0.0] * 30))
    )


def test_kasa_gives_up_the_smallest_components(diagonal):
    started = Started(diagonal, "kasa", **ONE)

    torch.testing.assert_close(
        product(started.offset, QUERY), torch.diag(torch.tensor([0.0] * 30 + [-2.0, -1.0]))
    )
    assert started.tensors[f"{QUERY}.lora_diag"].shape == (2,)
    assert not started.tensors[f"{QUERY}.lora_B.weight"].any()


def test_kasa_leaves_something_of_the_weight(base):
    with pytest.raises(BadOptions, match="it must be below 32"):
        Started(base, "kasa", r=32)


def test_olora_starts_with_orthonormal_columns_of_b_that_span_the_weights_first(base):
    started = Started(base, init="olora")
    for name, b in started.tensors.items():
        if name.endswith("lora_B.weight"):
            torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-5)
            layer = name.removesuffix(".lora_B.weight")
            first = base.backbone.get_submodule(layer).weight[:, :4]
            torch.testing.assert_close(b @ (b.T @ first), first, rtol=1e-4, atol=1e-5)


def test_eva_starts_with_the_directions_in_which_a_layers_inputs_vary_most(bases):
    base = bases["classification"]
    seen = []
    layer = base.backbone.get_submodule(QUERY)
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    [batch] = texts("classification", 64)
    with torch.no_grad():
        base.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    hook.remove()
    inputs = seen[0].flatten(0, 1)
    wanted = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False).Vh[:2]

    a = Started(base, init="eva", init_options={"rho": 1.0}).tensors[f"{QUERY}.lora_A.weight"]

    torch.testing.assert_close((a[:2] @ wanted.T).abs(), torch.eye(2), rtol=0, atol=1e-2)


def test_eva_moves_ranks_to_the_layers_that_need_them(base):
    started = Started(base, init="eva", target_modules="all-linear")  # rho is 2
    ranks = [len(t) for n, t in started.tensors.items() if n.endswith("lora_A.weight")]

    assert len(set(ranks)) > 1
    assert min(ranks) >= 1
    assert sum(ranks) <= 4 * len(ranks) + sum(rank == 1 for rank in ranks)
    assert {float(t) for n, t in started.tensors.items() if "scaling" in n} == {1.5}  # 6 / 4


def test_eva_with_more_directions_than_inputs_is_refused(base):
    with pytest.raises(BadOptions, match=r"rank x rho = 20 x 2 directions, and .* has 32 inputs"):
        Started(base, init="eva", r=20)


def test_eva_gives_up_on_data_that_it_cannot_settle_on(base):
    adapter = ADAPTERS.get("lora").build(init="eva", r=8)
    attached = adapter.attach(base.backbone, {})

    def one_short_text(size):
        batch = texts(base.spec.kind, 1)[0]
        labels = batch.labels if batch.labels.ndim == 1 else batch.labels[:, :4]
        return [Batch(batch.input_ids[:, :4], batch.attention_mask[:, :4], labels)]

    inputs = inputs_of(task_model(attached, base.spec), base.spec.kind, one_short_text)
    try:
        with pytest.raises(NotSettled, match="has not settled after 50 passes"):
            adapter.initialise(attached, inputs)
        assert not any(m._forward_hooks for m in attached.modules())
    finally:
        adapter.detach(attached)


def gradient_of(base, name):
    model = task_model(base.backbone, base.spec)
    weight = base.backbone.get_submodule(name).weight.requires_grad_(True)
    batches = texts(base.spec.kind, 8)
    model.example_losses(model(batches[0]), batches[0]).mean().backward()
    gradient, weight.grad = weight.grad.clone(), None
    weight.requires_grad_(False)
    return gradient


def test_lora_ga_starts_along_the_singular_vectors_of_the_gradient(bases):
    base = bases["classification"]
    # the last layer's gradient has a spectrum that falls, so that its vectors are well defined
    name = "encoder.layer.1.attention.self.value"
    options = {"target_modules": [name], "r": 1, "alpha": 1.0}
    u, _, vh = torch.linalg.svd(gradient_of(base, name))

    tensors = Started(base, init="lora_ga", **options).tensors

    a, b = tensors[f"{name}.lora_A.weight"][0], tensors[f"{name}.lora_B.weight"][:, 0]
    assert abs(torch.cosine_similarity(a, vh[0], dim=0)) > 0.999  # ArB2r: A the first, B the next
    assert abs(torch.cosine_similarity(b, u[:, 1], dim=0)) > 0.999


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_splits_the_weight_by_what_the_inputs_use(bases, method):
    base = bases["classification"]
    seen = []
    layer = base.backbone.get_submodule(QUERY)
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(args[0][0]))
    with torch.no_grad():
        for batch in texts("classification", 1):
            base.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    hook.remove()
    scaled = [x / x.max().abs() for x in seen]
    covariance = sum(x.T @ x for x in scaled) / len(scaled)
    covariance += torch.eye(32) * covariance.diagonal().mean() * 0.01
    u, s, vh = torch.linalg.svd(layer.weight @ covariance)
    part = slice(0, 2) if method == "ipm" else slice(30, 32)
    wanted = (u[:, part] * s[part]) @ vh[part] @ torch.linalg.inv(covariance)

    tensors = Started(base, init="corda", init_options={"corda_method": method}, **ONE).tensors

    assert close(product(tensors, QUERY), wanted, 2e-2)


# --- stacks, transposed and quantised layers --------------------------------------------------


def test_over_a_frozen_adapter_pissa_splits_what_lies_under_it(base):
    below = shaken(Started(base, r=3).tensors)
    started = Started(base, init="pissa", underlay=below)
    layer = next(n.removesuffix(".scaling") for n in started.tensors if n.endswith(".scaling"))

    whole = base.backbone.get_submodule(layer).weight + product(below, layer)

    u, s, vh = torch.linalg.svd(whole)
    assert close(product(started.tensors, layer), (u[:, :4] * s[:4]) @ vh[:4], 1e-4)


@pytest.mark.parametrize(("method", "init"), [e for e in EVERY if e[1] not in DATA])
def test_gpt2s_transposed_layers_start_the_same_way(method, init):
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    backbone = GPT2Model(config).eval().requires_grad_(False)
    before = run_gpt2(backbone)
    adapter = build(method, init, r=2)
    attached = adapter.attach(backbone, {})
    offset = adapter.initialise(attached, InitInputs(attached, list, list, list))
    tensors = adapter.read(attached)
    adapter.detach(attached)

    weight = backbone.h[0].attn.c_attn.weight.T
    taken = product(offset, "h.0.attn.c_attn")
    adapter.attach(backbone, offset)
    adapter.write(backbone, tensors)
    after = run_gpt2(backbone)
    adapter.detach(backbone)
    if method == "kasa":
        smallest = torch.linalg.svdvals(weight)[-2:]
        assert taken.norm() == pytest.approx(float(smallest.norm()), rel=1e-4)
        assert torch.linalg.matrix_rank(weight + taken, rtol=1e-4) == 6
    else:
        assert close(after, before)


def run_gpt2(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 9]]))[0]


def test_loftq_gives_back_what_quantisation_lost():
    source = torch.Generator().manual_seed(4)
    weight = torch.randn(12, 10, generator=source)
    coarse = (weight * 2).round() / 2
    lost = weight - coarse

    found = residual_factors(weight, coarse, 3, 0.5)

    u, s, vh = torch.linalg.svd(lost, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    torch.testing.assert_close(0.5 * found.b @ found.a, best, rtol=1e-4, atol=1e-5)
    whole = residual_factors(weight, coarse, 10, 0.5)
    torch.testing.assert_close(coarse + 0.5 * whole.b @ whole.a, weight, rtol=1e-4, atol=1e-5)


def test_loftq_on_a_frozen_adapter_is_refused(base):
    below = shaken(Started(base, r=3).tensors)

    with pytest.raises(BadOptions, match="the adapter underneath may have restored it already"):
        Started(base, init="loftq", underlay=below)


@pytest.fixture(scope="module")
def nf4(tiny_encoder):
    """The encoder in nf4. On a CPU bitsandbytes repacks weights as it computes: run it nowhere."""
    pytest.importorskip("bitsandbytes")
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    backbone = AutoModel.from_pretrained(
        tiny_encoder, quantization_config=quantized, device_map={"": "cpu"}
    )
    return backbone.requires_grad_(False).eval()


def started_on(backbone, init, folder):
    """An adapter's first tensors and its offset on a quantised base."""
    adapter = ADAPTERS.get("lora").build(init=init, r=4, alpha=6.0, target_modules=[QUERY])
    spec = ModelSpec(id=str(folder), kind="classification", labels=("x", "y"))
    attached = adapter.attach(backbone, {})
    inputs = InitInputs(attached, list, list, lambda name: stored_tensor(spec, name))
    try:
        offset = adapter.initialise(attached, inputs)
        return adapter.read(attached), offset
    finally:
        adapter.detach(attached)


def test_loftq_starts_an_nf4_base_nearer_to_what_it_was(nf4, tiny_encoder):
    packed = nf4.get_submodule(QUERY).weight.clone()
    dequantized = dequantize_module_weight(nf4.get_submodule(QUERY)).float()
    whole = load_file(tiny_encoder / "model.safetensors")[f"{QUERY}.weight"]

    tensors, offset = started_on(nf4, "loftq", tiny_encoder)

    assert offset == {}
    lost = whole - dequantized
    left = lost - product(tensors, QUERY)
    smaller = torch.linalg.svdvals(lost)[4:]
    assert float(left.norm()) == pytest.approx(float(smaller.norm()), rel=1e-3)
    assert torch.equal(nf4.get_submodule(QUERY).weight, packed)


def test_pissa_takes_the_principal_components_of_an_nf4_weight_as_it_computes(nf4, tiny_encoder):
    packed = nf4.get_submodule(QUERY).weight.clone()
    u, s, vh = torch.linalg.svd(dequantize_module_weight(nf4.get_submodule(QUERY)).float())

    tensors, offset = started_on(nf4, "pissa", tiny_encoder)

    assert close(product(tensors, QUERY), (u[:, :4] * s[:4]) @ vh[:4], 1e-4)
    assert torch.equal(product(offset, QUERY), -product(tensors, QUERY))
    assert torch.equal(nf4.get_submodule(QUERY).weight, packed)
