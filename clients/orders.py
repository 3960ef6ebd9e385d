"""What travels to a site and back, as bytes: orders and replies.

An *order* is an assignment and its terms: a header in canonical JSON, and beside it the tensors as
parts in safetensors, which are named by their sha256, so that one that many clients are sent is
packed, kept and sent once. It names data as the site calls them and the base model by its hash:
never a place, neither here nor there. A *reply* is an update in the very bytes that the site kept
of it, an evaluation, or why there is neither.

Both come from strangers: whatever is not exactly such a thing is refused with a sentence, and
nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load, save

from clients.assignment import Assignment
from clients.by_identity import ByIdentity
from clients.clipping import SMALLEST
from clients.evaluate import Evaluation
from clients.patterns import odd_pattern, patterns_of
from clients.typed_json import Unfit, canonical, from_json, parsed, shown, to_json
from clients.wire import BadUpdate, apart, pack, unpack
from strategies.base import Tensors, Update
from strategies.plugins import Range

ORDER_FORMAT, REPLY_FORMAT = "weft-order-1", "weft-reply-1"
MOST_HEADER_BYTES = 16 * 2**20
"""Of the JSON of an order, or of a reply."""

MOST_PART_BYTES = 16 * 2**30
"""Of all tensors of an order."""

_LONGEST_REASON, _LONGEST_NAME = 2000, 300
_MOST_NUMBERS = 10_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_UNREADABLE = (
    SafetensorError,
    AttributeError,
    KeyError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading hostile bytes as safetensors raises."""

_AT_LEAST_1, _POSITIVE, _SHARE = Range(1), Range(0, open_low=True), Range(0, 1, open_low=True)
_BOUND, _NOISE = Range(SMALLEST, 1e9), Range(0, 1e9, open_low=True)
_WITHIN: Mapping[str, Range] = {
    "round": Range(0, 2**31 - 1),
    "num_examples": Range(0, 2**53),
    "batch_size": _AT_LEAST_1,
    "microbatch": _AT_LEAST_1,
    "steps": Range(0),
    "epochs": _POSITIVE,
    "threads": Range(1, 1024),
    "answer_tokens": Range(0),
    "model.max_length": _AT_LEAST_1,
    "privacy.noise_multiplier": _NOISE,
    "privacy.max_grad_norm": _BOUND,
    "privacy.sample_rate": _SHARE,
    "privacy.per_unit": _AT_LEAST_1,
    "privacy.clipping.stability": _BOUND,
    "privacy.clipping.quantile": Range(0, 1, open_low=True, open_high=True),
    "privacy.clipping.rate": _POSITIVE,
    "privacy.clipping.share": Range(0, 1, open_low=True, open_high=True),
    "privacy.report.loss": _POSITIVE,
    "privacy.report.steps": _AT_LEAST_1,
    "central.clip": _BOUND,
    "central.noise_multiplier": _NOISE,
    "central.cohort": _AT_LEAST_1,
    "noise_share.of": Range(1, 2**31 - 1),
}
"""What else numbers of an assignment are that no type says; None is in every range."""


class BadOrder(ValueError):
    """An order that is none, or that asks for what cannot be."""


class BadReply(ValueError):
    """A reply that is none, or that cannot be said in one."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What an order says besides the assignment.

    Attributes:
        strategy: name of the run's strategy.
        run_name: name of the run.
        weft: version of the coordinator's weft.
        flwr: of its flwr, ``MAJOR.MINOR``.
        deadline: Unix time after which nobody waits, seconds.
    """

    strategy: str
    run_name: str
    weft: str
    flwr: str
    deadline: float


@dataclass(frozen=True, slots=True)
class Order:
    """An assignment as it travels to a site.

    Attributes:
        header: the terms and all of the assignment but its tensors, as canonical JSON.
        parts: the tensors as safetensors, by the sha256 of these bytes.
    """

    header: bytes
    parts: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a site sends neither an update nor an evaluation.

    Attributes:
        client: who.
        round: in which round.
        reason: a sentence; never contains data.
        not_held: whether all that failed is that the site does not hold what it was not sent.
        final: whether the same order would be refused again, as by a site's policy or budget.
    """

    client: str
    round: int
    reason: str
    not_held: bool = False
    final: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes back from a site.

    Attributes:
        result: what it was asked for, or why not.
        node: small JSON of the node itself: its versions, its spends, how long it took.
    """

    result: Update | Evaluation | Refusal
    node: Mapping[str, Any] = field(default_factory=dict)


class Packer(ByIdentity[tuple[str, bytes]]):
    """Packs and hashes tensors once that assignments share by identity."""

    def __init__(self) -> None:
        super().__init__(_packed)


