"""The same train() behind a Flower ClientApp, and what of ours travels in Flower's records.

A message of :class:`orchestrator.flower_strategy.WeftStrategy` holds the adapter under ``arrays``,
as any of Flower's strategies sends it, and beside it what its round trains (``weft``), its masks,
what else the method needs, and what lies beneath the adapter. A message without these is of another
strategy, one that averages all arrays that it sent: it gets all of them back.

Runs of weft's own send whole orders and replies (:mod:`clients.orders`), as bytes: Flower stores
and sends each part by what it holds, so that one that many nodes are sent is stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients.assignment import Assignment
from clients.evaluate import Evaluation
from clients.orders import BadOrder, BadReply, Order
from clients.regularizers import REGULARIZERS, Regularizer, recall, takes_part
from clients.seeds import seed_for
from clients.starting import initial_tensors
from clients.worker import perform
from strategies.base import Broadcast, Tensors, Update
from strategies.tensors import ALL_TRAINED

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""Keys of the records that Flower's strategies write and read."""

ROUND, NUM_EXAMPLES = "server-round", "num-examples"
"""Keys that they write and read in these records."""

WEFT, MASK, EXTRA, BELOW = "weft", "weft.mask", "weft.extra", "weft.beneath"
"""Keys of the records that only we write and read."""

ORDER, PARTS, REPLY = "weft.order", "weft.parts", "weft.reply"
"""Keys of the records of an order and of a reply."""

_HEADER, _BYTES = "header", "weft.bytes"
_WHOLE_BYTES = 1 << 20
_BFLOAT16 = "weft.bfloat16"
"""How an array is stored whose format NumPy does not have: its values' two bytes each."""

