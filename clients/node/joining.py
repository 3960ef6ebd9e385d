"""The join file: what a node tells of itself to the coordinator that it asks to let it in.

JSON, small, and signed by the node's key: its name, its data sets by their local names with rounded
sizes, the budgets that it gives them, its labels, the base models that it has. Never a path, a uri,
or a count that is not rounded; of its own columns' names only whose a record is. One that brings a
new key is signed by the old one as well. What is signed is the statement as canonical JSON, so that
a file may be reformatted on its way, and not changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from clients.inspection import rounded
from clients.node.identity import BadNodeKey, Identity, PublicKey, parsed_key

FORMAT = "weft-join-1"
LONGEST_LIFE = timedelta(days=3660)
MOST_BYTES = 1 << 18
"""Of a join file; one of a hundred data sets has a tenth of it."""

_SKEW = timedelta(minutes=10)
_SHOWN = 80
_NAME = r"[a-z0-9][a-z0-9._-]{0,62}"


class BadJoin(ValueError):
    """A join file that is none, was changed, or is not valid at this time."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it must be printable")
    return text


Name = Annotated[str, StringConstraints(pattern=rf"^{_NAME}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_printable)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8,128}$")]


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Offer(_Part):
    """A data set as a node offers it.

    Attributes:
        examples: how many there are to train on, rounded to two digits.
        fields: which of weft's columns it has, such as ``text`` and ``label``.
        unit: the column that says whose a record is, which runs with privacy hide; empty where each
            is somebody's by itself. Of its own columns' names a site tells this one alone.
        units: of how many people, or what it counts, ``examples`` are, rounded; None without.
        population: whose data it is.
        public: whether the data are public.
        holdout: the share that the node holds back, in [0, 1).
        epsilon: what the site lets its population spend in all, > 0; None sets no bound.
        delta: in (0, 1); None exactly where ``epsilon`` is.
    """

    examples: int = Field(ge=1, le=10**15, strict=True)
    fields: tuple[Text, ...] = ()
    unit: Annotated[str, StringConstraints(max_length=128), AfterValidator(_printable)] = ""
    units: int | None = Field(default=None, ge=1, strict=True)
    population: Text
    public: bool = False
    holdout: float = Field(default=0.0, ge=0, lt=1)
    epsilon: float | None = Field(default=None, gt=0)
    delta: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> Offer:
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError("a budget is epsilon and delta; give both or neither")
        if (self.units is None) != (not self.unit):
            raise ValueError("units says how many a unit's column counts; give both or neither")
        counts = [self.examples, *([self.units] if self.units else [])]
        if any(rounded(count) != count for count in counts):
            raise ValueError("counts are rounded to two digits: an exact one tells too much")
        return self


class Statement(_Part):
    """What a node says of itself.

    Attributes:
        format: of the statement.
        name: of the node.
        public_key: the node's, in OpenSSH's format.
        previous: the public key that it takes the place of, or None.
        data: what it offers, by the data set's local name.
        labels: the site's own, such as ``{"region": "north"}``.
        models: hashes of the base models that it has.
        weft: version of its weft.
        flwr: version of its Flower.
        made: when, UTC.
        expires: until when the key is good, UTC.
    """

    format: Literal["weft-join-1"]
    name: Name
    public_key: Annotated[str, StringConstraints(max_length=600)]
    previous: Annotated[str, StringConstraints(max_length=600)] | None = None
    data: dict[Name, Offer] = Field(min_length=1, max_length=100)
    labels: dict[Text, Text] = Field(default_factory=dict)
    models: tuple[Digest, ...] = ()
    weft: Text
    flwr: Text
    made: AwareDatetime
    expires: AwareDatetime

    @model_validator(mode="after")
    def _one_budget_each(self) -> Statement:
        budgets: dict[str, tuple[float | None, float | None]] = {}
        for offer in self.data.values():
            own = (offer.epsilon, offer.delta)
            if budgets.setdefault(offer.population, own) != own:
                raise ValueError("data sets of one population share a budget; give each the same")
        return self

    @property
    def budgets(self) -> dict[str, tuple[float, float]]:
        """By population: (epsilon, delta) that the site lets it spend, where it sets a bound."""
        return {
            offer.population: (offer.epsilon, offer.delta)
            for offer in self.data.values()
            if offer.epsilon is not None and offer.delta is not None
        }


@dataclass(frozen=True, slots=True)
class Join:
    """A join file that holds together: whoever has the key said this.

    Attributes:
        statement: what is said.
        key: the node's public key.
        previous: that it takes the place of, whose holder said so too; or None.
        document: the file's whole content, JSON.
    """

    statement: Statement
    key: PublicKey
    previous: PublicKey | None
    document: Mapping[str, Any]

    def client(self, data_set: str) -> str:
        """Return what a data set's client is called: as the node, which may offer several."""
        name = self.statement.name
        return name if len(self.statement.data) == 1 else f"{name}.{data_set}"


