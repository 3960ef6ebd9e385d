"""DP-SGD's gradients on real transformers with PEFT's LoRA, against a loop over single examples."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from clients.gradients import NoPerExampleGradient, PrivateGradient, plain_step
from clients.noise import MARGIN, NoiseStream, grid_of, insecure_key
from clients.per_example import ENGINES, measuring
from clients.samples import Dense, Factored

# PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LENGTH = 7
CLIP = 0.05


def stream(client="clinic-1", digest="digest"):
    return NoiseStream(insecure_key(0, client), digest)


class Classifier(nn.Module):
    """A tiny BERT with LoRA on query and value, mean pooling and a linear head."""

    def __init__(self, dropout=0.0):
        super().__init__()
        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        lora = LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=dropout)
        self.backbone = get_peft_model(BertModel(config), lora)
        self.head = nn.Linear(16, 3)

    def losses(self, batch):
        tokens, labels = batch
        hidden = self.backbone(input_ids=tokens).last_hidden_state
        return functional.cross_entropy(self.head(hidden.float().mean(1)), labels, reduction="none")


class Causal(nn.Module):
    """A tiny Llama with LoRA on all of its linear layers."""

    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        lora = LoraConfig(r=4, target_modules="all-linear")
        self.backbone = get_peft_model(LlamaForCausalLM(config), lora)

    def losses(self, batch):
        tokens, _ = batch
        logits = self.backbone(input_ids=tokens).logits[:, :-1]
        each = functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        return each.mean(1)


def build(kind=Classifier, frozen="none", **options):
    torch.manual_seed(0)
    model = kind(**options).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # PEFT starts it at zero, where A's gradient is zero too
            nn.init.normal_(parameter, std=0.3)
        if frozen in name:
            parameter.requires_grad_(False)
    return model


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def examples(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (count, LENGTH), generator=generator)
    return tokens, torch.randint(0, 3, (count,), generator=generator)


def parts(batch, size):
    tokens, labels = batch
    starts = range(0, len(tokens), size)
    return [(tokens[i : i + size], labels[i : i + size]) for i in starts]


def engine(model, sigma=0.0, expected=4, mask=None, noise=None, by="taps"):
    return PrivateGradient(
        model,
        trainable(model),
        bound=CLIP,
        noise_multiplier=sigma,
        expected_batch_size=expected,
        stream=noise or stream(),
        mask=mask or {},
        engine=by,
    )


def private_gradients(model, batch, size=64, step=0, **options):
    private = engine(model, **options)
    with private:
        private.step(parts(batch, size), model.losses, step)
    return grads(model)


def grads(model):
    return {name: p.grad.clone() for name, p in trainable(model).items()}


def reference_gradients(model, batch, mask=None, expected=4):
    """The definition of DP-SGD without noise: one example after the other."""
    params = trainable(model)
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    for single in parts(batch, 1):
        found = torch.autograd.grad(model.losses(single).sum(), list(params.values()))
        one = dict(zip(params, found, strict=True))
        one = {name: g * (mask or {}).get(name, 1) for name, g in one.items()}
        norm = torch.cat([g.flatten() for g in one.values()]).norm()
        for name, g in one.items():
            sums[name] += g * min(1.0, CLIP / norm.item())
    return {name: total / expected for name, total in sums.items()}


def assert_close(found, wanted, tolerance=1e-4):
    assert found.keys() == wanted.keys()
    for name in wanted:
        error = (found[name] - wanted[name]).norm()
        assert error <= tolerance * wanted[name].norm() + 1e-9, name


MODELS = [
    pytest.param(Classifier, "none", id="bert A+B and head"),
    pytest.param(Classifier, "lora_A", id="bert B and head"),
    pytest.param(Causal, "none", id="llama A+B"),
    pytest.param(Causal, "lora_A", id="llama B"),
]


@pytest.mark.parametrize("by", ENGINES)
@pytest.mark.parametrize(("kind", "frozen"), MODELS)
def test_gradients_equal_a_loop_over_single_examples(kind, frozen, by):
    model, batch = build(kind, frozen), examples(5)
    wanted = reference_gradients(model, batch)
    assert all(w.norm() > 0 for w in wanted.values())
    assert_close(private_gradients(model, batch, by=by), wanted, 1e-5)


def test_gradients_do_not_depend_on_the_microbatch():
    model, batch = build(), examples(6)
    whole = private_gradients(model, batch, size=6, sigma=1.0)
    for size in (1, 2, 4):
        assert_close(private_gradients(model, batch, size=size, sigma=1.0), whole, 1e-5)


def test_small_gradients_are_not_clipped():
    model, batch = build(), examples(4)
    private = PrivateGradient(model, trainable(model), 10.0, 0.0, 4, stream())
    with private:
        private.step([batch], model.losses, 0)
    clipped = grads(model)
    plain_step(trainable(model), [batch], model.losses, 4)
    assert_close(clipped, grads(model), 1e-4)


def test_one_example_never_moves_the_sum_by_more_than_the_bound():
    model = build()
    found = private_gradients(model, examples(1), expected=1)
    # a thousandth for rounding, here to the grid, is what the noise is scaled up by
    assert torch.cat([g.flatten() for g in found.values()]).double().norm() <= CLIP * MARGIN


def test_noise_has_the_stated_standard_deviation():
    model = build()
    sigma, expected = 3.0, 8
    scale = sigma * CLIP * MARGIN / expected
    normals = []
    with engine(model, sigma=sigma, expected=expected) as private:
        for step in range(30):
            private.step([], model.losses, step)
            normals += [p.grad.flatten().double() / scale for p in trainable(model).values()]
    normals = torch.cat(normals)
    assert len(normals) > 10_000
    chi_square = normals.square().sum()  # mean n, standard deviation sqrt(2 n)
    assert abs(chi_square - len(normals)) < 5 * (2 * len(normals)) ** 0.5
    assert abs(normals.sum()) < 5 * len(normals) ** 0.5


def test_noise_is_added_to_the_clipped_sum():
    model, batch = build(), examples(4)
    noisy = private_gradients(model, batch, sigma=1.0)
    noise = private_gradients(model, examples(0), size=1, sigma=1.0)
    quiet = private_gradients(model, batch)
    assert_close(noisy, {name: noise[name] + quiet[name] for name in noisy}, 1e-5)


def test_an_empty_batch_gives_noise_alone():
    model = build()
    with engine(model, sigma=2.0, expected=4) as private:
        private.step([], model.losses, 3)
    for name, p in trainable(model).items():
        wanted = stream().normal(name, 3, p.shape) * (2.0 * CLIP * MARGIN / 4)
        torch.testing.assert_close(p.grad, wanted.float(), rtol=1e-4, atol=1e-7)


def test_whatever_the_examples_what_is_released_lies_on_one_grid():
    model = build()
    grid = grid_of(CLIP, sum(p.numel() for p in trainable(model).values()))
    for size in (0, 3):
        with engine(model, sigma=1.0, expected=1) as private:
            private.step(parts(examples(size), 3), model.losses, 0)
        for p in trainable(model).values():
            assert torch.equal((p.grad.double() / grid).round() * grid, p.grad.double())


def test_a_step_repeated_gives_the_same_noise_and_the_next_step_another():
    model = build()
    first = private_gradients(model, examples(0), sigma=1.0, step=0)
    again = private_gradients(model, examples(0), sigma=1.0, step=0)
    later = private_gradients(model, examples(0), sigma=1.0, step=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], later[name]) for name in first)


@pytest.mark.parametrize("other", [stream("clinic-2"), stream(digest="another broadcast")])
def test_another_client_or_assignment_has_uncorrelated_noise(other):
    model = build()
    a = private_gradients(model, examples(0), sigma=1.0)
    b = private_gradients(model, examples(0), sigma=1.0, noise=other)
    flat_a, flat_b = (torch.cat([g.flatten() for g in x.values()]) for x in (a, b))
    cosine = functional.cosine_similarity(flat_a, flat_b, dim=0)
    assert abs(cosine) < 5 / len(flat_a) ** 0.5


def test_a_mask_counts_before_the_clip_and_gets_no_noise():
    model, batch = build(), examples(4)
    generator = torch.Generator().manual_seed(3)
    mask = {
        name: (torch.rand(p.shape, generator=generator) < 0.3).float()
        for name, p in trainable(model).items()
        if "lora_B" in name
    }
    assert_close(
        private_gradients(model, batch, mask=mask), reference_gradients(model, batch, mask)
    )
    noisy = private_gradients(model, batch, mask=mask, sigma=5.0)
    for name, kept in mask.items():
        assert torch.equal(noisy[name] == 0, kept == 0)


def test_reentrant_checkpointing_is_exact():
    model, batch = build(Causal, "lora_A"), examples(4)
    wanted = reference_gradients(model, batch)
    backbone = model.backbone.base_model.model
    backbone.activation_checkpointing_enable({"use_reentrant": True})
    backbone.enable_input_require_grads()
    assert_close(private_gradients(model, batch), wanted)


def test_taps_are_exact_under_the_other_checkpointing_and_hooks_refuse_it():
    model, batch = build(Causal, "lora_A"), examples(4)
    wanted = reference_gradients(model, batch)
    model.backbone.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    assert_close(private_gradients(model, batch), wanted, 1e-5)
    with pytest.raises(NoPerExampleGradient, match="reentrant"):
        private_gradients(model, batch, by="hooks")


@pytest.mark.parametrize("kind", [Classifier, Causal])
def test_a_base_model_in_bfloat16_has_the_gradients_of_single_examples(kind):
    model, batch = build(kind), examples(4)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    # what is rounded on the way depends on the batch; the summing of the examples does not
    assert_close(private_gradients(model, batch), reference_gradients(model, batch), 3e-2)


def test_mixed_precision_by_autocast_has_the_gradients_of_single_examples():
    model, batch = build(), examples(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = private_gradients(model, batch)
        assert_close(found, reference_gradients(model, batch), 3e-2)


def test_gradients_that_are_never_formed_have_the_norms_and_sums_of_those_that_are():
    generator = torch.Generator().manual_seed(5)
    a, g = (torch.randn(6, 3, width, generator=generator) for width in (40, 50))
    g[2] = -g[2, :1] * torch.tensor([1.0, 1.0, -2.0])[:, None]
    a[2] = a[2, :1]  # whose gradient is zero, though no part of it is
    ghost, formed = Factored(a, g), Dense(torch.einsum("nto,nti->noi", g, a))
    factors = torch.rand(6, generator=generator)
    torch.testing.assert_close(ghost.norms(), formed.norms(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(ghost.weighted(factors), formed.weighted(factors))
    a[3] = float("nan")
    factors[3] = 0
    assert ghost.weighted(factors).isfinite().all()


class Wide(nn.Module):
    """Trains a wide layer that sees two positions, and uses it twice: its norms are ghosts."""

    def __init__(self, uses=1):
        super().__init__()
        self.linear = nn.Linear(30, 30)
        self.uses = uses

    def losses(self, x):
        for _ in range(self.uses):
            x = self.linear(x).tanh()
        return x.square().flatten(1).sum(1)


@pytest.mark.parametrize("uses", [1, 2])
def test_a_wide_layer_that_sees_few_positions_is_exact_however_often_it_is_used(uses):
    torch.manual_seed(0)
    model, x = Wide(uses).train(), torch.randn(4, 2, 30)
    with measuring(model, trainable(model), "taps") as engine_:
        found = engine_.gradients(x, model.losses, check=True)
    assert isinstance(found["linear.weight"], Factored if uses == 1 else Dense)
    for index in range(4):
        plain_step(trainable(model), [x[index : index + 1]], model.losses, 1)
        for name, p in trainable(model).items():
            torch.testing.assert_close(found[name].dense()[index], p.grad, rtol=1e-5, atol=1e-5)


def attributes(model):
    holders = [*model.modules(), *model.parameters()]
    return [
        (
            vars(h).keys() - {"_is_full_backward_hook"},
            len(vars(h).get("_forward_hooks", ())),
            len(vars(h).get("_backward_hooks", None) or ()),
        )
        for h in holders
    ]


def test_the_model_is_as_before_afterwards_and_can_be_used_again():
    model, batch = build(), examples(4)
    before = attributes(model)
    first = private_gradients(model, batch)
    assert attributes(model) == before
    assert_close(private_gradients(model, batch), first, 0)
    assert attributes(model) == before


def test_the_model_is_as_before_after_an_error_in_the_middle_of_a_step():
    model, batch = build(), examples(4)
    before = attributes(model)

    def fails(batch):
        model.losses(batch)
        raise KeyError("a broken record")

    with pytest.raises(KeyError), engine(model) as private:
        private.step([batch], fails, 0)
    assert attributes(model) == before
    assert_close(private_gradients(model, batch), reference_gradients(model, batch))


def test_no_raw_gradient_is_left_when_a_step_fails():
    model, batch = build(), examples(4)
    with pytest.raises(NoPerExampleGradient), engine(model) as private:
        private.step([batch], lambda b: model.losses(b).mean(), 0)
    assert all(p.grad is None for p in model.parameters())


class Bare(nn.Module):
    """Trains a bare parameter, for which Opacus' hooks have no rule to follow."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ParameterDict({"weight": nn.Parameter(torch.ones(3))})

    def losses(self, x):
        return (x * self.inner["weight"]).sum(1)


