"""aLoRA: the adapter acts from an invocation in the prompt on, and leaves what precedes it alone.

Source: arXiv 2504.12397. What precedes the invocation is computed by the base model alone, so that
its key-value cache serves every adapter. In a sequence without the invocation the adapter does
nothing; of several, the last counts.

PEFT finds the invocation in ``PeftModel.forward``, which weft does not call: a hook on the base
model does it here, and tells every adapted layer from where on to act. PEFT's layer flattens a
batch to the tokens that are acted on; here the change is zero on all others instead, so that every
product is a linear layer's, of whole examples, and each example has a gradient of its own.

The invocation is part of the adapter, as ``NAME.invocation`` (token ids, int64) beside every
layer's factors: without it the same factors are another function. It never trains, and no merge,
stack or export can lose it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from clients import lora_layers
from clients.adapters.peft import TRAINED, Method, PeftLora, plugin
from clients.lora_layers import AdapterMismatch
from strategies.base import Tensors
from strategies.plugins import BadOptions, Plugin

ALORA = Method(
    "alora",
    "LoRA that acts from an invocation in the prompt on, and shares the base model's cache.",
    "2504.12397",
    {},
    frozenset({"causal-only", "dp-taps", "zero-b"}),
)
_INVOCATION = ".invocation"


class NotInvoked(ValueError):
    """A training batch has no sequence that the adapter acts on: the data lack its invocation."""


@dataclass(frozen=True, slots=True)
class ALoRA(PeftLora):
    """LoRA that is activated by an invocation.

    Attributes:
        invocation: what activates it: a text, tokenised by itself without special tokens, or token
            ids. ``auto`` is what the tokenizer's chat template puts before an answer.
    """

    invocation: str | list[int] = "auto"

    def __post_init__(self) -> None:
        PeftLora.__post_init__(self)
        if not self.invocation or any(isinstance(t, int) and t < 0 for t in self.invocation):
            raise BadOptions(
                f"invocation must be a text or token ids >= 0, at least one, got "
                f"{self.invocation!r}"
            )

    @property
    def frozen(self) -> str:
        """Names of the tensors that never train: every layer's invocation."""
        return rf".*\{_INVOCATION}"

    def settings(self, targets: Mapping[str, nn.Module]) -> Mapping[str, Any]:
        """Return PEFT's settings: which ids does not matter to its layers."""
        return {"alora_invocation_tokens": [0], "task_type": "CAUSAL_LM"}

    def attach(self, backbone: nn.Module, underlay: Tensors) -> nn.Module:
        """Put a trainable adapter into ``backbone`` (in place), asleep until its invocation.

        Raises:
            BadOptions: if a target does not exist, a rank exceeds its layer, or the invocation
                is not known to the tokenizer.
            UnsupportedUnderlay: if there is an underlay.
        """
        hook = _Activation(_token_ids(self.invocation, backbone))
        model = PeftLora.attach(self, backbone, underlay)
        hook.handle = model.register_forward_pre_hook(hook, with_kwargs=True)
        for layer in lora_layers.adapted(model, TRAINED).values():
            layer.register_forward_pre_hook(hook.tell, with_kwargs=True)
            layer.lora_variant[TRAINED] = _activated()
        return model

    def refuse_batch(self, model: nn.Module, input_ids: Tensor) -> None:
        """Refuse a batch that the adapter acts on nowhere.

        Raises:
            NotInvoked: if no sequence has the invocation.
        """
        (hook,) = _activations(model)
        if not counts(input_ids, hook.invocation).any():
            raise NotInvoked(
                f"none of a batch's {len(input_ids)} sequences has the invocation "
                f"{hook.invocation} (token ids), so nothing would be learned from it; put it into "
                "every prompt"
            )

    def detach(self, model: nn.Module) -> nn.Module:
        """Take the adapter and its hook out of ``model`` (in place) and return it as it was."""
        for hook in _activations(model):
            if hook.handle is not None:
                hook.handle.remove()
        return PeftLora.detach(self, model)

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a copy of the tensors, ``NAME.invocation`` ``[tokens]`` int64 among them."""
        (hook,) = _activations(model)
        layers = lora_layers.adapted(model, TRAINED)
        ids = {name + _INVOCATION: torch.tensor(hook.invocation) for name in layers}
        return {**PeftLora.read(self, model), **ids}

    def write(self, model: nn.Module, tensors: Tensors) -> None:
        """Put ``tensors`` into the adapter, their invocation too.

        Raises:
            AdapterMismatch: if a tensor is missing, unexpected, or does not fit its layer, or two
                layers have different invocations; nothing is written then.
        """
        given = {n: t for n, t in tensors.items() if n.endswith(_INVOCATION)}
        wanted = {n + _INVOCATION for n in lora_layers.adapted(model, TRAINED)}
        for name in sorted(wanted ^ set(given)):
            raise AdapterMismatch(
                f"the adapter has {'no' if name in wanted else 'the'} tensor {name}; it was "
                "trained by another method, or on other target_modules"
            )
        found = {tuple(ids.tolist()) for ids in given.values()}
        if len(found) > 1:
            raise AdapterMismatch(
                f"the layers have different invocations ({sorted(found)}); one adapter has one"
            )
        PeftLora.write(self, model, {n: t for n, t in tensors.items() if n not in given})
        for hook in _activations(model):
            hook.invocation = list(next(iter(found)))


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Activation:
    """Finds the invocation in the base model's input, and tells the adapted layers.

    What was found stays until the next input: gradient checkpointing runs layers once more in the
    backward pass. An input that goes on from the model's cache, as in generation, is looked at
    together with what it continues.

    Attributes:
        invocation: token ids.
        seen: ``[batch, length]`` token ids of the last input, with all that it continued.
        acting: ``[batch, length, 1]`` of the last input, whether a token is acted on.
        handle: removes the hook from the base model.
    """

    invocation: list[int]
    seen: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    acting: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 1, dtype=torch.bool))
    handle: torch.utils.hooks.RemovableHandle | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cache = kwargs.get("past_key_values")
        goes_on = cache is not None and cache.get_seq_length() > 0
        self.seen = torch.cat([self.seen, ids], dim=1) if goes_on else ids
        length = self.seen.shape[1]
        first = length - counts(self.seen, self.invocation)
        acting = torch.arange(length, device=ids.device) >= first[:, None]
        self.acting = acting[:, length - ids.shape[1] :, None]

    def tell(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a layer's arguments with which tokens to act on, by the name that PEFT passes."""
        return args, {**kwargs, "alora_offsets": self.acting}