def pack_order(assignment: Assignment, terms: Terms, packer: Packer | None = None) -> Order:
    """Return an assignment as an order: the same one gives the same bytes.

    The folder of the client's private state and that of a local base model are left out.

    Args:
        assignment: what is asked of a client whose data are at a site.
        terms: the rest.
        packer: what the assignments of a run share; None to share nothing.

    Raises:
        ValueError: if the data or the model are named by a place, not as any site could find them.
    """
    pack_part = packer or Packer()
    parts: dict[str, bytes] = {}

    def named(tensors: Tensors) -> str:
        sha256, parts_bytes = pack_part(tensors, assignment.round)
        parts[sha256] = parts_bytes
        return sha256

    model = replace(assignment.model, id=assignment.model.public_id)
    bare = replace(assignment, site="", model=model)
    if odd := _misplaced(bare):
        raise ValueError(odd)
    document = {
        "format": ORDER_FORMAT,
        "terms": to_json(Terms, terms, named),
        "assignment": to_json(Assignment, bare, named),
    }
    return Order(canonical(document), parts)


def unpack_order(order: Order) -> tuple[Assignment, Terms]:
    """Return the assignment of an order, with no folder for the client's state, and its terms.

    Tensors are what they are: whether they fit the model is found out where it is.

    Raises:
        BadOrder: if it is anything else than :func:`pack_order` makes.
    """
    try:
        document = _document(order.header, ORDER_FORMAT, {"assignment", "terms"})
        terms: Terms = from_json(Terms, document["terms"], "terms", _no_part)
        parts = _Parts(order.parts)
        try:
            asked: Assignment = from_json(Assignment, document["assignment"], "assignment", parts)
        except Unfit as error:
            raise Unfit(f"{error} (it was made by weft {shown(terms.weft)})") from error
        parts.refuse_unused()
        _refuse_odd(asked, terms)
    except Unfit as error:
        raise BadOrder(f"the order cannot be used: {error}") from error
    return asked, terms


def pack_reply(reply: Reply) -> bytes:
    """Return a reply as canonical bytes.

    Of a refusal's reason what cannot be printed is left out, and what is more than 2,000 letters.

    Raises:
        BadReply: if a number in it is not finite.
    """
    result, body = reply.result, b""
    kind, said = type(result).__name__.lower(), None
    try:
        if isinstance(result, Update):
            body = pack(result)
        elif isinstance(result, Evaluation):
            said = to_json(Evaluation, result, _no_name)
        else:
            said = to_json(Refusal, replace(result, reason=_printable(result.reason)), _no_name)
        document = {"format": REPLY_FORMAT, "kind": kind, "result": said, "node": reply.node}
        header = canonical(document)
        parsed(header)  # so that nothing is sent that would be refused
    except ValueError as error:
        raise BadReply(f"the reply of {result.client!r} cannot be sent: {error}") from error
    return len(header).to_bytes(8, "little") + header + body


