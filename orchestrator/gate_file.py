"""What a gate's file may say: a name's evaluation suite, and what is asked for each alias."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from pydantic import model_validator as checked

from clients import data
from orchestrator.config import BadConfig, read_document
from orchestrator.policy import Strict
from storage.refs import BadName, check_name

EVERY = "*"
"""What is asked for every alias that is not named."""

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")

_HASH = re.compile(r"[0-9a-f]{8,64}")
SET = re.compile(r"[a-z0-9][a-z0-9_-]{0,30}")


class TestData(Strict):
    """A data set of the suite; ``generate``: tokens at most of a causal model's answers.

    Or what clients hold out, whose scores are noised and charged: once for each version.
    """

    data: str | None = None
    fields: dict[str, str] = Field(default_factory=dict)
    labels: tuple[str, ...] = ()
    generate: int | None = Field(default=None, ge=1)
    clients: Literal["all"] | dict[str, str] | tuple[str, ...] | None = None
    epsilon: float | None = Field(default=None, gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    unit: str = Field(default="example", min_length=1, max_length=128)
    loss: float | None = Field(default=None, gt=0)

    @checked(mode="after")
    def _one_of(self) -> TestData:
        if (self.data is None) == (self.clients is None):
            raise ValueError("give either data, a URI, or clients: all, labels, names")
        if self.clients is not None and self.epsilon is None:
            raise ValueError(
                "what clients hold out is scored in noise alone; give epsilon, which each of them "
                "spends for each version that is asked about"
            )
        of_clients = (self.epsilon, self.delta, self.unit, self.loss)
        if self.clients is None and of_clients != (None, 1e-5, "example", None):
            raise ValueError("epsilon, delta, unit and loss are of clients' scores; leave them out")
        if self.clients is not None and (self.fields or self.labels or self.generate):
            raise ValueError("fields, labels and generate are of data; clients score all they hold")
        return self


class Bounds(Strict):
    """What a score must be. ``worse_by``: at most so much worse than the version there is now."""

    at_least: float | None = None
    at_most: float | None = None
    worse_by: float | None = Field(default=None, ge=0)

    @checked(mode="after")
    def _something(self) -> Bounds:
        if self.at_least is None and self.at_most is None and self.worse_by is None:
            raise ValueError("asks nothing; give at_least, at_most or worse_by")
        return self


class TasksCheck(Strict):
    """No data set of the suite may fall by more than ``tau``, as far as its size can tell.

    ``unclear``: what follows where it is too small to tell.
    """

    tau: float = Field(ge=0, le=1)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    metric: str = Field(default="accuracy", pattern="^(accuracy|task_accuracy|exact_match)$")
    unclear: str = Field(default="fail", pattern="^(fail|pass)$")


class SizeCheck(Strict):
    """How large what is served may be."""

    max_bytes: int | None = Field(default=None, ge=1)
    max_parameters: int | None = Field(default=None, ge=1)
    max_rank: int | None = Field(default=None, ge=1)

    @checked(mode="after")
    def _something(self) -> SizeCheck:
        if not any((self.max_bytes, self.max_parameters, self.max_rank)):
            raise ValueError("asks nothing; give max_bytes, max_parameters or max_rank")
        return self


def _hash(value: str) -> str:
    if not _HASH.fullmatch(value):
        raise ValueError(f"a base model's hash is 8 to 64 hex digits of it, got {value!r}")
    return value


class BaseCheck(Strict):
    """Of which base model. ``same``: of that of the version there is now."""

    same: bool = True
    hashes: tuple[Annotated[str, AfterValidator(_hash)], ...] = ()


class LicenceCheck(Strict):
    """Under which licence the base model must be, and what is known of models by their hash."""

    allowed: tuple[str, ...] = Field(min_length=1)
    known: dict[Annotated[str, AfterValidator(_hash)], str] = Field(default_factory=dict)


def _by(value: Any) -> Any:
    """Accept ``true`` for a signature by any trusted key."""
    return {} if value is True else value


class SignatureCheck(Strict):
    """Signed by a trusted key; ``by``: by one of these."""

    by: tuple[str, ...] = ()


class Ceiling(Strict):
    """The most that a version may have cost a population (``*``: each), at a unit and a δ."""

    population: str = EVERY
    unit: str
    delta: float = Field(gt=0, lt=1)
    at_most: float = Field(gt=0)


class Asked(Strict):
    """What is asked of a version before an alias is moved to it."""

    metrics: dict[str, dict[str, Bounds]] = Field(default_factory=dict)
    tasks: TasksCheck | None = None
    size: SizeCheck | None = None
    base: BaseCheck | None = None
    licences: LicenceCheck | None = None
    signature: Annotated[SignatureCheck | None, BeforeValidator(_by)] = None
    epsilon: tuple[Ceiling, ...] = ()

    @property
    def needs_scores(self) -> bool:
        """Whether anything is asked that must be evaluated."""
        return bool(self.metrics) or self.tasks is not None


def _data_set(value: Any) -> Any:
    """Accept a data URI for the data set of that URI."""
    return {"data": value} if isinstance(value, str) else value


class GateFile(Strict):
    """A gate's file."""

    suite: dict[str, Annotated[TestData, BeforeValidator(_data_set)]] = Field(default_factory=dict)
    aliases: dict[str, Asked] = Field(min_length=1)

    @property
    def places(self) -> dict[str, str]:
        """Where the suite's data sets are, by name; not of those that are asked of clients."""
        return {name: one.data for name, one in self.suite.items() if one.data}

    @checked(mode="after")
    def _consistent(self) -> GateFile:
        for name in self.suite:
            if not SET.fullmatch(name):
                raise ValueError(
                    f"suite: a data set is called by 1 to 31 of a-z, 0-9, '_' and '-', got {name!r}"
                )
        for alias, asked in self.aliases.items():
            if alias != EVERY:
                try:
                    check_name("alias", alias)
                except BadName as error:
                    raise ValueError(f"aliases: {error}") from None
            for name in asked.metrics:
                if name not in self.suite:
                    known = ", ".join(self.suite) or "none"
                    raise ValueError(
                        f"aliases.{alias}.metrics: {name!r} is no data set of the suite ({known})"
                    )
            if asked.tasks is not None and not self.suite:
                raise ValueError(f"aliases.{alias}.tasks: the suite has no data set; give some")
        return self

    def asked(self, alias: str) -> Asked | None:
        """Return what is asked for an alias; None for nothing."""
        return self.aliases.get(alias, self.aliases.get(EVERY))


