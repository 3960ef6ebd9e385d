"""BD-LoRA: one factor of every layer is block-diagonal, so that it serves sharded without talking.

Source: arXiv 2510.23346. Under tensor parallelism a layer that is cut along its outputs (query,
key, value, up, gate) has a block-diagonal B, and one that is cut along its inputs (attention
output, down) a block-diagonal A: a device then holds whole blocks and adds what it computes itself.

A block-diagonal factor holds its blocks only, stacked, as in PEFT's files:
``NAME.lora_A.blocks`` ``[rank, in_features / nblocks]`` or ``NAME.lora_B.blocks``
``[out_features, rank / nblocks]``. It has a name of its own because no algebra of plain factors
holds for it: merges and strategies that multiply or re-split ``B A`` refuse it for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import nn

from clients import placement
from clients.adapters.peft import Method, PeftLora, plugin
from strategies.plugins import BadOptions, Plugin, Range

BDLORA = Method(
    "bdlora",
    "LoRA with one block-diagonal factor a layer, to be served on many devices.",
    "2510.23346",
    {},
    frozenset({"merge", "dp-hooks", "zero-b", "unquantised-base"}),
)
_CUT_ALONG_INPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "wo", r"output\.dense")


@dataclass(frozen=True, slots=True)
class BDLoRA(PeftLora):
    """LoRA with block-diagonal factors.

    Attributes:
        nblocks: blocks of every block-diagonal factor, at least 2: the number of devices that will
            serve the adapter. It divides the rank, and the side of the layer that is cut.
        block_a: modules, named as in ``target_modules``, whose A is block-diagonal; the others' B
            is. ``auto`` means the attention output and down projections of common architectures.
    """

    nblocks: Annotated[int, Range(2)] = 2
    block_a: Literal["auto"] | list[str] = "auto"

    def settings(self, targets: Mapping[str, nn.Module]) -> Mapping[str, Any]:
        """Return PEFT's settings: every layer by its full name.

        Raises:
            BadOptions: if the blocks do not divide a layer or its rank, or ``block_a`` names a
                layer that is not adapted.
        """
        from peft import BdLoraConfig

        side_a = self._with_block_a(targets)
        ranks = placement.by_pattern("rank_pattern", self.rank_pattern, targets, self.r)
        for name, layer in targets.items():
            out_features, in_features = placement.shape(layer)
            cut, side = (in_features, "inputs") if name in side_a else (out_features, "outputs")
            for count, what in ((ranks[name], "rank"), (cut, side)):
                if count % self.nblocks:
                    raise BadOptions(
                        f"nblocks must divide the {what} of {name} ({count}), got {self.nblocks}"
                    )
        config = BdLoraConfig(
            target_modules_bd_a=[name for name in targets if name in side_a],
            target_modules_bd_b=[name for name in targets if name not in side_a],
            nblocks=self.nblocks,
        )
        return {"use_bdlora": config}

    def _with_block_a(self, targets: Mapping[str, nn.Module]) -> set[str]:
        """Return the layers whose A is block-diagonal."""
        if self.block_a == "auto":
            common = "|".join(_CUT_ALONG_INPUTS)
            return {name for name in targets if placement.matches(common, name)}
        chosen = dict.fromkeys(self.block_a, True)
        sides = placement.by_pattern("block_a", chosen, targets, False)
        return {name for name, is_a in sides.items() if is_a}


def plugins() -> Iterator[Plugin]:
    """Yield BD-LoRA."""
    yield plugin(BDLORA, BDLoRA)
