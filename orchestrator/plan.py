"""Who trains what in a round: pure functions of the plan, so resuming is the same as running."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from clients.assignment import (
    NO_DATA,
    Assignment,
    DataSpec,
    ModelSpec,
    NoiseShare,
    Past,
    PluginChoice,
    Privacy,
)
from clients.regularizers import rehearses
from clients.seeds import seed_for
from orchestrator.config import RunConfig
from orchestrator.ranks import adapter_at
from orchestrator.sections import EvaluateConfig
from strategies.base import Broadcast, ClientSpec, Tensors
from strategies.spends import ClientLevel


@dataclass(frozen=True, slots=True)
class Participant:
    """A client as a run sees it: a data set that takes part.

    Attributes:
        name: the client's name.
        data: its records.
        population: the people its records are about; budgets and spends belong to it.
        num_examples: declared size; 0 where it declares none (then it is counted, without DP).
        labels: the operator's labels.
        rank: that of its adapter, or None for the run's.
        public: whether its data are public.
        privacy: its DP-SGD, calibrated once for the whole run; None without DP.
        declared: what its updates count, by an operator's label; None where none is asked for.
        past: where it finds what it kept of earlier tasks; None where nothing is rehearsed.
        holdout: the records that its scores are measured on; None where it holds none out.
        scoring: how it tells its scores of them, calibrated once for the whole run; None where it
            tells none, or exact ones.
    """

    name: str
    data: DataSpec
    population: str
    num_examples: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    rank: int | None = None
    public: bool = False
    privacy: Privacy | None = None
    declared: float | None = None
    past: Past | None = None
    holdout: DataSpec | None = None
    scoring: Privacy | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts.

    Attributes:
        mode: ``fresh``, ``continue`` or ``stack``.
        version: id of the version it starts from, or None.
        stack: versions frozen underneath, oldest first.
        seen_labels: labels that the start version can already tell apart; with ``fresh`` those that
            are learned again from examples that clients kept.
        offset: with ``continue``, the offset that the version lies on, or None.
        labels: the label set of the version, with which the run's begins; empty for none.
    """

    mode: Literal["fresh", "continue", "stack"] = "fresh"
    version: str | None = None
    stack: tuple[str, ...] = ()
    seen_labels: tuple[str, ...] = ()
    offset: str | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run decided before round 1; kept as JSON on the run's record.

    Attributes:
        run: the run's id.
        config: the resolved configuration.
        model: the base model, with its hash.
        adapter: checked adapter choice.
        strategy: checked strategy choice.
        optimizer: checked optimizer choice.
        regularizers: checked regularizer choices.
        participants: sorted by name.
        start: where the run starts.
        loggers: checked choices of what is told of it; they change no result.
        uplink: checked choices of how updates are encoded, in order.
        library: ids of the versions whose adapters the strategy starts from.
        central: client-level DP, calibrated once for the whole run; None without.
    """

    run: str
    config: RunConfig
    model: ModelSpec
    adapter: PluginChoice
    strategy: PluginChoice
    optimizer: PluginChoice
    regularizers: tuple[PluginChoice, ...]
    participants: tuple[Participant, ...]
    start: Start
    loggers: tuple[PluginChoice, ...] = ()
    uplink: tuple[PluginChoice, ...] = ()
    library: tuple[str, ...] = ()
    central: ClientLevel | None = None

    @property
    def max_participations(self) -> int:
        """In how many rounds a client may take part."""
        privacy = self.config.privacy
        return (privacy and privacy.max_participations) or self.config.rounds

    @property
    def task_labels(self) -> tuple[str, ...]:
        """The labels that this run learns, in index order."""
        chosen = self.config.task_labels
        return tuple(x for x in self.model.labels if not chosen or x in chosen)

    @property
    def seen_labels(self) -> tuple[str, ...]:
        """The labels that the run's result can tell apart, in index order."""
        seen = {*self.start.seen_labels, *self.task_labels}
        return tuple(x for x in self.model.labels if x in seen)

    @property
    def head_labels(self) -> tuple[str, ...]:
        """The labels whose rows of the head this run trains, in index order."""
        return head_labels(map(asdict, self.regularizers), self.task_labels, self.seen_labels)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        document: dict[str, Any] = _PLAN.dump_python(self, mode="json")
        return document

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Plan:
        """Return the plan that :meth:`to_json` gave."""
        return _PLAN.validate_python(document)


_PLAN = TypeAdapter(Plan)


@dataclass(frozen=True, slots=True)
class RoundInputs:
    """What a round starts from.

    Attributes:
        round: >= 1.
        base: id of the version that the broadcast comes from.
        underlay: frozen adapter underneath, or empty.
        memory: regulariser memory.
        site: folder of the clients' private state.
    """

    round: int
    base: str
    underlay: Tensors
    memory: Tensors
    site: str


def plan_round(
    plan: Plan,
    inputs: RoundInputs,
    broadcast: Callable[[ClientSpec], Broadcast],
    cohort: Sequence[Participant],
) -> list[Assignment]:
    """Return the assignments of a round's clients, in their order.

    Args:
        plan: the run's plan.
        inputs: what the round starts from.
        broadcast: the strategy's broadcast of the state that it starts from.
        cohort: who is asked.
    """
    masked: dict[tuple[Any, ...], tuple[Broadcast, Broadcast]] = {}
    assignments = []
    for participant in cohort:
        raw = broadcast(ClientSpec(participant.name, participant.rank, participant.labels))
        # one masked object for all that hold the same tensors, so that a backend ships it once
        same = likeness(raw)
        if same not in masked:
            masked[same] = (raw, with_head_mask(raw, plan))  # the first is kept: ids stay theirs
        sent = masked[same][1]
        seed = seed_for(plan.config.seed, inputs.round, participant.name)
        assignments.append(_assignment(plan, inputs, participant, sent, seed))
    return assignments


