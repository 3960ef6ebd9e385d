"""The vocabulary of federated learning that every other module speaks, and the Strategy protocol.

A strategy is three pure functions over named tensors. It holds no state of its own: what it must
remember between rounds is in :class:`ServerState`, which is committed whole with every round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from torch import Tensor

from strategies.spends import PrivacySpend

Tensors: TypeAlias = Mapping[str, Tensor]
"""An adapter's tensors by state-dict name.

For a low-rank layer ``NAME`` these are ``NAME.lora_A.weight`` ``[rank, in_features]``,
``NAME.lora_B.weight`` ``[out_features, rank]`` and ``NAME.scaling`` (0-d); a task head is
``head.weight`` ``[labels, features]`` and ``head.bias`` ``[labels]``.
"""


@dataclass(frozen=True, slots=True)
class ClientSpec:
    """What a strategy may know of a client: nothing about its data.

    Attributes:
        name: unique within the federation.
        rank: the rank the client can train, or None for the run's rank.
        labels: the operator's labels, such as ``{"gpu": "a100"}``.
    """

    name: str
    rank: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What a client of a round receives.

    Attributes:
        tensors: the adapter (and head), complete.
        trainable: regular expression, matched with ``re.fullmatch`` against tensor names: which
            of them this round trains and returns. ``NAME.scaling`` is never trained.
        personal: regular expression, likewise: which of the trained tensors stay at the client.
            It goes on from its own values of an earlier round; where it has none, from these.
        mask: optional 0/1 tensor per trainable tensor, of its shape: entries at 0 stay exactly
            as they are. Applied before DP clipping and again after the noise.
        extra: what the method needs besides (a control variate, a teacher's tensors).
    """

    tensors: Tensors
    trainable: str = ".*"
    personal: str = ""
    mask: Tensors = field(default_factory=dict)
    extra: Tensors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Update:
    """What a client sends back: trained tensors, counts and privacy spend; never data.

    Attributes:
        client: who trained.
        round: the round it was trained in, >= 1.
        base: id of the version it was trained from.
        tensors: trained values of the trainable tensors, with the broadcast's names and shapes
            when they are aggregated; on their way, what a mask and the encodings make of them.
        num_examples: the weight of this client; its *declared* size under DP.
        metrics: such as ``loss``; empty under DP.
        memory: regulariser memory, only from a consolidating round.
        spends: what producing this update spent.
        fingerprint: keyed digest of the data set that was trained on.
        declared: the client's weight by an operator's label, where the strategy asks for one. The
            orchestrator puts it on; what a client sends has none.
        weight: what else this update counts, >= 0: a multiple of what the strategy weighs it by.
            Set by a strategy for the one that it wraps; never sent.
    """

    client: str
    round: int
    base: str
    tensors: Tensors
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)
    spends: tuple[PrivacySpend, ...] = ()
    fingerprint: str = ""
    declared: float | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ServerState:
    """Everything a strategy carries between rounds; plain tensors, committed whole.

    Attributes:
        adapter: the global adapter (and head).
        auxiliary: momentum, masks, bases, round counters. Names under :data:`BENEATH` are a frozen
            low-rank adapter that the adapter lies on: see :func:`beneath`.
        metrics: what the last aggregation measured, such as ``averaging_error``; told with the
            version, not part of it, and not read by the next round.
    """

    adapter: Tensors
    auxiliary: Tensors = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


BENEATH = "beneath/"
"""Prefix of the auxiliary tensors that are a frozen adapter under the trained one."""


def beneath(auxiliary: Tensors) -> dict[str, Tensor]:
    """Return the frozen adapter that a strategy keeps under the trained one; empty for none.

    What a method may neither average into its factors nor fold into the base model lies here
    (FedEx-LoRA's residual, FLoRA's stacks): clients train on top of it, and a version is both.
    """
    prefixed = sorted(name for name in auxiliary if name.startswith(BENEATH))
    return {name.removeprefix(BENEATH): auxiliary[name] for name in prefixed}


CORRECTION = "correction/"
"""Prefix of a broadcast's extra tensors that are control variates: see :func:`corrections`."""


def corrections(tensors: Tensors) -> dict[str, Tensor]:
    """Return the control variates among ``tensors``, by the name of what they correct.

    They are displacements: what a variate moves in a round, at the client's learning rate and
    number of steps. Clients that receive one add their own's difference from it to every step's
    gradient, and keep their own; so they need an optimizer for which a displacement is a sum of
    gradients (:class:`clients.optimizers.descent.PlainDescent`) and a fixed number of steps.
    """
    prefixed = sorted(name for name in tensors if name.startswith(CORRECTION))
    return {name.removeprefix(CORRECTION): tensors[name] for name in prefixed}