@cache
def _activated() -> Any:
    """Return what PEFT's layer asks of a variant: its own for aLoRA, with another forward pass."""
    from peft.tuners.lora.variants import ALoraLinearVariant

    class Activated(ALoraLinearVariant):  # type: ignore[misc]
        @staticmethod
        def forward(
            module: Any, active_adapter: str, x: Tensor, result: Tensor, *, alora_offsets: Tensor
        ) -> Tensor:
            down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
            inputs = module.lora_dropout[active_adapter](x.to(down.weight.dtype))
            delta = (up(down(inputs)) * module.scaling[active_adapter]).to(result.dtype)
            return result + torch.where(alora_offsets, delta, delta.new_zeros(()))

    return Activated()


def counts(ids: Tensor, invocation: list[int]) -> Tensor:
    """Return how many tokens of each sequence there are from its last invocation on.

    Args:
        ids: ``[batch, length]`` token ids, padded on either side.
        invocation: token ids, at least one.

    Returns:
        ``[batch]`` int64, at least ``len(invocation)`` each, or 0 where there is no invocation.
    """
    length = ids.shape[1]
    if length < len(invocation):
        return torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    wanted = torch.tensor(invocation, device=ids.device)
    found = (ids.unfold(1, len(invocation), 1) == wanted).all(-1)
    starts = torch.arange(found.shape[1], device=ids.device)
    last = torch.where(found, starts, -1).amax(1)
    return torch.where(last >= 0, length - last, 0)


def _activations(model: nn.Module) -> list[_Activation]:
    return [h for h in model._forward_pre_hooks.values() if isinstance(h, _Activation)]


def _token_ids(invocation: str | list[int], backbone: Any) -> list[int]:
    if not isinstance(invocation, str):
        return list(invocation)
    return list(_tokenised(invocation, backbone.config.name_or_path))


@lru_cache(maxsize=16)
def _tokenised(text: str, folder: str) -> tuple[int, ...]:
    """Return a text's tokens by the tokenizer of a base model's folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if text == "auto":
        text = _generation_prompt(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise BadOptions(f"invocation {text!r} has no token in the base model's tokenizer")
    return tuple(ids)


def _generation_prompt(tokenizer: Any) -> str:
    """Return what the chat template puts before an answer."""
    prompt = ""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "x"}]
        bare, opened = (
            str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=wanted))
            for wanted in (False, True)
        )
        prompt = opened.removeprefix(bare) if opened.startswith(bare) else ""
    if not prompt:
        raise BadOptions(
            "invocation 'auto' is what the tokenizer's chat template puts before an answer, and "
            "this tokenizer's puts nothing there; set invocation to a text that every prompt has"
        )
    return prompt


def plugins() -> Iterator[Plugin]:
    """Yield aLoRA."""
    yield plugin(ALORA, ALoRA)