def read_gate(path: str | Path) -> GateFile:
    """Return what a gate's file says, with absolute paths.

    Raises:
        BadConfig: if there is none, or with a line for each mistake.
    """
    found = parse_gate(read_document(path, "docs/deploying.md shows one"), str(path))
    suite = {
        name: one.model_copy(update={"data": one.data and data.absolute(one.data)})
        for name, one in found.suite.items()
    }
    return found.model_copy(update={"suite": suite})


def parse_gate(document: Mapping[str, Any], where: str = "the gate") -> GateFile:
    """Return what a gate's document says.

    Raises:
        BadConfig: with a line for each mistake.
    """
    try:
        return GateFile.model_validate(document)
    except ValidationError as error:
        lines = [_sentence(one) for one in error.errors()]
        raise BadConfig("\n".join(f"{where}: {line}" for line in lines)) from None


def _sentence(error: Any) -> str:
    """Return one of pydantic's errors as a line: where, what is wrong, what is allowed."""
    place, message = error["loc"], str(error["msg"]).removeprefix("Value error, ")
    where = ".".join(str(part) for part in place)
    before = f"{where}: " if where else ""
    if error["type"] == "extra_forbidden":
        known = _options(place[:-1])
        close = difflib.get_close_matches(str(place[-1]), known, n=1)
        return f"{before}there is no such option" + (
            f"; did you mean {close[0]!r}?" if close else f" (options: {', '.join(known)})"
        )
    if error["type"] == "missing":
        return f"{before}is required"
    if error["type"] == "value_error":
        return before + message
    return f"{before}{message[:1].lower()}{message[1:]}, got {error['input']!r}"


_SECTIONS: dict[str, type[BaseModel]] = {
    "tasks": TasksCheck,
    "size": SizeCheck,
    "base": BaseCheck,
    "licences": LicenceCheck,
    "signature": SignatureCheck,
    "epsilon": Ceiling,
}


def _options(place: tuple[Any, ...]) -> list[str]:
    """Return what may stand at a place of the file."""
    owner: type[BaseModel] = GateFile
    if place[:1] == ("suite",):
        owner = TestData
    elif place[:1] == ("aliases",):
        owner = Asked if len(place) == 2 else _SECTIONS.get(str(place[2]), Bounds)
    return list(owner.model_fields)