def test_a_parameter_without_per_example_gradients_is_named():
    model = Bare().train()
    with (
        pytest.raises(NoPerExampleGradient, match=r"inner\.weight"),
        engine(model, by="hooks") as private,
    ):
        private.step([torch.ones(2, 3)], model.losses, 0)


class Twice(nn.Module):
    """Uses its weight past the module that the hooks sit on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)

    def losses(self, x):
        return (self.linear(x) + functional.linear(x, self.linear.weight) ** 2).sum(1)


@pytest.mark.parametrize("by", ["taps", "hooks", "vmap"])
def test_wrong_per_example_gradients_are_refused_in_the_first_step(by):
    model = Twice().train()
    with (
        pytest.raises(NoPerExampleGradient, match="do not add up"),
        engine(model, by=by) as private,
    ):
        private.step([torch.ones(2, 3)], model.losses, 0)


def test_a_model_that_mixes_examples_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)).train()
    with pytest.raises(NoPerExampleGradient, match="batch norm"):
        engine(model).__enter__()


def test_a_trainable_parameter_that_is_not_declared_is_refused():
    model = build()
    params = trainable(model)
    params.pop("head.bias")
    private = PrivateGradient(model, params, CLIP, 1.0, 4, stream())
    with pytest.raises(NoPerExampleGradient, match=r"head\.bias"):
        private.__enter__()


def test_hooks_refuse_a_model_in_eval_mode():
    model, batch = build().eval(), examples(2)
    with pytest.raises(NoPerExampleGradient, match="train mode"):
        private_gradients(model, batch, by="hooks")


def test_an_example_whose_gradient_overflows_counts_as_zero():
    model = nn.Linear(2, 1, bias=False).train()
    x = torch.tensor([[1.0, 0.0], [float("inf"), 1.0], [0.0, 1.0]])
    with engine(model, expected=1) as private:
        private.step([x], lambda b: model(b).sum(1), 0)
    assert torch.allclose(model.weight.grad, torch.tensor([[CLIP, CLIP]]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("bound", 0.0), ("noise_multiplier", -1.0), ("expected_batch_size", 0)],
)
def test_numbers_out_of_range_are_named(name, value):
    numbers = {"bound": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4}
    with pytest.raises(ValueError, match=name):
        PrivateGradient(nn.Linear(2, 2), {}, **{**numbers, name: value}, stream=stream())


def test_the_plain_gradient_is_that_of_the_mean_over_all_microbatches():
    model, batch = build(), examples(5)
    params = trainable(model)
    wanted = torch.autograd.grad(model.losses(batch).mean(), list(params.values()))
    plain_step(params, parts(batch, 2), model.losses, 5)
    assert_close(grads(model), dict(zip(params, wanted, strict=True)), 1e-5)


def test_the_plain_gradient_honours_mask_and_norm():
    model, batch = build(), examples(5)
    mask = {"head.weight": torch.zeros(3, 16)}
    plain_step(trainable(model), [batch], model.losses, 5, mask, max_grad_norm=0.01)
    found = grads(model)
    assert not found["head.weight"].any()
    norm = torch.cat([g.flatten() for g in found.values()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_a_plain_step_without_examples_has_zero_gradients():
    model = build()
    plain_step(trainable(model), [], model.losses, 1)
    assert not any(g.any() for g in grads(model).values())
