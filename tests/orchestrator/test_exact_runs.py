"""Whole runs against dense arithmetic: every version is the weighted mean of what clients made.

Over options of LoRA that change what a factor means, under DP, and with ranks of the clients' own.
"""

import pytest
import torch
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

from clients.adapters import ADAPTERS
from clients.site import Site
from clients.wire import unpack
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from storage.ledger import ClientRecord
from strategies.base import beneath

PATTERNS = {
    "name": "rslora",
    "r": 2,
    "alpha": 6,
    "layers": [0],
    "target_modules": ["query", "value"],
    "rank_pattern": {"query": 3},
    "alpha_pattern": {"value": 5.0},
}
CONV1D = {
    "name": "rslora",
    "r": 2,
    "target_modules": ["c_attn", "attn.c_proj"],  # [8, 24] and, square, [8, 8]
    "rank_pattern": {"c_attn": 3},
    "alpha_pattern": {"attn.c_proj": 5.0},
}
DORA = {"name": "dora", "r": 32, "layers": [0], "target_modules": ["query"]}
WHOLE = {
    "name": "lora",
    "r": 2,
    "layers": [0],
    "target_modules": ["query", "value"],
    "bias": "lora_only",
    "modules_to_save": ["LayerNorm"],
}
DP = {"noise_multiplier": 0.5, "max_grad_norm": 1.0, "insecure_seed": 3}
LOWER = [{"names": ["b"], "r": 1}]
RUNS = {
    "rolora, patterns": {"strategy": "rolora", "adapter": PATTERNS},
    "flora, patterns": {"strategy": "flora", "adapter": PATTERNS},
    "fedex-lora, patterns": {"strategy": "fedex-lora", "adapter": PATTERNS},
    "lora-a2, patterns": {"strategy": {"name": "lora-a2", "budget": 1}, "adapter": PATTERNS},
    "ffa-lora, biases and norms": {"strategy": "ffa-lora", "adapter": WHOLE},
    "flexlora, DoRA": {"strategy": "flexlora", "adapter": DORA},
    "flora, DP and ranks": {
        "strategy": "flora",
        "adapter": PATTERNS,
        "privacy": DP,
        "ranks": LOWER,
    },
    "flexlora, DP and ranks": {
        "strategy": "flexlora",
        "adapter": {**PATTERNS, "r": 32, "rank_pattern": {}},
        "privacy": DP,
        "ranks": LOWER,
    },
    "fedex-lora, DP": {"strategy": "fedex-lora", "adapter": PATTERNS, "privacy": DP},
}


@pytest.fixture
def home(workspace, notes):
    """Return a workspace with two clients who do not count alike."""
    for name, size in (("a", 12), ("b", 4)):
        record = ClientRecord(name, notes(name, size=size), name, num_examples=size)
        workspace.ledger.add_client(record)
    return workspace


def plain(tensors):
    """Without DoRA's magnitudes."""
    return {n: t for n, t in tensors.items() if ".lora_" not in n or "magnitude" not in n}


def meant(store, version, products):
    """What a version's updates make of its base, dense: products, and all other tensors' means."""
    leaves = version.recipe["updates"]
    base = store.tensors(leaves[0]["base"])
    lying = products(beneath(store.auxiliary(leaves[0]["base"])))
    total = sum(leaf["num_examples"] for leaf in leaves)
    changed, others = dict(lying), {}
    for leaf in leaves:
        share = leaf["num_examples"] / total
        update = unpack(store.updates.read(leaf["digest"])).tensors
        for name, product in products(plain({**base, **whole(update, base)})).items():
            changed[name] = changed.get(name, 0) + share * product
        for name, tensor in update.items():
            if ".lora_A." not in name and ".lora_B." not in name:
                others[name] = others.get(name, 0) + share * tensor.double()
    return changed, others


def whole(update, base):
    """What a client did not choose of its ranks is as it was sent."""
    found = {n: t for n, t in update.items() if not n.endswith(":ranks")}
    for name, places in update.items():
        if name.endswith(":ranks"):
            factor = name.removesuffix(":ranks")
            found[factor] = base[factor].index_copy(
                int(".lora_B." in factor), places.long(), found[factor]
            )
    return {n: found[n] for n in found if ".lora_" in n}


