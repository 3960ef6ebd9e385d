"""CURLoRA: which columns and rows are drawn, and that the change lies between them."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2Model

from clients import models
from clients.adapters import ADAPTERS
from clients.adapters.curlora import probabilities
from clients.assignment import ModelSpec, PluginChoice
from clients.initialisations import InitInputs
from clients.lora_layers import AdapterMismatch
from clients.session import opened, returned_names
from clients.trainer import train
from strategies.plugins import BadOptions

QUERY = "encoder.layer.0.attention.self.query"
CORE, COLUMNS, ROWS = f"{QUERY}.lora_core.weight", f"{QUERY}.columns", f"{QUERY}.rows"
CHOICE = PluginChoice("curlora", {"r": 3, "layers": [0], "target_modules": ["query"]})


@pytest.fixture
def task(assign):
    return assign(adapter=CHOICE)


@pytest.fixture
def backbone(tiny_encoder):
    spec = ModelSpec(str(tiny_encoder), "classification", labels=("x", "y"))
    return models.load(spec).backbone


def change_of(layer) -> torch.Tensor:
    """What an adapted layer of 32 inputs adds to its base weight: its images of unit vectors."""
    with torch.no_grad():
        return (layer(torch.eye(32)) - layer.get_base_layer()(torch.eye(32))).T


def curlora(**options):
    return ADAPTERS.get("curlora").build(**{**CHOICE.options, **options})


def test_a_version_is_its_cores_and_the_indices_of_columns_and_rows(task):
    tensors = task.broadcast.tensors
    own = {name: t for name, t in tensors.items() if not name.startswith("head.")}
    assert own.keys() == {CORE, COLUMNS, ROWS, f"{QUERY}.scaling"}
    assert not own[CORE].any()
    for name in (COLUMNS, ROWS):
        assert own[name].dtype == torch.int64
        assert own[name].tolist() == sorted(set(own[name].tolist()))  # none twice
    assert own[f"{QUERY}.scaling"] == 1.0


def test_the_change_lies_between_the_columns_and_rows_of_the_base_weight(task):
    tensors = dict(task.broadcast.tensors)
    tensors[CORE] = torch.tensor([[0.3, -1.0, 0.0], [0.0, 0.2, 0.5], [1.0, 0.0, 0.1]])
    tensors[f"{QUERY}.scaling"] = torch.tensor(2.0)
    with opened(task) as session:
        session.adapter.write(session.model.backbone, tensors)
        layer = session.model.backbone.get_submodule(QUERY)
        weight = layer.get_base_layer().weight.detach().clone()
        change = change_of(layer)
    c, r = weight[:, tensors[COLUMNS]], weight[tensors[ROWS]]
    torch.testing.assert_close(change, 2.0 * c @ tensors[CORE] @ r, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(change, atol=1e-4) == 3
    norms = [torch.linalg.matrix_norm(m) for m in (c, tensors[CORE], r)]
    assert change.norm() <= 2.0 * torch.stack(norms).prod()


def test_a_client_trains_and_returns_the_core_and_the_head_alone(task):
    update = train(task)
    assert sorted(update.tensors) == [CORE, "head.bias", "head.weight"] == returned_names(task)
    assert update.tensors[CORE].abs().max() > 0


def test_the_mean_of_two_cores_is_the_mean_of_their_changes(backbone):
    adapter = curlora()
    torch.manual_seed(3)
    model = adapter.attach(backbone, {})
    tensors = adapter.read(model)
    cores = [torch.randn(3, 3), torch.randn(3, 3)]
    changes = []
    for core in (*cores, (cores[0] + cores[1]) / 2):
        adapter.write(model, {**tensors, CORE: core})
        changes.append(change_of(model.get_submodule(QUERY)))
    adapter.detach(model)
    mean = (changes[0] + changes[1]) / 2
    torch.testing.assert_close(changes[2], mean, rtol=1e-4, atol=1e-5)


def test_columns_are_drawn_by_the_inverse_of_their_share_of_the_squared_norm():
    """Chi-square of first draws against q_j = (1 / p_j) / sum (1 / p_i)."""
    weight = torch.tensor([[1.0, 2.0, 0.0, 4.0], [1.0, 0.0, 0.0, 3.0]])
    wanted = torch.tensor([1 / 2, 1 / 4, 0.0, 1 / 25], dtype=torch.float64)
    chances = probabilities(weight, 1)
    torch.testing.assert_close(chances, wanted / wanted.sum())
    torch.manual_seed(0)
    draws = 4000
    seen = torch.multinomial(chances, draws, replacement=True).bincount(minlength=4)
    possible = chances > 0
    expected = chances[possible] * draws
    assert seen[2] == 0
    assert ((seen[possible] - expected).square() / expected).sum() < 13.8  # p = 0.001, 2 degrees


def test_eps_makes_the_draw_nearly_uniform_and_lets_zero_columns_in():
    weight = torch.eye(4)[:, :3] * torch.tensor([1.0, 1e-3, 0.0])
    exact, loose = probabilities(weight, 1), probabilities(weight, 1, eps=100.0)
    assert exact[1] > 0.999999
    assert exact[2] == 0
    torch.testing.assert_close(loose, torch.full((3,), 1 / 3).double(), atol=0.01, rtol=0)


def test_small_columns_of_the_base_weight_are_the_ones_that_are_drawn(backbone):
    layer = backbone.get_submodule(QUERY)
    kept = layer.weight.detach().clone()
    adapter = curlora()
    try:
        with torch.no_grad():
            layer.weight[:, [4, 9, 20]] *= 1e-5
            layer.weight[:, 7] = 0.0
        model = adapter.attach(backbone, {})
        adapter.initialise(model, InitInputs(model, list, list, list))
        tensors = adapter.read(model)
        adapter.detach(model)
    finally:
        layer.weight.data.copy_(kept)
    assert tensors[COLUMNS].tolist() == [4, 9, 20]


def test_a_layer_without_enough_columns_that_are_not_zero_is_refused(backbone):
    layer = backbone.get_submodule(QUERY)
    kept = layer.weight.detach().clone()
    adapter = curlora()
    model = adapter.attach(backbone, {})
    try:
        layer.weight.data[:, 2:] = 0.0
        with pytest.raises(BadOptions, match=rf"draws 3 columns of {QUERY}, which has 2 that are"):
            adapter.initialise(model, InitInputs(model, list, list, list))
    finally:
        layer.weight.data.copy_(kept)
        adapter.detach(model)


def test_square_transposed_weights_give_their_own_columns_and_rows():
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    backbone = GPT2Model(config).eval().requires_grad_(False)
    name = "h.0.attn.c_proj"  # [8, 8], kept transposed
    weight = backbone.get_submodule(name).weight.detach().clone().T  # [out, in]
    adapter = ADAPTERS.get("curlora").build(r=2, target_modules=["attn.c_proj"])
    model = adapter.attach(backbone, {})
    core = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    tensors = {**adapter.read(model), f"{name}.lora_core.weight": core}
    adapter.write(model, tensors)
    layer = model.get_submodule(name)
    x = torch.randn(3, 8)
    changed = layer(x) - layer.get_base_layer()(x)
    adapter.detach(model)
    expected = weight[:, tensors[f"{name}.columns"]] @ core @ weight[tensors[f"{name}.rows"]]
    torch.testing.assert_close(changed, x @ expected.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({COLUMNS: None}, "has no tensor .*columns; it was trained by another method"),
        (
            {ROWS: torch.tensor([0, 1, 32])},
            "rows must be indices from 0 to 31, got 0 to 32; .*base",
        ),
        ({ROWS: torch.tensor([0, 1])}, "has 3 columns and 2 rows; they must be as many"),
        ({ROWS: torch.zeros(3)}, r"rows must be int64 \[rank\], got torch.float32 \[3\]"),
    ],
)
def test_indices_that_do_not_fit_are_refused_and_nothing_is_written(backbone, changes, message):
    adapter = curlora()
    model = adapter.attach(backbone, {})
    before = adapter.read(model)
    core = {CORE: torch.ones(3, 3)}
    given = {n: t for n, t in {**before, **core, **changes}.items() if t is not None}
    try:
        with pytest.raises(AdapterMismatch, match=message):
            adapter.write(model, given)
        after = adapter.read(model)
    finally:
        adapter.detach(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_adapter_of_another_rank_is_written_with_its_indices(backbone):
    big, small = curlora(r=5), curlora(r=2)
    torch.manual_seed(2)
    tensors = big.read(big.attach(backbone, {}))
    big.detach(backbone)
    model = small.attach(backbone, {})
    small.write(model, tensors)
    again = small.read(model)
    small.detach(model)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