_UNREADABLE = (EOFError, KeyError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
"""What reading hostile bytes as an array raises."""


class BadRecord(ValueError):
    """A message's record that holds no tensors, or not what it must."""


class NotInFlower(ValueError):
    """An assignment asks for what a Flower run cannot give."""


def arrays_of(tensors: Tensors) -> ArrayRecord:
    """Return tensors as Flower's arrays, bit for bit; those in bfloat16 only we can read."""
    return ArrayRecord({name: _array(tensor) for name, tensor in tensors.items()})


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Return Flower's arrays as tensors.

    Raises:
        BadRecord: if one is no array of numbers that torch has, or its bytes are not what it says.
    """
    return {name: _tensor(name, array) for name, array in record.items()}


def instruction(sent: Broadcast, below: Tensors, config: ConfigRecord) -> RecordDict:
    """Return what a client is sent.

    Args:
        sent: what the strategy broadcasts to it.
        below: the frozen adapter under the one that is trained; empty for none.
        config: Flower's own words to the client, with the round's number.
    """
    records: dict[str, Any] = {
        ARRAYS: arrays_of(sent.tensors),
        CONFIG: config,
        WEFT: ConfigRecord({"trainable": sent.trainable, "personal": sent.personal}),
    }
    beside = {MASK: sent.mask, EXTRA: sent.extra, BELOW: below}
    return RecordDict(records | {key: arrays_of(part) for key, part in beside.items() if part})


def order_record(order: Order) -> RecordDict:
    """Return an order as Flower's records; parts that orders share are the same arrays in each."""
    header = ConfigRecord({_HEADER: order.header})
    return RecordDict({ORDER: header, PARTS: _bundle(order.parts)})


def order_of(content: RecordDict) -> Order:
    """Return the order in a message's records; what it says is not looked at.

    Raises:
        BadOrder: if there is none.
    """
    try:
        header = content.config_records[ORDER][_HEADER]
        parts = _unbundled(content[PARTS])
    except (KeyError, TypeError) as error:
        raise BadOrder(f"the message holds no order ({error})") from error
    if not isinstance(header, bytes):
        raise BadOrder("the message's order is not of bytes")
    return Order(header, parts)


def reply_record(reply: bytes) -> RecordDict:
    """Return a packed reply as Flower's records."""
    return RecordDict({REPLY: _bundle({REPLY: reply})})


def reply_of(content: RecordDict) -> bytes:
    """Return the packed reply in a message's records; what it says is not looked at.

    Raises:
        BadReply: if there is none.
    """
    try:
        return _unbundled(content[REPLY])[REPLY]
    except (KeyError, TypeError) as error:
        raise BadReply(f"the message holds no reply ({error})") from error


def client_app(
    training: Callable[[Context], Assignment],
    evaluation: Callable[[Context], Assignment] | None = None,
) -> ClientApp:
    """Return a ClientApp that trains as weft's own clients do.

    It works under :class:`orchestrator.flower_strategy.WeftStrategy`, for every strategy of ours,
    and under strategies of Flower's that send one record of arrays and average what comes back.

    Args:
        training: returns what to train on, with what, for whom and where its private state lies,
            from Flower's context. Round, tensors and what lies beneath come from the messages; the
            round's seed follows from the assignment's, the round and the client's name.
        evaluation: likewise what to score on; None for a client that does not evaluate.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        asked = _asked(training(context), "train", message.content, context)
        update = perform(asked)
        assert isinstance(update, Update)
        every = {} if WEFT in message.content else asked.broadcast.tensors
        content = RecordDict({ARRAYS: arrays_of({**every, **update.tensors})})
        content[METRICS] = MetricRecord({NUM_EXAMPLES: update.num_examples, **update.metrics})
        return Message(content, reply_to=message)

    if evaluation is not None:
        scored_on = evaluation

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            asked = _asked(scored_on(context), "evaluate", message.content, context)
            found = perform(asked)
            assert isinstance(found, Evaluation)
            metrics = MetricRecord({NUM_EXAMPLES: found.num_examples, **found.metrics})
            return Message(RecordDict({METRICS: metrics}), reply_to=message)

    return app


def first_arrays(assignment: Assignment) -> ArrayRecord:
    """Return the arrays that a Flower run starts from: an adapter's and head's first tensors.

    They follow from the assignment's seed; a run of weft's makes the same ones.
    """
    seed = seed_for(assignment.seed, 0, "init")
    return arrays_of(initial_tensors(replace(assignment, seed=seed)))


def _asked(
    template: Assignment,
    action: Literal["train", "evaluate"],
    content: RecordDict,
    context: Context,
) -> Assignment:
    """Return the assignment of a message.

    Raises:
        NotInFlower: if the template asks for what only a run of weft's can give.
        BadRecord: if the message is not what a strategy sends.
    """
    if template.private:
        raise NotInFlower(
            "an assignment with privacy cannot be trained in a Flower run: nothing there holds its "
            "spend against the population's budget; leave privacy out, or train it with weft run"
        )
    if template.uplink:
        raise NotInFlower("uplink must be empty in a Flower run: nobody decodes what is sent there")
    if template.held is not None:
        raise NotInFlower(
            "held must be None in a Flower run: its strategies send everything, for no log there "
            "says what a client holds, and keeping it would be for nothing; leave it to weft run"
        )
    for choice in template.regularizers:
        method: Regularizer = REGULARIZERS.get(choice.name).build(**choice.options)
        if method.holds or method.rehearsal is not None:
            raise NotInFlower(
                f"regularizer {choice.name!r} goes on from earlier tasks, and a Flower run has no "
                "lineage that says which; leave it out, or train with weft run"
            )
        known = recall(template.memory, choice.name)
        if takes_part(method, "prepare") or (takes_part(method, "consolidate") and not known):
            raise NotInFlower(
                f"regularizer {choice.name!r} has clients read their data before or after the "
                "rounds, which a Flower run does not, and would do nothing; leave it out, or train "
                "with weft run"
            )
    try:
        round_ = int(content.config_records[CONFIG][ROUND])  # type: ignore[arg-type]
        arrays = content.array_records[ARRAYS]
    except (KeyError, TypeError, ValueError) as error:
        raise BadRecord(
            f"the message has no {ARRAYS!r}, or no {ROUND!r} in its {CONFIG!r}"
        ) from error
    below = _part(content, BELOW)
    if below and template.underlay:
        raise NotInFlower(
            "the strategy keeps a part of what is learned beneath the adapter, and the assignment "
            "has an underlay already; take another strategy, such as fedavg"
        )
    words = content.config_records.get(WEFT, ConfigRecord())
    sent = Broadcast(
        tensors_of(arrays),
        trainable=str(words.get("trainable", ALL_TRAINED)),
        personal=str(words.get("personal", "")),
        mask=_part(content, MASK),
        extra=_part(content, EXTRA),
    )
    return replace(
        template,
        action=action,
        run=str(context.run_id),
        round=round_,
        base=f"flower-{context.run_id}-{round_ - 1}",
        broadcast=sent,
        underlay=below or template.underlay,
        seed=seed_for(template.seed, round_, template.client),
    )


def _part(content: RecordDict, key: str) -> dict[str, Tensor]:
    """Return the tensors of a record that need not be there."""
    return tensors_of(content.array_records[key]) if key in content else {}


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype != torch.bfloat16:
        return Array(tensor.numpy())
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return Array("bfloat16", tuple(tensor.shape), _BFLOAT16, data)


def _bundle(data: Mapping[str, bytes]) -> ConfigRecord | ArrayRecord:
    """Return named bytes as a record: little in one, more in arrays, which travel in chunks.

    Flower sends each record, array and chunk by a request of its own, on both ways.
    """
    if sum(map(len, data.values())) <= _WHOLE_BYTES:
        return ConfigRecord(dict(data))
    return ArrayRecord({k: Array("uint8", (len(v),), _BYTES, v) for k, v in data.items()})


def _unbundled(record: object) -> dict[str, bytes]:
    """Return the bytes in a record.

    Raises:
        TypeError: if it holds something else.
    """
    if not isinstance(record, ConfigRecord | ArrayRecord):
        raise TypeError(f"a {type(record).__name__}, which holds no bytes")
    found: dict[str, bytes] = {}
    for name, value in record.items():
        if isinstance(value, Array) and value.stype == _BYTES:
            found[name] = value.data
        elif isinstance(value, bytes):
            found[name] = value
        else:
            raise TypeError(f"{name!r} is not of bytes")
    return found


def _tensor(name: str, array: Array) -> Tensor:
    try:
        if array.stype == _BFLOAT16:
            flat = torch.frombuffer(bytearray(array.data), dtype=torch.bfloat16)
            return flat.reshape(array.shape)
        return torch.from_numpy(array.numpy())  # numpy.load, which it calls, unpickles nothing
    except _UNREADABLE as error:
        raise BadRecord(f"the array {name!r} cannot be read ({type(error).__name__})") from error
