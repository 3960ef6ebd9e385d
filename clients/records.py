"""From a record as it stands in its source to an example that a model can take.

Every record is validated. A message says what is wrong and where, by names of fields, and never
what a record's text says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clients.assignment import DataSpec, ModelSpec
from clients.examples import Example
from clients.holdout import identity
from clients.sources import Source, open_source
from clients.tags import BadTags, is_bio, joined, refuse_broken, spans_to_tags

COLUMNS = ("text", "text_pair", "label", "prompt", "completion", "tokens", "tags", "spans")
_TEXTS = ("text", "text_pair", "prompt", "completion")


_SURROGATE = re.compile("[\ud800-\udfff]")  # what a tokenizer cannot take


class BadSelection(ValueError):
    """A data spec asks for columns, labels or a part that its data set does not have."""


class _Problem(Exception):
    """What is wrong with one record."""


@dataclass(frozen=True, slots=True)
class Validated:
    """What became of one record.

    Attributes:
        place: of the record, such as ``notes.jsonl, line 17``.
        example: None if the record is bad.
        value: of the column that was asked for; without a model, the label as it is written.
        problem: what is wrong with a bad record, or empty.
        identity: by what it is held out or not, where the spec splits a holdout off; else empty.
    """

    place: str
    example: Example | None = None
    value: str = ""
    problem: str = ""
    identity: bytes = b""


def validated(spec: DataSpec, model: ModelSpec | None, column: str = "") -> Iterator[Validated]:
    """Yield what became of every record of ``spec.uri``, in order, whatever the spec selects.

    Args:
        spec: the data set.
        model: what the records are for; without one, any record that has a text is good.
        column: the source's own name of a column whose values are wanted, or empty.

    Raises:
        BadDataURI, BadRecord, DataNotFound, MissingExtra: as :func:`clients.sources.open_source`.
        BadSelection: for a mapping of a column that weft does not have.
    """
    source = _opened(spec)
    for record in source.records:
        place = f"{source.name}, {source.unit} {record.number}"
        if record.problem:
            yield Validated(place, problem=record.problem)
            continue
        columns = _Columns(record.fields, spec.fields, source)
        try:
            example = columns.example(model)
            if spec.unit:
                example = replace(example, unit=columns.value(spec.unit, "that says whose it is"))
            value = columns.value(column, "to split by") if column else ""
            shown = value if model else columns.written_label()
            known_by = columns.identity(spec.holdout_by) if spec.holdout else b""
            outcome = Validated(place, example, shown, identity=known_by)
        except _Problem as problem:
            outcome = Validated(place, problem=str(problem))
        yield outcome


def forms(spec: DataSpec) -> Iterator[Example]:
    """Yield every record of ``spec.uri`` in each form in which a run could train on it.

    One may have a text, tokens, and a prompt with its completion, all of the same person. What is
    no record is left out.

    Raises:
        BadDataURI, BadRecord, DataNotFound, MissingExtra, BadSelection: as :func:`validated`.
    """
    source = _opened(spec)
    for record in source.records:
        columns = _Columns(record.fields, spec.fields, source)
        for form in (columns.answered, columns.plain, columns.tokenised):
            try:
                example = form()
                if spec.unit:
                    unit = columns.value(spec.unit, "that says whose it is")
                    example = replace(example, unit=unit)
            except _Problem:
                continue
            yield example


def _opened(spec: DataSpec) -> Source:
    unknown = sorted(set(spec.fields) - set(COLUMNS))
    if unknown:
        raise BadSelection(f"no column is called {unknown[0]!r} (columns: {', '.join(COLUMNS)})")
    return open_source(spec.uri)


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of one record, by weft's names."""

    record: Mapping[str, Any]
    names: Mapping[str, str]
    source: Source

    def has(self, column: str) -> bool:
        """Whether a column that may be left out is there; one that was mapped may not."""
        name = self.names.get(column, column)
        return column in self.names or self.record.get(name) is not None

    def get(self, column: str) -> Any:
        name = self.names.get(column, column)
        if name not in self.record:
            have = listed([str(key) for key in self.record])
            hint = "" if column in self.names else f"; map it with --fields {column}=NAME"
            raise _Problem(f"has no field {name!r} (fields: {have}){hint}")
        return self.record[name]

    def example(self, model: ModelSpec | None) -> Example:
        generative = model is not None and model.kind == "causal-lm"
        if (generative or model is None) and (self.has("prompt") or self.has("completion")):
            return self.answered()
        if generative:
            return Example(self.text("text"))
        if model is not None and model.kind == "token-classification":
            return self.tagged(model.labels)
        if model is None and self.has("tokens") and not self.has("text"):
            return self.tokenised()
        return self.plain(None if model is None else model.labels)

    def answered(self) -> Example:
        return Example(prompt=self.text("prompt"), completion=self.text("completion"))

    def plain(self, labels: tuple[str, ...] | None = None) -> Example:
        return Example(
            text=self.text("text"),
            text_pair=self.text("text_pair") if self.has("text_pair") else None,
            label=None if labels is None else self.label(labels),
        )

    def tokenised(self) -> Example:
        text, words = joined(self.tokens())
        return Example(text, words=words)

    def tagged(self, labels: tuple[str, ...]) -> Example:
        """Return the example of a record with tokens and tags, or with text and spans."""
        try:
            if self.has("spans") and not self.has("tokens"):
                text = self.text("text")
                words, names = spans_to_tags(text, self.list_of("spans"), labels)
                tags = tuple(self.index(name, labels) for name in names)
                return Example(text, words=words, tags=tags)
            text, words = joined(self.tokens())
            values = self.list_of("tags")
            if len(values) != len(words):
                raise _Problem(
                    f"has {len(words)} tokens and {len(values)} tags; one each is needed"
                )
            tags = tuple(self.index(value, labels) for value in values)
            if is_bio(labels):
                refuse_broken([labels[tag] for tag in tags])
        except BadTags as error:
            raise _Problem(str(error)) from None
        return Example(text, words=words, tags=tags)

    def tokens(self) -> list[str]:
        values = self.list_of("tokens")
        if not values:
            raise _Problem(f"the field {self.names.get('tokens', 'tokens')!r} is empty")
        return [self.checked_text(value, f"token {i}") for i, value in enumerate(values, start=1)]

    def list_of(self, column: str) -> list[Any]:
        value, name = self.get(column), self.names.get(column, column)
        if not isinstance(value, list):
            kind = type(value).__name__ if value is not None else "null"
            hint = "" if self.source.typed else "; CSV has no lists, use jsonl or parquet"
            raise _Problem(f"the field {name!r} must be a list, got {kind}{hint}")
        return value

    def written_label(self) -> str:
        value = self.get("label") if self.has("label") else None
        return "" if value is None else _shown(value, str(value))

    def text(self, column: str) -> str:
        return self.checked_text(self.get(column), f"the field {self.names.get(column, column)!r}")

    def checked_text(self, value: Any, what: str) -> str:
        if value is None or value == "":
            raise _Problem(f"{what} is empty")
        if not isinstance(value, str):
            raise _Problem(f"{what} must be text, got {type(value).__name__}")
        if not value.strip():
            raise _Problem(f"{what} is empty")
        if _SURROGATE.search(value):
            raise _Problem(f"{what} is not UTF-8")
        return value

    def label(self, labels: tuple[str, ...]) -> int:
        return self.index(self.get("label"), labels)

    def index(self, value: Any, labels: tuple[str, ...]) -> int:
        """Return the index of a label that is given by its name or its index."""
        if isinstance(value, str) and value in labels:
            return labels.index(value)
        # In CSV everything is text: what is no name may be an index.
        untyped = isinstance(value, str) and not self.source.typed
        index = int(value) if untyped and re.fullmatch(r"\d{1,9}", value) else value
        if isinstance(index, bool) or not isinstance(index, (int, str)):
            kind = type(index).__name__ if index is not None else "null"
            raise _Problem(f"the label must be a name or an index, got {kind}")
        if isinstance(index, str) or not 0 <= index < len(labels):
            raise _Problem(
                f"label {_shown(value, repr(value))} is outside the label set ({listed(labels)})"
            )
        return index

    def identity(self, column: str) -> bytes:
        """Return by what the record is held out or not: whose it is, or what it says."""
        if column:
            return identity([self.value(column, "to hold out by")])
        names = [name for name in _TEXTS if self.has(name)]
        return identity([self.text(name) for name in names] or [joined(self.tokens())[0]])

    def value(self, column: str, purpose: str) -> str:
        if column not in self.record:
            have = listed([str(key) for key in self.record])
            raise _Problem(f"has no field {column!r} {purpose} (fields: {have})")
        value = self.record[column]
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            kind = type(value).__name__ if value is not None else "null"
            raise _Problem(f"the field {column!r} {purpose} must be text or an integer, got {kind}")
        return str(value)


def _shown(label: object, written: str) -> str:
    """Return a label as written; what is too long for a label may be somebody's text."""
    return written if len(written) <= 40 else f"of {len(str(label))} characters"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names for a message: the first few, each of bounded length."""
    shown = ", ".join(name if len(name) <= 40 else f"{name[:37]}…" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
