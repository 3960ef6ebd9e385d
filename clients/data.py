"""A client's data: read, validate, select, split. The door to everything that training reads.

A URI is opened in :mod:`clients.sources`, its records are validated in :mod:`clients.records`, and
examples become tensors in :mod:`clients.tokens`; one data set is split in
:mod:`clients.partition`. What is in one, and wrong with it, :mod:`clients.inspection` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

from clients import partition as splitting
from clients.assignment import Assignment, DataSpec, ModelSpec, Shard
from clients.examples import Example, digest, record_digest
from clients.holdout import held_out, split_key
from clients.records import BadSelection, listed, validated
from clients.sources import (
    BadDataURI,
    BadRecord,
    DataElsewhere,
    DataNotFound,
    DataURI,
    MissingExtra,
    absolute,
    content_of,
    is_elsewhere,
    is_public,
    is_there,
    parse_uri,
    parts_of,
    several,
    source_state,
)
from clients.tags import IGNORED
from clients.tokens import Batch, Encoded, by_length, collate, encode, padding_id

__all__ = [
    "BadDataURI",
    "BadRecord",
    "BadSelection",
    "Batch",
    "DataElsewhere",
    "DataNotFound",
    "DataURI",
    "Encoded",
    "Example",
    "MissingExtra",
    "absolute",
    "by_length",
    "collate",
    "content_of",
    "encode",
    "examples",
    "examples_of",
    "fingerprint",
    "is_elsewhere",
    "is_public",
    "is_there",
    "leaving_out_what_is_bad",
    "padding_id",
    "parse_uri",
    "partition_specs",
    "parts_of",
    "record_digest",
    "several",
    "units",
]


def examples(spec: DataSpec, model: ModelSpec, key: bytes | None = None) -> list[Example]:
    """Return the examples that ``spec`` means, in the order of the records.

    Every record is validated, whether it is selected or not. The shard is taken of what is left
    after the selection by label, and the holdout is split off the shard.

    Args:
        spec: which records.
        model: what they are for.
        key: of the site whose data they are, by which a holdout is split off; None for public data.

    Raises:
        BadDataURI, DataNotFound, MissingExtra: as :func:`clients.sources.open_source`.
        BadRecord: for the first record that cannot be used.
        BadSelection: if the spec asks for what is not there.
    """
    shard = spec.shard
    if (spec.part == "all") != (spec.holdout == 0):
        raise BadSelection(
            f"a holdout of {spec.holdout:g} is split off, and part {spec.part!r} is asked for; a "
            "share in (0, 1) goes with train or holdout, and 0 with all"
        )
    if shard is None:
        return _of_part(spec, _selected(spec, model), key)
    _check_shard(shard)
    whole, parts = _divided(spec, shard, model)
    name = shard.value if shard.partition == "column" else f"part-{shard.index}"
    return _of_part(spec, [whole[i] for i in parts.get(name, ())], key)


def examples_of(assignment: Assignment) -> list[Example]:
    """Return the examples that an assignment means, at the site where they are.

    Raises:
        BadDataURI, DataNotFound, MissingExtra, BadRecord, BadSelection: as :func:`examples`.
    """
    return examples(assignment.data, assignment.model, split_key(assignment))


def units(examples: Sequence[Example]) -> list[list[int]]:
    """Return the indices of each unit's examples, units in the order of their first ones.

    Args:
        examples: of a spec with a ``unit``.
    """
    found: dict[str | None, list[int]] = {}
    for index, example in enumerate(examples):
        found.setdefault(example.unit, []).append(index)
    return list(found.values())


def partition_specs(  # noqa: PLR0913  (a Shard's fields, spelled out)
    spec: DataSpec,
    partition: Literal["iid", "dirichlet", "column"],
    *,
    model: ModelSpec,
    parts: int = 1,
    alpha: float = 0.5,
    column: str = "",
    seed: int = 0,
) -> list[tuple[str, DataSpec]]:
    """Return one named spec for each part of a data set; reads the data once.

    Args:
        spec: the data set; it must not be a part already.
        partition: how to split.
        model: whose label set the labels are of.
        parts: how many, >= 1 (not used by ``column``).
        alpha: Dirichlet concentration, > 0; smaller is less alike.
        column: the source's own name of the column to split by (``column``).
        seed: of the partition.

    Returns:
        ``part-0``, ``part-1``, … in order, for ``iid`` and ``dirichlet``; one for each distinct
        value, sorted and named by it, for ``column``. No part is empty.

    Raises:
        BadSelection: if there are fewer examples than parts, or as :func:`examples`.
    """
    if spec.shard is not None:
        raise BadSelection(f"{spec.uri} is a part already and cannot be split again")
    split = Shard(partition, total=parts, seed=seed, alpha=alpha, column=column)
    _check_shard(split)
    whole, named = _divided(spec, split, model)
    if not named or not all(named.values()):
        raise BadSelection(
            f"{spec.uri} has {len(whole)} examples to split, and each of {parts} parts needs one; "
            "ask for fewer parts"
        )
    return [
        (
            name,
            replace(spec, shard=replace(split, value=name))
            if partition == "column"
            else replace(spec, shard=replace(split, index=index)),
        )
        for index, name in enumerate(named)
    ]


def fingerprint(spec: DataSpec, examples: Sequence[Example], key: bytes | None) -> str:
    """Return the digest of a data set's examples, in hex; their order does not matter.

    Public data (:func:`is_public`) have the same fingerprint everywhere, whatever the key. All
    others have one that only the site can make or compare: a plain hash would let anyone who has
    a record confirm that it is there.

    Args:
        spec: where ``examples`` come from.
        examples: what it selected.
        key: the site's secret; None for data that were declared public.
    """
    return digest(examples, None if is_public(spec.uri) else key)


def _check_shard(shard: Shard) -> None:
    """Raise BadSelection unless the shard's numbers make sense."""
    if shard.partition == "column":
        if not shard.column:
            raise BadSelection("a partition by column needs the name of a column")
    elif shard.total < 1 or not 0 <= shard.index < shard.total:
        raise BadSelection(
            f"a part must be between 0 and total - 1, got part {shard.index} of {shard.total}"
        )
    elif shard.partition == "dirichlet" and not shard.alpha > 0:
        raise BadSelection(f"alpha must be > 0, got {shard.alpha}")


