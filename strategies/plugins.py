"""The only registry: a family finds plug-ins of one kind by looking in a folder.

Adding a plug-in is one new file and no edit. A module ``o_lora.py`` that defines a callable whose
name is the module's, case and underscores aside (``OLoRA``), *is* the plug-in ``o-lora``: the
callable's signature is its option schema and the first line of its docstring its summary. A module
that stands for many (PEFT's methods) defines ``plugins()`` returning them. Third parties register a
module under the entry point group ``weft.KIND``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal, Union


class UnknownPlugin(LookupError):
    """No plug-in has this name."""


class BadOptions(ValueError):
    """A plug-in was given an option it does not have, or a value it does not take."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a numeric option, for ``Annotated[float, Range(0, 1)]``.

    Attributes:
        low: smallest value.
        high: largest value.
        open_low: whether ``low`` itself is excluded.
        open_high: whether ``high`` itself is excluded.
    """

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"{'>' if self.open_low else '>='} {self.low:g}"
        high = f"{'<' if self.open_high else '<='} {self.high:g}"
        bounds = [low] if self.low > float("-inf") else []
        bounds += [high] if self.high < float("inf") else []
        return " and ".join(bounds)


@dataclass(frozen=True, slots=True)
class Form:
    """What an option in words must look like, for ``Annotated[str, Form(...)]``.

    Attributes:
        pattern: regular expression, matched with ``re.fullmatch``.
        text: the same for people, such as ``examples, uniform or label:NAME``.
    """

    pattern: str
    text: str


@dataclass(frozen=True, slots=True)
class Nested:
    """Marks an option that is a plug-in of the same family: ``Annotated[Strategy, Nested()]``.

    It is written as a name, or as a mapping with ``name`` and options; the factory is given what
    that plug-in builds.
    """


_EMPTY = inspect.Parameter.empty
_SOURCE = re.compile(r"(?:arXiv[: ]?)?(\d{4}\.\d{4,5})")


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a plug-in.

    Attributes:
        name: as it is written in a config.
        type: its annotation, without ``Annotated``.
        default: its default, or ``inspect.Parameter.empty`` where it is required.
        range: numeric bounds, or None.
        nested: whether it is a plug-in of the same family.
        form: what a text must look like, or None.
    """

    name: str
    type: Any
    default: Any
    range: Range | None = None
    nested: bool = False
    form: Form | None = None

    @property
    def required(self) -> bool:
        """Whether a config must give it."""
        return self.default is _EMPTY

    def describe_type(self) -> str:
        """Return the type in words: ``int >= 1``, ``one of 'a', 'b'``."""
        if self.nested:
            return f"{_type_text(self.type).lower()}, by name or with its options"
        if self.form:
            return self.form.text
        text = _type_text(self.type)
        return f"{text} {self.range}" if self.range else text

    def parse(self, value: Any) -> Any:
        """Return ``value`` as the option's type.

        Raises:
            BadOptions: if it is of another type or out of range.
        """
        try:
            parsed = _parse(self.type, value)
        except TypeError:
            message = f"{self.name} must be {self.describe_type()}, got {value!r}"
            raise BadOptions(message) from None
        numeric = isinstance(parsed, (int, float)) and not isinstance(parsed, bool)
        if self.range is not None and numeric and parsed not in self.range:
            raise BadOptions(f"{self.name} must be {self.range}, got {value!r}")
        if self.form is not None and not re.fullmatch(self.form.pattern, str(parsed)):
            raise BadOptions(f"{self.name} must be {self.form.text}, got {value!r}")
        return parsed


def _type_text(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _type_text(args[0])
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type_text(a) for a in args)
    if origin in (list, tuple, Sequence):
        return "list of " + _type_text(args[0])
    if origin in (dict, Mapping):
        return "mapping"
    return getattr(kind, "__name__", str(kind))


def _parse(kind: Any, value: Any) -> Any:  # noqa: C901  (one branch a type)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _parse(args[0], value)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args if a == value}:
            return value
        raise TypeError
    if origin in (Union, types.UnionType):
        for arm in args:
            try:
                return _parse(arm, value)
            except TypeError:
                continue
        raise TypeError
    if origin in (list, tuple, Sequence):
        if not isinstance(value, (list, tuple)):
            raise TypeError
        items = [_parse(args[0], item) for item in value]
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError
        return {_parse(args[0], k): _parse(args[1], v) for k, v in value.items()}
    if kind in (None, type(None)):
        if value is None:
            return None
        raise TypeError
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError
        try:
            return float(value)
        except OverflowError:  # a whole number that no float can hold
            raise TypeError from None
    if isinstance(value, bool) and kind is not bool:
        raise TypeError
    if isinstance(value, kind):
        return value
    raise TypeError