@dataclass(frozen=True, slots=True)
class Setting:
    """What a strategy may know of a run before round 1.

    Attributes:
        num_clients: how many clients may be asked, >= 1.
        cohort: how many of them a round asks, >= 1.
        seed: for what the strategy draws; not a client's.
        library: adapters that the orchestrator read from the store for the strategy: what each
            changes, as plain factors without a head.
    """

    num_clients: int = 1
    cohort: int = 1
    seed: int = 0
    library: Sequence[Tensors] = ()


ALONE = Setting()
"""Of a run with one client."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Without what a strategy can make nothing of a round.

    Attributes:
        updates: the fewest updates, >= 1.
        client: whose update must be among them; "" for nobody's.
    """

    updates: int = 1
    client: str = ""


def needs_of(strategy: Strategy) -> Needs:
    """Return what ``strategy`` needs of every round: its ``needs``, or those of its ``inner``.

    A strategy that says neither needs one update.
    """
    found: Needs | None = getattr(strategy, "needs", None)
    if found is None and hasattr(strategy, "inner"):
        return needs_of(strategy.inner)
    return found or Needs()


def starts_of(strategy: Strategy) -> str:
    """Return how a task starts from the one before by ``strategy``: its ``starts``.

    ``continue``, ``stack`` or ``fresh``; of a strategy that says nothing, ``continue``.
    """
    found: str = getattr(strategy, "starts", "continue")
    return found


class Strategy(Protocol):
    """How client updates become the next global adapter.

    A strategy is deterministic in its arguments, changes none of them, and imports nothing but
    torch and the standard library. Its constructor's signature is its option schema.

    Attributes:
        capabilities: what is true of it, as it is set:

            ``additive``: a change of the trained tensors means the same whichever round's adapter
            it is added to, so that an update of an older version can be moved onto a newer one.
            Then what is not trained stays as it is, every round trains the same tensors, and
            shifting them in the adapter and in every update shifts the result. Not so where a round
            changes the basis.

            ``core``: what it trains of the adapter are the cores between frozen factors, so that
            it needs an adapter that has them.

            ``directions``: it is for adapters with directions of earlier tasks beside the trained
            pair, which it makes of them when a task begins.

            ``exact``: the next product B A (with what lies beneath) is the weighted mean of the
            clients' products, but for rounding, as long as its rank fits.

            ``any-rank``: clients may train at ranks of their own: a broadcast to a client with a
            rank has no layer above it, and the same scalings as to all others.

            ``beneath``: a part of what is learned lies under the adapter, see :func:`beneath`, so
            that the adapter alone is not what was learned.

            ``mean-only``: the updates count through the weighted mean of their tensors alone, so
            that one update that is this mean gives the same. Then noise in the mean makes the
            whole round private to the clients: what follows is a function of it.

            ``streaming``: memory does not grow with the number of updates, beyond 16 of them.

            ``needs-library``: it is made to start from adapters of the store, and without any is
            another method; a run that goes on from its version has no need of them.

            ``personal``: some trained tensors never leave the client, so that no version is a
            whole model.

            ``private``: what travels is trained tensors under a mask that does not depend on a
            client's data, so that example-level DP holds as the trainer gives it.

            ``recycles``: how a run starts depends on the library of its setting.

            ``selects``: clients choose by their data which ranks of a trained factor they send:
            see :mod:`strategies.selection` and :mod:`strategies.pruning`.

            ``shared-gauge``: of each product B A a round trains one factor, and all clients hold
            the same other one. Then entries of that factor mean the same at each client, so that
            they can be compared one by one; with both trained, (B G^-1)(G A) is the same model.
    """

    @property
    def capabilities(self) -> frozenset[str]:
        """See the class."""
        ...

    def init(self, adapter: Tensors, setting: Setting = ALONE) -> ServerState:
        """Return the state before round 1, from a freshly initialised or continued adapter.

        Args:
            adapter: the tensors the run starts from.
            setting: what is known of the run.
        """
        ...

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return what ``client`` receives; the same object where clients are alike."""
        ...

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the next state from updates that arrive in client order.

        ``updates`` may be read lazily and only once. No update at all leaves the adapter as it is.
        """
        ...