def rounds_of(store, version):
    """Yield the versions of a run's rounds."""
    found = store.version(version)
    while found.recipe["kind"] == "round":
        yield found
        found = store.version(found.parents[0].id)


def check(home, version, products):
    """Hold every round of a run against :func:`meant`."""
    store, num = home.store, 0
    for found in rounds_of(store, version):
        changed, others = meant(store, found, products)
        now = store.tensors(found.id)
        made = products(plain(now), beneath(store.auxiliary(found.id)))
        torch.testing.assert_close(made, changed, rtol=1e-4, atol=1e-5)
        assert any(product.abs().max() > 1e-3 for product in made.values())
        for name, tensor in others.items():
            if not name.endswith(":ranks"):
                torch.testing.assert_close(now[name].double(), tensor, rtol=1e-5, atol=1e-6)
        num += 1
    assert num == 2


@pytest.mark.parametrize("name", RUNS)
def test_every_version_is_the_weighted_mean_of_what_the_clients_made(home, tiny, name, products):
    config = tiny(rounds=2, retention="all", **RUNS[name])
    version = service.launch(home, config, backend=InlineBackend())
    check(home, version, products)


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_encoder, tmp_path_factory):
    """Folder of a GPT-2 whose linear layers are Conv1D: weights ``[in, out]``."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_encoder)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=8,
        n_layer=1,
        n_head=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20260101)
        GPT2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strategy", ["ffa-lora", "fedex-lora"])
def test_on_transposed_layers_a_version_is_the_base_with_the_mean_in_its_weights(
    home, tiny, tiny_gpt2, strategy, products
):
    model = {"id": str(tiny_gpt2), "max_length": 16}
    config = tiny(strategy=strategy, model=model, adapter=CONV1D, rounds=2, retention="all")
    version = service.launch(home, config, backend=InlineBackend())
    check(home, version, products)

    ids = torch.tensor([[3, 1, 4, 1, 5]])
    dense, adapted = (GPT2Model.from_pretrained(tiny_gpt2).eval() for _ in range(2))
    changed, _ = meant(home.store, home.store.version(version), products)
    tensors = {n: t for n, t in home.store.tensors(version).items() if "head." not in n}
    options = {n: v for n, v in CONV1D.items() if n != "name"}
    adapter = ADAPTERS.get(CONV1D["name"]).build(**options)
    with torch.no_grad():
        before = dense(input_ids=ids).last_hidden_state
        for name, product in changed.items():
            dense.get_submodule(name).weight += product.T.float()
        expected = dense(input_ids=ids).last_hidden_state
        attached = adapter.attach(adapted, beneath(home.store.auxiliary(version)))
        adapter.write(attached, tensors)
        found = attached.eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)


@pytest.mark.parametrize("head", ["train", "freeze", "personal"])
@pytest.mark.parametrize("strategy", ["flora", "lora-a2"])
def test_a_head_is_averaged_frozen_or_kept_by_each_client(home, tiny, strategy, head, products):
    config = tiny(strategy=strategy, head=head, rounds=2, retention="all")
    version = service.launch(home, config, backend=InlineBackend())
    check(home, version, products)  # where it is trained, the mean
    [run] = home.ledger.runs()
    sites = Site(home.home / "sites")
    names = {"head.weight", "head.bias"}
    for found in rounds_of(home.store, version):
        before, now = home.store.tensors(found.parents[0].id), home.store.tensors(found.id)
        assert all(torch.equal(before[n], now[n]) is (head != "train") for n in names)
        for leaf in found.recipe["updates"]:
            sent = unpack(home.store.updates.read(leaf["digest"])).tensors
            assert (names <= sent.keys()) is (head == "train")
    own = [sites.state(run.id, client, 2) for client in "ab"]
    assert [names <= state.keys() for state in own] == [head == "personal"] * 2
    if head == "personal":
        assert not torch.equal(own[0]["head.weight"], own[1]["head.weight"])