def _default_factories(factory: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    """Return the default factories of a dataclass's fields: its signature does not tell them."""
    if not is_dataclass(factory):
        return {}
    return {f.name: f.default_factory for f in fields(factory) if f.default_factory is not MISSING}


@dataclass(frozen=True)
class Plugin:
    """One plug-in of a family.

    Attributes:
        kind: the family's kind, such as ``"strategy"``.
        name: as it is written in a config, in kebab case.
        factory: what :meth:`build` calls.
        summary: one line.
        source: arXiv id of the method, or empty.
        context: leading parameters of the factory that are not options.
        explicit_options: options where the factory's signature does not tell them.
        family: where nested plug-ins are found.
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    summary: str
    source: str = ""
    context: tuple[str, ...] = ()
    explicit_options: tuple[Option, ...] | None = field(default=None)
    family: Family | None = field(default=None, repr=False, compare=False)

    @cached_property
    def options(self) -> Mapping[str, Option]:
        """The options by name, in the order of the signature."""
        if self.explicit_options is not None:
            return {option.name: option for option in self.explicit_options}
        target: Any = self.factory
        if inspect.isclass(target) and not is_dataclass(target):
            target = target.__init__
        # a dataclass by its fields: an inherited one is annotated with the names of its own module
        hints = typing.get_type_hints(target, include_extras=True)
        made = _default_factories(self.factory)
        found: dict[str, Option] = {}
        for name, parameter in inspect.signature(self.factory).parameters.items():
            if name in self.context:
                continue
            hint, bounds, nested, form = hints.get(name, Any), None, False, None
            if typing.get_origin(hint) is Annotated:
                bounds = next((m for m in hint.__metadata__ if isinstance(m, Range)), None)
                nested = any(isinstance(m, Nested) for m in hint.__metadata__)
                form = next((m for m in hint.__metadata__ if isinstance(m, Form)), None)
                hint = typing.get_args(hint)[0]
            default = made[name]() if name in made else parameter.default
            if nested and is_dataclass(default):
                default = _as_written(default)
            found[name] = Option(name, hint, default, bounds, nested, form)
        return found

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``options`` parsed, with every default filled in.

        Raises:
            BadOptions: naming the first option that is unknown, missing or wrong.
        """
        for name in options:
            if name not in self.options:
                close = difflib.get_close_matches(name, self.options, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                allowed = ", ".join(self.options) or "none"
                raise BadOptions(
                    f"{self.kind} {self.name!r} has no option {name!r}{hint} (options: {allowed})"
                )
        parsed = {}
        for name, option in self.options.items():
            if option.required and name not in options:
                wanted = f"{name!r} ({option.describe_type()})"
                raise BadOptions(f"{self.kind} {self.name!r} needs the option {wanted}")
            value = options.get(name, option.default)
            try:
                if option.nested:
                    parsed[name] = self._nested(value)
                else:
                    parsed[name] = option.parse(value) if name in options else value
            except (BadOptions, UnknownPlugin) as error:
                raise BadOptions(f"{self.kind} {self.name!r}: {error}") from None
        return parsed

    def _nested(self, value: Any) -> dict[str, Any]:
        """Return a nested plug-in as a mapping of its name and all of its options."""
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
            raise BadOptions(
                f"{value!r} names no {self.kind}; give a name, or a mapping with name and options"
            )
        assert self.family is not None  # only what a family found has nested options
        plugin = self.family.get(given["name"])
        return {
            "name": plugin.name,
            **plugin.check({k: v for k, v in given.items() if k != "name"}),
        }

    def build(self, *context: Any, **options: Any) -> Any:
        """Return ``factory(*context, **options)`` with checked options.

        Raises:
            BadOptions: as :meth:`check`, and for a combination that the factory refuses.
        """
        checked = self.check(options)
        for name, option in self.options.items():
            if option.nested and self.family is not None:
                inner = dict(checked[name])
                checked[name] = self.family.get(inner.pop("name")).build(**inner)
        try:
            return self.factory(*context, **checked)
        except ValueError as error:
            raise BadOptions(f"{self.kind} {self.name!r}: {error}") from error


def _as_written(built: Any) -> dict[str, Any]:
    """Return a plug-in that is built already as a config names it."""
    options = {f.name: getattr(built, f.name) for f in fields(built)}
    return {"name": _name(type(built).__module__), **options}


def _name(module: str) -> str:
    """Return the name of the plug-in that a module is."""
    return module.rpartition(".")[2].replace("_", "-")


class Family:
    """The plug-ins of one kind: those of a folder, and those of installed entry points.

    Args:
        kind: singular noun, such as ``"strategy"``; entry points are read from ``weft.KIND``.
        package: importable package whose modules are looked at.
        context: leading parameters of the factories that are not options.
    """

    def __init__(self, kind: str, package: str, context: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self._package = package
        self._context = context

    @cached_property
    def _plugins(self) -> dict[str, Plugin]:
        package = importlib.import_module(self._package)
        modules = [
            importlib.import_module(f"{self._package}.{info.name}")
            for info in pkgutil.iter_modules(package.__path__)
            if not info.ispkg
        ]
        modules += [entry.load() for entry in entry_points(group=f"weft.{self.kind}")]
        found: dict[str, Plugin] = {}
        for plugin in (p for module in modules for p in self._of(module)):
            if plugin.name in found:
                raise RuntimeError(f"two plug-ins are called {self.kind} {plugin.name!r}")
            found[plugin.name] = plugin
        return dict(sorted(found.items()))

    def _of(self, module: types.ModuleType) -> Iterable[Plugin]:
        many = getattr(module, "plugins", None)
        if callable(many):
            yield from many()
            return
        stem = _name(module.__name__)
        wanted = stem.replace("-", "").lower()
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if own and callable(value) and name.replace("_", "").lower() == wanted:
                text = f"{module.__doc__ or ''}\n{value.__doc__ or ''}"
                source = _SOURCE.search(text)
                yield Plugin(
                    kind=self.kind,
                    name=stem,
                    factory=value,
                    summary=(inspect.getdoc(value) or "").partition("\n")[0],
                    source=source[1] if source else "",
                    context=self._context,
                    family=self,
                )

    def names(self) -> tuple[str, ...]:
        """Return the names of all plug-ins, sorted."""
        return tuple(self._plugins)

    def get(self, name: str) -> Plugin:
        """Return the plug-in called ``name`` (underscores and case do not matter).

        Raises:
            UnknownPlugin: if there is none; the message names the nearest.
        """
        plugin = self._plugins.get(name.lower().replace("_", "-"))
        if plugin is None:
            close = difflib.get_close_matches(name, self._plugins, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f" ({', '.join(self._plugins)})"
            raise UnknownPlugin(f"no {self.kind} is called {name!r}{hint}")
        return plugin
