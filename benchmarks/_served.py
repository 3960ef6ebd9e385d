"""What the benchmark of serving serves: a small Llama, its adapters, and a store of versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec, PluginChoice
from orchestrator.bases import remember_base
from orchestrator.recipes import import_recipe
from orchestrator.workspace import Workspace

TARGETS = ["q_proj", "v_proj"]
RANK = 8


def make_base(folder: Path, hidden: int, layers: int) -> ModelSpec:
    """Write a Llama with random weights and a byte-level tokenizer, and return it."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    signs = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(kinds.BPE({sign: i for i, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=1024,
        eos_token_id=None,  # every answer is as long as it may be
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    spec = ModelSpec(str(folder), "causal-lm")
    return ModelSpec(str(folder), "causal-lm", hash=models.base_hash(spec))


def adapter(spec: ModelSpec, seed: int) -> tuple[PluginChoice, dict[str, Tensor]]:
    """Return a LoRA with random factors."""
    choice = PluginChoice("lora", {"r": RANK, "target_modules": TARGETS})
    shapes = models.shapes(spec, ADAPTERS.get("lora").build(**choice.options))
    generator = torch.Generator().manual_seed(seed)
    return choice, {
        name: 0.1 * torch.randn(shape, generator=generator) if shape else torch.tensor(2.0)
        for name, shape in shapes.items()
    }


def publish(workspace: Workspace, spec: ModelSpec, name: str, seed: int) -> str:
    """Commit an adapter as a version of ``name``."""
    choice, tensors = adapter(spec, seed)
    remember_base(workspace, spec)
    recipe = import_recipe(spec, choice, (), {"seed": seed}, None)
    version = workspace.store.commit(tensors, parents={}, recipe=recipe)
    workspace.store.name(name, version)
    return version


def with_peft(backbone: Any, spec: ModelSpec, count: int) -> Any:
    """Return the model with ``count`` adapters ``a0``, ``a1``, … as PEFT holds them."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    model = get_peft_model(backbone, config, adapter_name="a0")
    for number in range(count):
        if number:
            model.add_adapter(f"a{number}", config)
        tensors = adapter(spec, number)[1]
        state = {
            f"base_model.model.{name}": tensor
            for name, tensor in tensors.items()
            if not name.endswith(".scaling")
        }
        set_peft_model_state_dict(model, state, adapter_name=f"a{number}")
    return model.eval()