class _Selected(NamedTuple):
    """An example, its value of the shard's column, and by what it is held out or not."""

    example: Example
    value: str
    identity: bytes


def _of_part(spec: DataSpec, found: Iterable[_Selected], key: bytes | None) -> list[Example]:
    """Return the examples of the spec's part: all, what is held out, or the rest."""
    if spec.part == "all":
        return [one.example for one in found]
    wanted = spec.part == "holdout"
    share = spec.holdout
    return [one.example for one in found if held_out(one.identity, share, key) == wanted]


_left_out: ContextVar[bool] = ContextVar("left out", default=False)
_Divided: TypeAlias = tuple[list[_Selected], dict[str, list[int]]]
_resident: tuple[Any, _Divided] | None = None


def _divided(spec: DataSpec, shard: Shard, model: ModelSpec) -> _Divided:
    """Return all selected examples of a data set, and the indices of every part by its name.

    The last data set that was split stays in memory while its source does not change: simulated
    clients are parts of one, and a process that trains many of them reads, validates and splits
    it once. A client that is no part leaves nothing behind.
    """
    global _resident
    whole = replace(shard, index=0, value="")  # what all parts have in common
    state = source_state(spec.uri)
    held = (spec.holdout > 0, spec.holdout_by)
    chosen = (sorted(spec.fields.items()), spec.labels, spec.unit, held, whole)
    key = (state, chosen, model.kind, model.labels)
    if state is not None and _resident is not None and _resident[0] == key:
        return _resident[1]
    found = _selected(replace(spec, shard=whole), model)
    divided = found, _parts(found, whole, model)
    if state is not None:
        _resident = key, divided
    return divided


def _parts(found: Sequence[_Selected], split: Shard, model: ModelSpec) -> dict[str, list[int]]:
    """Return the indices of every part, by the part's name."""
    if split.partition == "column":
        return splitting.column([one.value for one in found])
    if split.partition == "iid":
        parts = splitting.iid(len(found), split.total, split.seed)
    elif model.kind == "classification":
        labels = [one.example.label or 0 for one in found]
        parts = splitting.dirichlet(labels, split.total, split.alpha, split.seed)
    else:
        have = "has none" if model.kind == "causal-lm" else "has one for each word"
        raise BadSelection(
            f"a dirichlet partition needs a label for each record, and {model.kind} {have}; use iid"
        )
    return {f"part-{i}": part for i, part in enumerate(parts)}


def _selected(spec: DataSpec, model: ModelSpec) -> list[_Selected]:
    """Return the examples with the wanted labels, whatever part they are of."""
    unknown = sorted(set(spec.labels) - set(model.labels))
    if unknown:
        raise BadSelection(
            f"the label {unknown[0]!r} is selected, which is outside the label set "
            f"({listed(model.labels)})"
        )
    wanted = {model.labels.index(label) for label in spec.labels}
    column = spec.shard.column if spec.shard and spec.shard.partition == "column" else ""
    found = []
    for record in validated(spec, model, column):
        if record.example is None:
            if not _left_out.get():
                raise BadRecord(f"{record.place}: {record.problem}")
            continue
        chosen = _of_labels(record.example, wanted)
        if chosen is not None:
            found.append(_Selected(chosen, record.value, record.identity))
    return found


@contextmanager
def leaving_out_what_is_bad() -> Iterator[None]:
    """Within, a record that cannot be used is left out, as if it were not there.

    For a site whose data are private, and whose coordinator says which labels there are and what
    the records are for: that one of them is refused would tell of it, without noise.
    """
    before = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(before)


def _of_labels(example: Example, wanted: Set[int]) -> Example | None:
    """Return what of an example has the wanted labels, all where none is named; None if nothing.

    Words with other tags stay as what is around the others, and are neither learned nor scored.
    """
    if not wanted or example.label in wanted:
        return example
    tags = tuple(tag if tag in wanted else IGNORED for tag in example.tags)
    return replace(example, tags=tags) if wanted & set(tags) else None
