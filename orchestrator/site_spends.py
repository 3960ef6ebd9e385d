"""What sites' own ledgers have and this one lacks: where they differ, the higher spend counts.

A site's data may take part in runs of other coordinators, or of this one before its store was lost.
What the site's ledger says of those comes with its replies. A site can add to what was spent of its
own data, and to nobody else's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from storage.ledger import Ledger, SpendConflict, SpendRow

MOST_ROWS = 1_000
"""That one reply may bring; a site tells the rest with the next."""

_LOG = logging.getLogger(__name__)
_SHOWN = 200

Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(pattern=r"^[ -~]{1,200}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class _Parameters(_Part):
    noise_multiplier: float = Field(gt=0, le=1e9)
    sample_rate: float = Field(gt=0, le=1)
    steps: float = Field(ge=1, le=1e12, multiple_of=1)


class _Row(_Part):
    """A spend as a site tells it: only what can be added to others."""

    event: Key
    population: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    client: Text
    run: Text
    round: int = Field(ge=1, le=2**31 - 1)
    assignment: Key
    mechanism: Literal["gaussian"]
    unit: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    adjacency: Literal["add-remove", "zero-out"]
    parameters: _Parameters

    @model_validator(mode="after")
    def _composable(self) -> _Row:
        if self.adjacency == "zero-out" and self.parameters.sample_rate != 1:
            raise ValueError("who is in a round is known under zero-out: its sample_rate is 1")
        return self


def learn(ledger: Ledger, node: str, said: Mapping[str, Any]) -> list[SpendRow]:
    """Take what a node says of itself with a reply: its versions, and spends that are not known.

    Whatever cannot be is left out, with a line in the log: what a site says of itself must never
    stand in the way of a run.

    Args:
        ledger: which gains the spends, whatever the budgets say: they are spent.
        node: that said it.
        said: as :class:`clients.orders.Reply` has it.

    Returns:
        The spends that were new.
    """
    weft, flwr = said.get("weft"), said.get("flwr")
    if _is_version(weft) and _is_version(flwr):
        ledger.nodes.said_versions(node, str(weft), str(flwr))
    rows = said.get("spends", [])
    if not isinstance(rows, list) or len(rows) > MOST_ROWS:
        _LOG.warning("node %s told no list of at most %d spends; none is taken", node, MOST_ROWS)
        return []
    if not rows:
        return []
    own = {client.population for client in ledger.clients() if client.node == node}
    fit = []
    for given in rows:
        try:
            fit.append(_spend(given, own))
        except (ValidationError, ValueError) as error:
            _refuse(node, error)
    return _recorded(ledger, node, fit)


def _recorded(ledger: Ledger, node: str, rows: Sequence[SpendRow]) -> list[SpendRow]:
    """Record what is new: at once, or one by one where something contradicts the ledger."""
    try:
        return ledger.record_spends_within(rows, lambda population, existing, new: None)
    except SpendConflict as error:
        if len(rows) == 1:
            _refuse(node, error)
            return []
    return [new for row in rows for new in _recorded(ledger, node, [row])]


def _refuse(node: str, error: Exception) -> None:
    _LOG.warning("a spend that node %s told is refused: %s", node, _line(error))


def _spend(given: Any, own: set[str]) -> SpendRow:
    row = _Row.model_validate(given)
    if row.population not in own:
        raise ValueError(f"population {row.population!r} is not of its data")
    return SpendRow(**row.model_dump())


def _is_version(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9A-Za-z.+!-]{1,60}", text) is not None


def _line(error: Exception) -> str:
    """Return what is wrong with a row, as one line that a site cannot break."""
    text = str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return re.sub(r"[^ -~]", "?", text)[:_SHOWN]
