"""Attention in float32 for a base model in half precision on a CPU, where a gradient goes through.

There the backward pass of torch's fused kernel takes up to ten times as long in bfloat16 as in
float32, which costs a base model in ``bf16`` all that its other layers save. The casts are a
hundredth of it, and what is attended to is the exacter for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "weft_sdpa"


def attend_in_float32(model: Any) -> None:
    """Have a model attend in float32 while it trains, if it attends by torch's fused kernel.

    Args:
        model: a transformers model in bfloat16 or float16, on a CPU.
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_NAME)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Do as transformers' ``sdpa``: ``[batch, heads, length, width]`` in, heads third out."""
    heads, mask, kind = (query, key, value), attention_mask, query.dtype
    if torch.is_grad_enabled() and query.requires_grad:
        heads = (query.float(), key.float(), value.float())
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
    attended, _ = sdpa_attention_forward(module, *heads, mask, **options)
    return attended.to(kind), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
