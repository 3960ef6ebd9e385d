"""Which initialisations PEFT's LoRA family has, and what is true of each: data, no computation.

PiSSA, OLoRA, CorDA and LoRA-GA take part of the base weight into the adapter. Where PEFT subtracts
it from the weight, weft leaves the base model as it is and puts the same part, negated, underneath
as a frozen **offset**: the function is the same, and one base model serves every adapter.

EVA, CorDA and LoRA-GA read data before the first round. What they make of them reaches every client
without noise, so that these must be data that everyone may see: a run names them as ``init_data``.

Left out: ``mica`` also freezes B, and is an adapter of its own. Arrow is a router over adapters
that are finished, not a beginning. QA-LoRA starts from GPTQ weights, which weft does not load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from strategies.plugins import BadOptions, Option, Range

if TYPE_CHECKING:
    from clients.data import Batch
    from clients.task_model import TaskModel


OFFSET = "offset/"
"""What the names of an offset's tensors begin with, where they travel with the adapter's."""


@dataclass(frozen=True, slots=True)
class Init:
    """One initialisation.

    Attributes:
        source: arXiv id, or empty.
        traits: capabilities that it adds to its adapter's. ``zero-b``: B starts at zero, so that A
            may still be redrawn; ``offset``: what the adapter starts with is taken out of the base;
            ``reads-data``: it reads ``init_data``; ``nf4-base``: it needs an nf4 base model;
            ``unquantised-base``: it needs one that is not quantised.
        options: what ``init_options`` may set, PEFT's own names.
    """

    source: str
    traits: frozenset[str] = frozenset()
    options: tuple[Option, ...] = ()


_EVA = (
    Option("rho", float, 2.0, Range(1)),
    Option("tau", float, 0.99, Range(0, 1)),
    Option("whiten", bool, False),
)
_CORDA = (Option("corda_method", Literal["ipm", "kpm"], "ipm"),)
_LORA_GA = (
    Option("direction", Literal["ArBr", "A2rBr", "ArB2r", "random"], "ArB2r"),
    Option("scale", Literal["stable", "weight_svd", "gd_scale", "unit"], "stable"),
    Option("stable_gamma", int, 16, Range(1)),
)
INITS: Mapping[str, Init] = {
    "kaiming": Init("2106.09685", frozenset({"zero-b"})),
    "gaussian": Init("2106.09685", frozenset({"zero-b"})),
    "orthogonal": Init(""),
    "pissa": Init("2404.02948", frozenset({"offset"})),
    "pissa_niter_N": Init("2404.02948", frozenset({"offset"})),
    "olora": Init("2406.01775", frozenset({"offset"})),
    "corda": Init("2406.05223", frozenset({"offset", "reads-data"}), _CORDA),
    "eva": Init("2410.07170", frozenset({"zero-b", "reads-data"}), _EVA),
    "lora_ga": Init(
        "2407.05000", frozenset({"offset", "reads-data", "unquantised-base"}), _LORA_GA
    ),
    "loftq": Init("2310.08659", frozenset({"nf4-base"})),
}
DRAWN = ("kaiming", "gaussian", "orthogonal")
"""Those that are random numbers alone, which attaching draws."""

TRAITS = frozenset().union(*(init.traits for init in INITS.values()))
"""Every capability that an initialisation may add."""

_REFUSED = {
    "mica": "also freezes B, and is an adapter of its own: set adapter to mica",
    "arrow": "routes between adapters that are finished, and starts none",
    "qalora": "starts from GPTQ weights, which weft does not load",
}
_PISSA_NITER = re.compile(r"pissa_niter_[1-9]\d{0,2}")


def init_of(name: str) -> Init:
    """Return what is true of the initialisation ``name``.

    >>> sorted(init_of("pissa_niter_4").traits)
    ['offset']

    Raises:
        BadOptions: if there is none; where PEFT has one that weft has not, with the reason.
    """
    known = "pissa_niter_N" if _PISSA_NITER.fullmatch(name) else name
    if known not in INITS or name == "pissa_niter_N":
        allowed = "one of " + ", ".join(repr(n) for n in INITS) + " (N: 1 to 999)"
        if name in _REFUSED:
            raise BadOptions(f"init {name!r} {_REFUSED[name]}; use {allowed}")
        raise BadOptions(f"init must be {allowed}, got {name!r}")
    return INITS[known]


def checked_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the initialisation ``name``, parsed, with every default filled in.

    Raises:
        BadOptions: naming the first that it has not, or does not take.
    """
    options = {option.name: option for option in init_of(name).options}
    unknown = sorted(given.keys() - options.keys())
    if unknown:
        allowed = ", ".join(options) or "none"
        raise BadOptions(f"init {name!r} has no option {unknown[0]!r} (options: {allowed})")
    return {
        key: option.parse(given[key]) if key in given else option.default
        for key, option in options.items()
    }


class InitOption(Option):
    """The option ``init``: a name of :data:`INITS`, or ``pissa_niter_N`` with a number for N."""

    def describe_type(self) -> str:
        """Return the names."""
        return "one of " + ", ".join(repr(name) for name in INITS)

    def parse(self, value: Any) -> Any:
        """Return ``value`` if there is such an initialisation; see :func:`init_of`."""
        init_of(str(value))
        return str(value)


@dataclass(frozen=True, slots=True)
class InitInputs:
    """What an adapter may look at when it makes its first tensors.

    Attributes:
        model: the whole task model: base, adapter and a freshly drawn head.
        batches: the data to read, in batches of at most so many examples, on the model's device;
            of none where the run names no ``init_data``.
        losses: the ``[batch]`` losses of a batch, with their graph.
        weight: a parameter of the base model by name, as its files have it, before quantisation.
    """

    model: TaskModel
    batches: Callable[[int], Sequence[Batch]]
    losses: Callable[[Batch], Tensor]
    weight: Callable[[str], Tensor]
