"""Every strategy of ours as one of Flower's: for a ServerApp that ``flwr run`` starts.

    strategy = WeftStrategy("fedsvd", every=1)
    result = strategy.start(grid, initial_arrays=arrays, num_rounds=3)

Flower (1.41) asks a strategy for messages and hands it the replies; it does not hand back what was
sent, and stops the run where a reply is not like the others. So this one remembers its round, holds
each reply against what was sent, as a run of weft's does, and goes on with the ones that fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from logging import getLogger
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor

from clients.adapters import ADAPTERS
from clients.assignment import NO_DATA, PluginChoice
from clients.flower import NUM_EXAMPLES, ROUND, BadRecord, arrays_of, instruction, tensors_of
from clients.seeds import seed_for
from clients.uplink import decoded
from orchestrator.acceptance import at_ranks_of, over_budget, unfit
from orchestrator.plan import Participant, likeness
from orchestrator.weighing import weighed, weighing_label
from strategies import STRATEGIES
from strategies.base import (
    Broadcast,
    ClientSpec,
    ServerState,
    Setting,
    Strategy,
    Tensors,
    Update,
    beneath,
    needs_of,
)
from strategies.plugins import BadOptions

_LOG = getLogger("flwr.weft")  # shown where Flower shows its own


class BadFlowerRun(ValueError):
    """Flower's run goes on from tensors that this strategy did not make."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A client of the round, what it was sent, and what it counts by an operator's label."""

    client: ClientSpec
    sent: Broadcast
    declared: float | None


class WeftStrategy(FlowerStrategy):
    """A strategy of ours, by name, as one of Flower's.

    A reply that is an error, does not hold exactly what was to be trained, in its shapes and
    formats, or holds a value that is not finite, is refused with a warning, and the round goes on
    without it; so it does, with the adapter as it was, where fewer are left than the strategy
    needs. Arrays that nobody asked for are left out where they are as they were sent, so that a
    ClientApp may answer with its whole model.

    Replies are aggregated in the order of their clients' names, whichever came first.

    Args:
        name: of the strategy.
        sampling: one of Flower's, which decides what nodes train and evaluate, and how evaluations
            are put together; by default all train, two at least, and none evaluates.
        clients: returns what is known of a node by its id; by default its id is its name.
        adapter: the clients' adapter method, where it keeps some of its tensors frozen.
        max_update_norm: how far all tensors of an update together may lie from those that were
            sent (Euclidean norm, > 0); None for any distance.
        seed: of what the strategy draws.
        options: the strategy's own.

    Attributes:
        state: the strategy's, after the last round; None before the first. What a run is resumed
            from: set it, and start from its adapter.

    Raises:
        strategies.plugins.UnknownPlugin: if there is no such strategy.
        strategies.plugins.BadOptions: if it does not take these options, or needs one client's
            update, and nobody says which node that is.
    """

    def __init__(
        self,
        name: str,
        *,
        sampling: FlowerStrategy | None = None,
        clients: Callable[[int], ClientSpec] | None = None,
        adapter: PluginChoice | None = None,
        max_update_norm: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        plugin = STRATEGIES.get(name)
        self._name, self._label = plugin.name, weighing_label(plugin.check(options))
        self._strategy: Strategy = plugin.build(**options)
        self._needs = needs_of(self._strategy)
        named = self._needs.client or self._label
        if named and clients is None:
            raise BadOptions(
                f"strategy {plugin.name!r} looks for {named!r}, and Flower's nodes have ids alone; "
                "give clients, a function from a node's id to a ClientSpec"
            )
        self._sampling = sampling or FedAvg(fraction_evaluate=0.0)
        self._clients = clients or (lambda node: ClientSpec(str(node)))
        self._frozen = ADAPTERS.get(adapter.name).build(**adapter.options).frozen if adapter else ""
        self._max_update_norm, self._seed = max_update_norm, seed
        self._asked: dict[int, _Asked] = {}
        self.state: ServerState | None = None

    def summary(self) -> None:
        """Log which strategy this is, and how nodes are sampled."""
        _LOG.info("strategy %s of weft; nodes are sampled by:", self._name)
        self._sampling.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return what each sampled node is sent.

        Raises:
            BadFlowerRun: if ``arrays`` are not what the last round gave.
            strategies.tensors.NotLowRank: if the strategy needs a low-rank adapter, and they are
                none.
        """
        messages = list(self._sampling.configure_train(server_round, arrays, config, grid))
        state = self.state = self._going_on(arrays, grid, len(messages))
        config[ROUND] = server_round
        self._asked = {m.metadata.dst_node_id: self._ask(state, m) for m in messages}
        contents: dict[tuple[Any, ...], RecordDict] = {}
        for message in messages:
            sent = self._asked[message.metadata.dst_node_id].sent
            like = likeness(sent)
            if like not in contents:  # one object for clients that are alike
                contents[like] = instruction(sent, beneath(state.auxiliary), config)
            message.content = contents[like]
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next adapter and what was measured: the means of the clients' metrics."""
        if self.state is None:
            return None, None
        accepted: dict[str, tuple[_Asked, Message]] = {}
        means, refused = _Means(), 0
        for reply in replies:
            read = self._read(server_round, reply)
            if isinstance(read, Update) and read.client not in accepted:
                accepted[read.client] = self._asked[reply.metadata.src_node_id], reply
                means.add(read)
                continue
            refused += 1
            reason = read if isinstance(read, str) else "it has answered already"
            _LOG.warning("round %d: a reply is refused: %s", server_round, reason)
        needs = self._needs
        if len(accepted) >= needs.updates and (not needs.client or needs.client in accepted):
            updates = (self._again(server_round, accepted[name][1]) for name in sorted(accepted))
            self.state = self._strategy.aggregate(self.state, updates)
        else:
            _LOG.warning(
                "round %d: %d updates are too few for %s; the adapter stays as it is",
                *(server_round, len(accepted), self._name),
            )
        counts = {"num-updates": len(accepted), "num-refused": refused}
        metrics = MetricRecord({**means.all(), **self.state.metrics, **counts})
        return arrays_of(self.state.adapter), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return what each node is sent that is sampled to evaluate."""
        messages = list(self._sampling.configure_evaluate(server_round, arrays, config, grid))
        if messages and self.state is not None:
            config[ROUND] = server_round
            sent = Broadcast(self.state.adapter)
            content = instruction(sent, beneath(self.state.auxiliary), config)
            for message in messages:
                message.content = content
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the evaluations put together, without those that are not like the first."""
        fitting: list[Message] = []
        for reply in replies:
            reason = _misfit(reply, fitting)
            if reason is None:
                fitting.append(reply)
            else:
                _LOG.warning("round %d: an evaluation is refused: %s", server_round, reason)
        return self._sampling.aggregate_evaluate(server_round, fitting)

    def _going_on(self, arrays: ArrayRecord, grid: Grid, cohort: int) -> ServerState:
        """Return the state that a round starts from; the first round's is made of its arrays."""
        tensors = tensors_of(arrays)
        if self.state is None:
            num_clients = max(len(list(grid.get_node_ids())), cohort, 1)
            seed = seed_for(self._seed, 0, "strategy")
            return self._strategy.init(tensors, Setting(num_clients, max(cohort, 1), seed))
        known = self.state.adapter
        odd = known.keys() ^ tensors.keys() or {n for n in known if not _same(known[n], tensors[n])}
        if odd:
            raise BadFlowerRun(
                f"{min(odd)} is not what the last round gave; the strategy {self._name!r} goes on "
                "from its own state: leave the arrays as they are, or start another WeftStrategy"
            )
        return self.state

    def _ask(self, state: ServerState, message: Message) -> _Asked:
        """Return what the node of a message is asked."""
        client = self._clients(message.metadata.dst_node_id)
        who = Participant(client.name, NO_DATA, client.name, labels=client.labels)
        counts = weighed(who, self._label).declared
        return _Asked(client, self._strategy.broadcast(state, client), counts)

    def _read(self, round_: int, reply: Message) -> Update | str:
        """Return a reply as an update, or why it is none."""
        node = reply.metadata.src_node_id
        if reply.has_error():
            return f"error {reply.error.code} at node {node}: {reply.error.reason}"
        asked = self._asked.get(node)
        if asked is None:
            return f"node {node} was not asked"
        sent = asked.sent
        pattern = re.compile(sent.trainable)
        apart = re.compile(rf"{sent.personal}|{self._frozen}|.*\.scaling")
        wanted = {
            n: t for n, t in sent.tensors.items() if pattern.fullmatch(n) and not apart.fullmatch(n)
        }
        try:
            update = _update(asked, round_, reply.content, wanted)
            whole = replace(update, tensors=decoded(update.tensors, sent, (), 0))
        except (BadRecord, KeyError, TypeError, ValueError) as error:
            return f"{asked.client.name}: {error}"
        wanted = dict(at_ranks_of(whole, wanted, sent))
        reason = unfit(whole, wanted, self._max_update_norm) or over_budget(update, sent)
        return whole if reason is None else f"{asked.client.name}: {reason}"

    def _again(self, round_: int, reply: Message) -> Update:
        """Return an update that was accepted: read twice, so that one is held at a time."""
        update = self._read(round_, reply)
        assert isinstance(update, Update)
        return update