def unpack_reply(data: bytes) -> Reply:
    """Return the reply in ``data``.

    Raises:
        BadReply: if the bytes are anything else than :func:`pack_reply` makes.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header, body = data[8 : 8 + length], data[8 + length :]
        document = _document(header, REPLY_FORMAT, {"kind", "result", "node"})
        kind: str = document["kind"]
        from_json(Literal["update", "evaluation", "refusal"], kind, "kind", _no_part)
        node = from_json(Mapping[str, Any], document["node"], "node", _no_part)
        if kind == "update":
            _refuse(document["result"] is not None, "an update has a result in its header")
            update = unpack(body)
            mark = update.fingerprint
            _refuse(bool(mark) and not _SHA256.fullmatch(mark), "its fingerprint is no digest")
            _refuse_names(update.metrics)
            return Reply(update, node)
        _refuse(bool(body), "there are bytes behind it")
        made = Evaluation if kind == "evaluation" else Refusal
        result = from_json(made, document["result"], "result", _no_part)
        if isinstance(result, Refusal):
            _refuse(result.reason != _printable(result.reason), "its reason cannot be printed")
        else:
            _refuse(not 0 <= result.num_examples <= 2**53, "it scored no such number of examples")
            _refuse_names({**result.metrics, **result.label_accuracy})
        return Reply(result, node)
    except (Unfit, BadUpdate) as error:
        raise BadReply(f"the reply cannot be used: {error}") from error


class _Parts:
    """The parts of an order, each checked and read when it is first asked for."""

    def __init__(self, parts: Mapping[str, bytes]) -> None:
        size = sum(len(data) for data in parts.values())
        _refuse(size > MOST_PART_BYTES, f"its tensors have {size} bytes, and too many")
        self._parts = parts
        self._read: dict[str, Tensors] = {}

    def __call__(self, name: str) -> Tensors:
        if name not in self._read:
            _refuse(not _SHA256.fullmatch(name), "a part is not named by a sha256")
            _refuse(name not in self._parts, f"part {name[:12]} of its tensors is missing")
            data = self._parts[name]
            _refuse(
                hashlib.sha256(data).hexdigest() != name, f"part {name[:12]} is not what it was"
            )
            try:
                self._read[name] = dict(load(data))
            except _UNREADABLE as error:
                raise Unfit(
                    f"part {name[:12]} holds no tensors ({type(error).__name__})"
                ) from error
            long = max(map(len, self._read[name]), default=0) > _LONGEST_NAME
            _refuse(long, f"a tensor's name has more than {_LONGEST_NAME} letters")
        return self._read[name]

    def refuse_unused(self) -> None:
        """Raise Unfit if there is a part that nothing names."""
        _refuse(self._parts.keys() != self._read.keys(), "it has a part that it does not name")


def _packed(tensors: Tensors) -> tuple[str, bytes]:
    data: bytes = save(apart(tensors))
    return hashlib.sha256(data).hexdigest(), data


def _document(header: bytes, format_: str, keys: set[str]) -> dict[str, Any]:
    """Return the JSON of a header of this format with these keys."""
    _refuse(len(header) > MOST_HEADER_BYTES, f"its header has {len(header)} bytes, and too many")
    document = parsed(header)
    _refuse(not isinstance(document, dict), "its header is no object")
    found = document.get("format")
    _refuse(found != format_, f"its format is {ascii(found)[:40]}, expected {format_!r}")
    _refuse(document.keys() != keys | {"format"}, f"its header must hold {', '.join(sorted(keys))}")
    return dict(document)


def _misplaced(asked: Assignment) -> str:
    """Return what is wrong with how an assignment names data and base model; empty if nothing."""
    if not asked.data.uri.startswith("site:"):
        scheme = shown(asked.data.uri.partition(":")[0])
        return (
            f"the data of {asked.client!r} are named by {scheme}; an order names data as the site "
            "does, site:NAME"
        )
    if not _SHA256.fullmatch(asked.model.hash):
        return "an order names its base model by the sha256 of the weights; this one has none"
    return ""


def _refuse_odd(asked: Assignment, terms: Terms) -> None:
    """Refuse what no coordinator of ours asks for, and no type says.

    Raises:
        Unfit: naming it.
    """
    for what, name in (("client", asked.client), ("run", asked.run)):
        _refuse(not _NAME.fullmatch(name), f"its {what} cannot be called '{shown(name)}'")
    _refuse(bool(asked.base) and not _NAME.fullmatch(asked.base), "its base is no version's id")
    kept = asked.past.update if asked.past else ""
    _refuse(bool(kept) and not _SHA256.fullmatch(kept), "what it kept is not named by a sha256")
    _refuse(bool(asked.site), "it names a folder of the site")
    _refuse(asked.model.id.startswith((".", "/", "~")), "its model is a folder")
    for text in (terms.strategy, terms.run_name, terms.weft, terms.flwr):
        _refuse(not text.isprintable() or len(text) > 200, "its terms cannot be printed")
    if odd := _misplaced(asked):
        raise Unfit(odd)
    for pattern in patterns_of(asked):
        odd = odd_pattern(pattern)
        _refuse(bool(odd), f"the pattern '{shown(pattern)}' is not taken: {odd}")
    for path, range_ in _WITHIN.items():
        value: Any = asked
        for step in path.split("."):
            value = None if value is None else getattr(value, step)
        _refuse(value is not None and value not in range_, f"{path} must be {range_}, got {value}")


def _refuse_names(numbers: Mapping[str, float]) -> None:
    """Refuse numbers whose names are more than names: they are kept, drawn and printed."""
    _refuse(len(numbers) > _MOST_NUMBERS, f"it has {len(numbers)} numbers, and too many")
    odd = [name for name in numbers if len(name) > 200 or not name.isprintable()]
    _refuse(bool(odd), f"a number in it is called '{shown(odd[0])}'" if odd else "")


def _printable(text: str) -> str:
    """Return a text as one line that can be printed, cut off where it is long."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:_LONGEST_REASON].strip()


def _refuse(odd: bool, why: str) -> None:
    if odd:
        raise Unfit(why)


def _no_part(name: str) -> Tensors:
    raise Unfit("it names tensors where it can have none")


def _no_name(tensors: Tensors) -> str:
    raise TypeError(f"{len(tensors)} tensors stand where none can")
