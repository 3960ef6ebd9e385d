"""VeLoRA: the input of A is kept for the backward pass as one number for every group of features.

Source: arXiv 2405.17991. The forward pass is LoRA's. Of an input ``x``, cut into ``num_groups``
groups ``x_g`` of features, only ``<x_g, v>`` is kept, with one unit vector ``v`` a layer, and the
gradient of A is computed from ``scale * <x_g, v> v`` in place of ``x_g``.

The paper takes ``v`` from the first batch, and PEFT by default from every batch. Here it is random,
drawn at each attachment from the assignment's seed: it then says nothing about the data, a round is
the same bytes wherever it runs, and every client and round has another projection, so that no
direction is lost for good. With groups of ``m`` features the expected gradient of A is the true one
times ``scale / m``; ``num_groups`` at the number of features or above makes it exact.

Opacus' hooks do not see A's gradient, so this does not go with DP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn

from clients.adapters.peft import Method, PeftLora, plugin
from strategies.plugins import Plugin, Range

VELORA = Method(
    "velora",
    "LoRA that keeps one number a group of input features for the gradient of A.",
    "2405.17991",
    {},
    frozenset({"low-rank", "merge", "dp-alone", "zero-b", "trains-a", "unquantised-base"}),
)


@dataclass(frozen=True, slots=True)
class VeLoRA(PeftLora):
    """LoRA with compressed activations.

    Attributes:
        num_groups: groups of input features; fewer keep less and approximate more.
        scale: of the reconstructed activations; set to the number of features in a group, it makes
            A's expected gradient the true one.
    """

    num_groups: Annotated[int, Range(1)] = 64
    scale: Annotated[float, Range(0, open_low=True)] = 1.0

    def settings(self, targets: Mapping[str, nn.Module]) -> Mapping[str, Any]:
        """Return PEFT's settings: compression with a random projection."""
        from peft import VeloraConfig

        # A skeleton on the meta device has no numbers to normalise: PEFT's default draws none.
        meta = any(module.weight.is_meta for module in targets.values())
        kind = "batch_average" if meta else "random"
        config = VeloraConfig(num_groups=self.num_groups, scale=self.scale, init_type=kind)
        return {"velora_config": config}


def plugins() -> Iterator[Plugin]:
    """Yield VeLoRA."""
    yield plugin(VELORA, VeLoRA)