class _Means:
    """Means of metrics, weighted by the numbers of examples; of those that all updates have."""

    def __init__(self) -> None:
        self._sums: dict[str, float] | None = None
        self._examples = 0

    def add(self, update: Update) -> None:
        """Count one in."""
        parts = {name: value * update.num_examples for name, value in update.metrics.items()}
        sums = self._sums
        self._sums = (
            parts if sums is None else {n: s + parts[n] for n, s in sums.items() if n in parts}
        )
        self._examples += update.num_examples

    def all(self) -> dict[str, float]:
        """Return them."""
        return {name: total / self._examples for name, total in (self._sums or {}).items()}


def _update(asked: _Asked, round_: int, content: RecordDict, wanted: Tensors) -> Update:
    """Return what a reply holds as an update.

    Raises:
        BadRecord: if it does not hold one record of arrays and one of metrics, or not these.
    """
    arrays, metrics = list(content.array_records.values()), list(content.metric_records.values())
    if (len(arrays), len(metrics)) != (1, 1):
        raise BadRecord(
            f"a reply has one record of arrays and one of metrics, got {len(arrays)} and "
            f"{len(metrics)}"
        )
    values = _numbers(metrics[0])
    if NUM_EXAMPLES not in values or not values[NUM_EXAMPLES].is_integer():
        raise BadRecord(f"the metrics have no whole number called {NUM_EXAMPLES!r}")
    sent = asked.sent.tensors
    tensors = {
        name: tensor
        for name, tensor in tensors_of(arrays[0]).items()
        if name in wanted or name not in sent or not _same(tensor, sent[name])
    }
    return Update(
        client=asked.client.name,
        round=round_,
        base="",
        tensors=tensors,
        num_examples=int(values.pop(NUM_EXAMPLES)),
        metrics=values,
        declared=asked.declared,
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are bit for bit the same."""
    return one.dtype == other.dtype and torch.equal(one, other)


def _numbers(metrics: MetricRecord) -> dict[str, float]:
    """Return a record's numbers.

    Raises:
        BadRecord: if there is a list among them.
    """
    lists = [name for name, value in metrics.items() if isinstance(value, list)]
    if lists:
        raise BadRecord(f"the metric {lists[0]!r} is a list, and must be a number")
    return {name: float(value) for name, value in metrics.items() if not isinstance(value, list)}


def _misfit(reply: Message, fitting: list[Message]) -> str | None:
    """Return why an evaluation cannot be put together with the others, or None if it can."""
    if reply.has_error():
        return f"error {reply.error.code}: {reply.error.reason}"
    records = list(reply.content.metric_records.items())
    if len(records) != 1:
        return f"it has {len(records)} records of metrics, expected 1"
    key, metrics = records[0]
    try:
        values = _numbers(metrics)
    except BadRecord as error:
        return str(error)
    if not all(math.isfinite(value) for value in values.values()):
        return "it has a metric that is not finite"
    if not values.get(NUM_EXAMPLES, 0) > 0:
        return f"{NUM_EXAMPLES!r} must be > 0, got {values.get(NUM_EXAMPLES)}"
    first = fitting[0].content.metric_records if fitting else {key: metrics}
    if key not in first or first[key].keys() != metrics.keys():
        return "it has other metrics than the first"
    return None