def likeness(sent: Broadcast) -> tuple[Any, ...]:
    """Return what is equal for broadcasts that say the same and hold the same tensors, by identity.

    As long as one of them is kept, since another tensor may get the identity of one that is gone.
    """
    return (
        sent.trainable,
        sent.personal,
        id(sent.tensors),
        *(("mask", name, id(tensor)) for name, tensor in sent.mask.items()),
        *(("extra", name, id(tensor)) for name, tensor in sent.extra.items()),
    )


def plan_init(plan: Plan, inputs: RoundInputs) -> Assignment:
    """Return the assignment that makes the adapter's first tensors, on any worker."""
    someone = replace(plan.participants[0], rank=None)
    seed = seed_for(plan.config.seed, 0, "init")
    made = replace(
        _assignment(plan, inputs, someone, Broadcast({}), seed),
        action="init",
        client="",
        privacy=None,
        central=None,
        noise_share=None,
        data=NO_DATA,
        num_examples=0,
        held=None,
    )
    chosen = plan.config.init_data
    if chosen is None:
        return made
    labels = plan.task_labels if plan.config.task_labels else ()
    spec = DataSpec(chosen.data, chosen.fields, labels=labels)
    return replace(made, data=spec, num_examples=chosen.examples, public=True)


def plan_evaluation(
    plan: Plan, inputs: RoundInputs, tensors: Tensors, chosen: EvaluateConfig
) -> Assignment:
    """Return the assignment that scores ``tensors`` on held-back data of the run's task.

    Where clients are to score them, each puts its own data in its place.
    """
    data = DataSpec(chosen.data or NO_DATA.uri, chosen.fields, labels=plan.task_labels)
    someone = replace(plan.participants[0], rank=None)
    made = _assignment(plan, inputs, someone, Broadcast(tensors), 0)
    return replace(
        made,
        action="evaluate",
        client="",
        data=data,
        privacy=None,
        central=None,
        noise_share=None,
        memory={},
        head="freeze",
        held=None,
    )


def with_head_mask(broadcast: Broadcast, plan: Plan) -> Broadcast:
    """Return the broadcast with the head's rows of other tasks masked: they stay bit-identical."""
    return head_masked(broadcast, plan.model.labels, plan.head_labels)


def head_labels(
    regularizers: Iterable[Mapping[str, Any]], task: Sequence[str], seen: Sequence[str]
) -> tuple[str, ...]:
    """Return the labels whose rows of the head a run trains: its own, or with rehearsal all seen.

    Kept examples would else train the new rows against old ones that cannot answer.

    Args:
        regularizers: the run's, each with ``name`` and ``options``.
        task: the run's labels.
        seen: these and those of earlier tasks.
    """
    return tuple(seen if any(rehearses(**one) for one in regularizers) else task)


def head_masked(broadcast: Broadcast, labels: Sequence[str], task: Sequence[str]) -> Broadcast:
    """Return the broadcast with the head's rows masked that are of ``labels`` outside ``task``."""
    head = [n for n in ("head.weight", "head.bias") if n in broadcast.tensors]
    if not head or set(task) == set(labels):
        return broadcast
    rows = torch.tensor([float(label in task) for label in labels])
    mask = dict(broadcast.mask)
    for name in head:
        tensor = broadcast.tensors[name]
        own = rows.to(tensor.dtype).reshape(-1, *[1] * (tensor.dim() - 1)).expand_as(tensor)
        mask[name] = (own * mask[name] if name in mask else own).contiguous()
    return replace(broadcast, mask=mask)


def _noise_share(config: RunConfig) -> NoiseShare | None:
    """Return what of the noise a client makes itself, or None where it makes none."""
    privacy = config.client_level
    if privacy is None or privacy.noise_shares is None:
        return None
    return NoiseShare(privacy.noise_shares, privacy.insecure_seed)


def _assignment(
    plan: Plan, inputs: RoundInputs, who: Participant, broadcast: Broadcast, seed: int
) -> Assignment:
    config = plan.config
    return Assignment(
        action="train",
        run=plan.run,
        client=who.name,
        round=inputs.round,
        base=inputs.base,
        model=plan.model,
        adapter=adapter_at(plan.adapter, who.rank),
        broadcast=broadcast,
        data=replace(who.data, labels=plan.task_labels if config.task_labels else ()),
        optimizer=plan.optimizer,
        site=inputs.site,
        underlay=inputs.underlay,
        memory=inputs.memory,
        num_examples=who.num_examples,
        regularizers=plan.regularizers,
        batch_size=config.batch_size,
        steps=config.local_steps,
        epochs=config.epochs or 1.0,
        microbatch=config.microbatch,
        labels=plan.task_labels if config.task_labels else (),
        head=config.head,
        privacy=who.privacy,
        central=plan.central,
        noise_share=_noise_share(config),
        seed=seed,
        threads=config.threads,
        device=config.device,
        public=who.public,
        uplink=plan.uplink,
        held={} if config.downlink == "held" else None,
        past=who.past,
    )
