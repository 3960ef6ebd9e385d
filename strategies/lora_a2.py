"""LoRA-A2: B and A are trained in turns, and each client trains and sends its own best ranks.

Source: arXiv 2410.22815 (sections 4.1 and 4.2). Differences from the paper:

* B is trained first. The paper's text and its algorithm disagree on the order; while B is zero, no
  rank of A has an effect by which it could be chosen.
* A rank's effect is taken times its layer's scaling, where layers have different ones.
* The paper trains A and B at other learning rates (5 to 1 for B); here an optimizer has one for
  both. It freezes the head: ``head: freeze``.

What to expect: ranks that nobody chooses stay as they are, so that a large adapter costs little to
send. A client that leaves a rank out counts there as if it had not moved it: nothing is divided by
the number of those who chose it. Which ranks a client chooses tells something of its data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Tensors, Update
from strategies.plugins import Range
from strategies.rolora import RoLoRA
from strategies.selection import Budget, asking
from strategies.tensors import Weighting, lora_layers


@dataclass(frozen=True, slots=True)
class LoRAA2:
    """RoLoRA in which clients train and send only so many ranks, each those that it moves most.

    After a share of its steps, in which it trains every rank, a client keeps the ``budget`` times
    the number of layers that changed its model most, wherever they are, and goes on with these
    alone. With a budget of all ranks it is RoLoRA.

    Attributes:
        budget: how many ranks a client trains, on average over the layers, >= 1.
        label: an operator's label with a client's own budget, a whole number >= 1; who has no such
            label has ``budget``. Empty for none.
        probe: the share of a round's steps before a client chooses, in (0, 1]; with 1 it trains
            all ranks to the end, and sends some.
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1,
            ``label:NAME`` by the number in its label.
    """

    budget: Annotated[int, Range(1)] = 2
    label: str = ""
    probe: Annotated[float, Range(0, 1, open_low=True)] = 0.2
    weighting: Weighting = "examples"

    capabilities: ClassVar[frozenset[str]] = (RoLoRA.capabilities - {"mean-only", "private"}) | {
        "selects"
    }
    mean_options: ClassVar[Mapping[str, Any]] = {}

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return the state before round 1; nothing of ``setting`` is used.

        Raises:
            NotLowRank: if the adapter has no low-rank layers.
        """
        return RoLoRA().init(adapter, setting)

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, of which one factor and the head are to be trained, and a budget.

        Raises:
            ValueError: if the client's label is no budget.
        """
        sent = RoLoRA().broadcast(state, client)
        ranks = self._budget(client) * len(lora_layers(state.adapter))
        return replace(sent, extra=asking(Budget(ranks, self.probe)))

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with the round's factor and head averaged; the next trains the other.

        Args:
            state: before the round.
            updates: whole: what a client did not choose is as it was sent.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        return RoLoRA(self.weighting).aggregate(state, updates)

    def _budget(self, client: ClientSpec) -> int:
        text = client.labels.get(self.label) if self.label else None
        if text is None:
            return self.budget
        if not (text.isascii() and text.isdigit() and int(text) >= 1):
            raise ValueError(
                f"label: {client.name} has {self.label}={text}, and a budget is a whole number "
                f">= 1; register it with --label {self.label}=NUMBER"
            )
        return int(text)
