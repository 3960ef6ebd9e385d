"""A sweep: one YAML file that stands for many runs, a grid of settings times seeds.

The names of its runs follow from what they are, so that the same file, or one with more in its
grid, finds those that there are and adds only what is missing.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from orchestrator.config import (
    BadConfig,
    RunConfig,
    parse_config,
    read_document,
    with_values,
)
from orchestrator.policy import Strict
from storage.canonical import canonical_json

LABEL = "sweep"
"""The label of a sweep's runs, whose value is the sweep's name."""
NO_RESULT = ("name", "seed", "backend", "loggers", "notify")
"""Keys of a run's file that are not what a setting is: they change no result, or are the seed."""


def _seeds(value: Any) -> Any:
    """Accept ``seeds: 3`` for 0, 1, 2."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return tuple(range(value)) if whole else value


class Sweep(Strict):
    """A sweep's file. ``base`` is a run's file, by its path from this one, or what is in one."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,39}$")
    base: str | dict[str, Any]
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    seeds: Annotated[tuple[int, ...], BeforeValidator(_seeds)] = Field(default=(0,), min_length=1)
    only: tuple[dict[str, Any], ...] = ()
    skip: tuple[dict[str, Any], ...] = ()
    max_runs: int = Field(default=100, ge=1, le=10_000)


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep.

    Attributes:
        values: what the grid chose, by dotted key.
        seed: the run's seed.
        config: the run's whole config; its name follows from the rest of it.
    """

    values: Mapping[str, Any]
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.name


def load_sweep(path: str | Path) -> tuple[str, list[Point]]:
    """Return a sweep's name and its runs, each with its config checked, in the grid's order.

    Raises:
        BadConfig: with a line for each mistake, of the file or of any run.
    """
    file = Path(path)
    try:
        sweep = Sweep.model_validate(read_document(file, "docs/sweeps.md shows one"))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise BadConfig("\n".join(f"{file}: {line}" for line in lines)) from None
    base = sweep.base
    document = read_document(file.parent / base) if isinstance(base, str) else base
    return sweep.name, points(sweep, document)


def points(sweep: Sweep, document: Mapping[str, Any]) -> list[Point]:
    """Return the runs of a sweep over the base config in ``document``.

    Raises:
        BadConfig: with a line for each mistake.
    """
    if problems := list(_problems(sweep)):
        raise BadConfig("\n".join(problems))
    chosen = list(_chosen(sweep))
    count = len(chosen) * len(sweep.seeds)
    if count == 0:
        raise BadConfig("only and skip leave no run of the grid; leave one of them out")
    if count > sweep.max_runs:
        raise BadConfig(
            f"the sweep has {count} runs ({len(chosen)} settings, {len(sweep.seeds)} seeds), more "
            f"than its max_runs, {sweep.max_runs}; choose with only and skip, or raise max_runs"
        )
    wrong: dict[str, list[str]] = {}
    found: list[Point] = []
    settings: dict[str, Mapping[str, Any]] = {}
    for values in chosen:
        try:
            made = parse_config(with_values({**document, "name": sweep.name}, values))
        except BadConfig as error:
            wrong.setdefault(str(error), []).append(described(values))
            continue
        setting = _digest(made)
        if setting in settings:
            same = f"{described(settings[setting])} and {described(values)} are the same run"
            wrong.setdefault(f"{same}; leave one out of the grid", []).append("grid")
        settings[setting] = values
        for seed in sweep.seeds:
            name = f"{sweep.name}-{setting}-s{seed}"
            found.append(Point(values, seed, made.model_copy(update={"name": name, "seed": seed})))
    refuse_all(wrong)
    return found


def refuse_all(wrong: Mapping[str, Sequence[str]]) -> None:
    """Refuse what is wrong, if anything: each mistake once, with where it is.

    Raises:
        BadConfig: with the lines of each.
    """
    if not wrong:
        return
    lines = []
    for message, where in wrong.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        lines += [f"{where[0]}{more}: {line}" for line in message.splitlines()]
    raise BadConfig("\n".join(lines))


def described(values: Mapping[str, Any]) -> str:
    """Return what the grid chose in one line.

    >>> described({"optimizer.lr": 0.1, "strategy": {"name": "fedsvd", "every": 2}})
    'optimizer.lr=0.1, strategy=fedsvd(every=2)'
    """
    return ", ".join(f"{key}={shown(value)}" for key, value in values.items()) or "the base"


def shown(value: Any) -> str:
    """Return one value of a config as people read it.

    >>> shown(["fp16", {"name": "top-k", "options": {"share": 0.1}}])
    'fp16 + top-k(share=0.1)'
    """
    if isinstance(value, Mapping):
        inner = value.get("options", {k: v for k, v in value.items() if k != "name"})
        options = ", ".join(f"{k}={shown(v)}" for k, v in inner.items())
        named = str(value.get("name", ""))
        return f"{named}({options})" if options else named or "{}"
    if isinstance(value, (list, tuple)):
        return " + ".join(shown(one) for one in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return str(value)


def _chosen(sweep: Sweep) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*sweep.grid.values()):
        point = dict(zip(sweep.grid, values, strict=True))
        wanted = not sweep.only or any(_fits(point, rule) for rule in sweep.only)
        if wanted and not any(_fits(point, rule) for rule in sweep.skip):
            yield point


def _fits(point: Mapping[str, Any], rule: Mapping[str, Any]) -> bool:
    """Whether a point has all of a rule's values; a plug-in's name stands for all its options."""
    return all(value in (point[key], _named(point[key])) for key, value in rule.items())


def _named(value: Any) -> Any:
    return value.get("name", value) if isinstance(value, Mapping) else value


def _problems(sweep: Sweep) -> Iterator[str]:
    if len(set(sweep.seeds)) < len(sweep.seeds):
        yield "seeds: one is given twice"
    for key, values in sweep.grid.items():
        if key.partition(".")[0] in ("name", "seed"):
            yield f"grid.{key}: a run's name follows from its setting, and seeds are in seeds"
        elif not all(key.split(".")):
            yield f"grid.{key}: a key is a dotted path, such as optimizer.lr"
        if not values:
            yield f"grid.{key}: has no values; give a list of at least one"
    yield from _choice_problems(sweep)


def _choice_problems(sweep: Sweep) -> Iterator[str]:
    for kind, rule in [*(("only", r) for r in sweep.only), *(("skip", r) for r in sweep.skip)]:
        for key, value in rule.items():
            if key not in sweep.grid:
                allowed = ", ".join(sweep.grid) or "none"
                yield f"{kind}: {key!r} is no key of the grid ({allowed})"
            elif not any(_fits({key: one}, {key: value}) for one in sweep.grid[key]):
                yield f"{kind}: {key} is nowhere {shown(value)} in the grid"


def said(value: Any) -> Any:
    """Return a document without keys that say nothing.

    So what a later weft adds is no other setting until it is used.
    A plug-in's options stay whole, because one that is None may have another default.
    """
    if not isinstance(value, Mapping) or "options" in value:
        return value
    found = {key: said(inner) for key, inner in value.items()}
    return {key: inner for key, inner in found.items() if inner not in (None, {}, [])}


def _digest(config: RunConfig) -> str:
    """Return eight digits that follow from a setting: all of a config that decides its results."""
    setting = said(config.model_dump(mode="json", exclude=set(NO_RESULT)))
    return hashlib.sha256(canonical_json(setting, "a setting").encode()).hexdigest()[:8]