def write_join(statement: Statement, identity: Identity, previous: Identity | None = None) -> str:
    """Return a join file's text, signed.

    Args:
        statement: with ``identity``'s public key, and with that of ``previous``.
        identity: the node's key pair.
        previous: the key pair that it takes the place of, or None.

    Raises:
        BadJoin: if the statement is of other keys.
    """
    document = statement.model_dump(mode="json")
    signers = [identity, *([previous] if previous else [])]
    named = [statement.public_key, *([statement.previous] if statement.previous else [])]
    if [one.public.text for one in signers] != named:
        raise BadJoin("a join file is signed by the key that it names, and by the one before it")
    message = _message(document)
    signatures = {one.public.fingerprint: one.sign(message) for one in signers}
    whole = {"statement": document, "signatures": signatures}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def read_join(data: bytes, moment: datetime) -> Join:
    """Return what a join file says, each signature checked.

    Args:
        data: the file's bytes, whoever they are from.
        moment: the time now, UTC.

    Raises:
        BadJoin: if it is none, was changed, is not signed by the keys that it names, is not valid
            yet, or no longer.
    """
    document = _parsed(data)
    said, signatures = document.get("statement"), document.get("signatures")
    if set(document) != {"statement", "signatures"} or not (
        isinstance(said, dict) and isinstance(signatures, dict)
    ):
        _refuse("it has a statement and signatures, and this has not")
    if said.get("format") != FORMAT:
        given = repr(said.get("format"))[:_SHOWN]
        _refuse(f"its format is {FORMAT}, got {given}: the versions of weft are too far apart")
    try:
        statement = Statement.model_validate(said)
        key = parsed_key(statement.public_key)
        previous = None if statement.previous is None else parsed_key(statement.previous)
    except ValidationError as error:
        _refuse(_sentence(error))
    except BadNodeKey as error:
        _refuse(str(error))
    _check_signatures(said, signatures, [key, *([previous] if previous else [])])
    _check_times(statement, moment)
    return Join(statement, key, previous, document)


def _parsed(data: bytes) -> dict[str, Any]:
    if len(data) > MOST_BYTES:
        _refuse(f"it has at most {MOST_BYTES} bytes, got {len(data)}")
    try:
        document = json.loads(
            data.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_once
        )
    except (ValueError, RecursionError):
        _refuse("it is no JSON")
    if not isinstance(document, dict):
        _refuse("it is a JSON object")
    return document


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object with a key twice: two readers could read two things."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _check_signatures(
    said: Mapping[str, Any], signatures: Mapping[str, Any], keys: Sequence[PublicKey]
) -> None:
    if len({key.text for key in keys}) != len(keys):
        _refuse("a new key takes the place of another one, and here both are the same")
    if set(signatures) != {key.fingerprint for key in keys}:
        _refuse("it is signed by the keys that it names, and by no others")
    message = _message(said)
    for key in keys:
        signature = signatures[key.fingerprint]
        if not (isinstance(signature, str) and key.made(signature, message)):
            _refuse(
                f"the signature of {key.fingerprint} is not over what it says: it was changed "
                "since, or somebody else made it"
            )


def _check_times(statement: Statement, moment: datetime) -> None:
    made, expires = statement.made, statement.expires
    if made > moment + _SKEW:
        _refuse(f"it was made at {made:%Y-%m-%d %H:%M} UTC, which is yet to come: set the clocks")
    if expires <= moment:
        _refuse(f"it expired at {expires:%Y-%m-%d %H:%M} UTC; make a new one with: weft node join")
    if expires - made > LONGEST_LIFE:
        _refuse(f"a key is good for at most {LONGEST_LIFE.days} days")


def _message(document: Mapping[str, Any]) -> bytes:
    """Return what is signed; nothing else that a node's key signs begins alike."""
    text = json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return f"{FORMAT}\n{text}".encode("ascii")


def _sentence(error: ValidationError) -> str:
    """Return the first of pydantic's complaints as one of ours, and little of what was sent."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])[:_SHOWN] or "statement"
    key = re.sub(r"[^ -~]", "?", key)
    if first["type"] == "extra_forbidden":
        return f"{key} is nothing that it has"
    if first["type"] == "missing":
        return f"{key} is required"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{key}: {reason[:1].lower() + reason[1:]}, got {repr(first['input'])[:_SHOWN]}"


def _refuse(why: str) -> NoReturn:
    raise BadJoin(f"this is no join file that can be used: {why}")
