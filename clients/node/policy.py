"""What a site does not do, whoever asks: each refusal is a sentence, and holds no data.

An order is judged by what it says and by node.yaml alone, never by the data: that it was refused
tells nothing of them. What an order says of privacy must be what it gets: noise that somebody else
knows, or makes, hides nothing from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clients.assignment import Assignment
from clients.node.ledger import Budget, Protection
from clients.node.settings import DataSet, Policy, Settings
from clients.orders import Terms

_SITE = "site:"
_MOST = 1e6  # of a number in an adapter or a head
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,2})?")


class Refused(ValueError):
    """The site does not do what was asked; the sentence is for whoever asked."""


class Late(Refused):
    """The order's time is over, here; asked again, it may have more."""


@dataclass(frozen=True, slots=True)
class Versions:
    """What is installed at the site.

    Attributes:
        weft: version of weft.
        flwr: of Flower.
    """

    weft: str
    flwr: str


@dataclass(frozen=True, slots=True)
class Allowed:
    """How an assignment may be done.

    Attributes:
        data_set: its name at the site.
        population: whose data it is.
        protection: what hides the data from whoever gets the answer.
        budget: of the population.
    """

    data_set: str
    population: str
    protection: Protection
    budget: Budget


def allowed(
    asked: Assignment, terms: Terms, settings: Settings, versions: Versions, now: float
) -> Allowed:
    """Return how an assignment may be done, as it came: its data by name, its model by hash.

    Args:
        asked: what is asked.
        terms: the rest of the order.
        settings: of the node.
        versions: of the node.
        now: Unix time, seconds.

    Raises:
        Refused: if it may not be done.
    """
    if not terms.deadline > now:
        raise Late("the order's deadline is past; if it is not, set the clocks right")
    _refuse_versions(terms, versions)
    name = _data_set(asked, settings)
    data, policy = settings.data[name], settings.policy
    for problem in _problems(asked, terms, data, settings):
        raise Refused(f"{settings.client(name)} does not do this: {problem}")
    protection = _protection(asked, data, policy)
    if protection == "none" and not policy.without_privacy:
        raise Refused(f"{settings.client(name)} does not do this: {_unprotected(asked)}")
    limited = not data.public
    return Allowed(
        data_set=name,
        population=settings.population(name),
        protection=protection,
        budget=Budget(
            data.delta,
            data.epsilon if limited else None,
            policy.max_epsilon_per_run if limited else None,
            policy.trust_coordinator_noise,
        ),
    )


def refuse_extremes(asked: Assignment) -> None:
    """Refuse tensors of numbers beyond all that is trained: clipping is by numbers of 32 bits.

    Args:
        asked: with its whole broadcast.

    Raises:
        Refused: naming one.
    """
    for group in (asked.broadcast.tensors, asked.underlay):
        for name, tensor in sorted(group.items()):
            odd = tensor.is_floating_point() and tensor.numel() and not tensor.abs().max() <= _MOST
            if odd:
                raise Refused(
                    f"{_shown(name)} has a number beyond {_MOST:g}, or one that is none; rounding "
                    "could hide from clipping what such numbers make of an example"
                )


def _refuse_versions(terms: Terms, own: Versions) -> None:
    for name, theirs, ours in (("weft", terms.weft, own.weft), ("flwr", terms.flwr, own.flwr)):
        if _minor(theirs) != _minor(ours):
            raise Refused(
                f"the coordinator has {name} {_shown(theirs)} and this site {ours}, which "
                f"must be of one minor version; install {name} {_minor(theirs)} here, or "
                f"{_minor(ours)} there"
            )


def _minor(version: str) -> str:
    """Return a version's MAJOR.MINOR, as far as it has them."""
    found = re.match(r"\d{1,6}\.\d{1,6}", version)
    return found.group() if found else _shown(version)


def _data_set(asked: Assignment, settings: Settings) -> str:
    """Return the name of the data set that an order means.

    Raises:
        Refused: if it is none of this node's, or the order is for another client.
    """
    name = asked.data.uri.removeprefix(_SITE)
    if not asked.data.uri.startswith(_SITE):
        raise Refused("an order names data as the site does, site:NAME, and never by a place")
    if name not in settings.data:
        raise Refused(f"{settings.name} has no data set called {_shown(name)}")
    if asked.client != settings.client(name):
        raise Refused(
            f"the order is for {_shown(asked.client)}, and data set {name} here is that of "
            f"{settings.client(name)}"
        )
    return name


def _problems(asked: Assignment, terms: Terms, data: DataSet, settings: Settings) -> Iterator[str]:
    """Yield what keeps an order from being done, whatever hides its data."""
    policy = settings.policy
    if asked.action == "init":
        yield "an adapter's first tensors are made by the coordinator, of public data"
    if asked.data.shard is not None:
        yield "its data are taken whole, and the order names a part of them as in a simulation"
    split = (asked.data.part, asked.data.holdout, asked.data.holdout_by)
    if split != _split(asked, data):
        yield (
            f"node.yaml holds {data.holdout:g} of its data out by {data.unit or 'record'}, which "
            "are scored on and never trained on, and the order splits them otherwise"
        )
    if asked.public and not data.public:
        yield "the order takes the data as public, and node.yaml does not say that they are"
    if asked.model.hash not in settings.models:
        yield (
            f"the base model {asked.model.hash[:12]}… is none of node.yaml's models; have the "
            "site's owner add the line that weft node models FOLDER prints there"
        )
    yield from _unlisted("adapter", asked.adapter.name, policy.adapters)
    yield from _unlisted("strategy", terms.strategy, policy.strategies)
    yield from _too_much(asked, policy)
    if not _DEVICE.fullmatch(asked.device):
        yield "it computes on cpu or cuda"
    if not data.public:
        yield from _false_privacy(asked, data, policy)


def _split(asked: Assignment, data: DataSet) -> tuple[str, float, str]:
    """Return which part of its data an order must ask for, what is held out, and by what."""
    if not data.holdout:
        return "all", 0.0, ""
    return "holdout" if asked.action == "evaluate" else "train", data.holdout, data.unit


def _unlisted(what: str, name: str, known: Sequence[str] | None) -> Iterator[str]:
    if known is not None and name not in known:
        listed = ", ".join(known) or "none"
        yield f"node.yaml does not allow the {what} {_shown(name)} (allowed: {listed})"


def _too_much(asked: Assignment, policy: Policy) -> Iterator[str]:
    """Yield what would take more time or memory than the site gives."""
    told = asked.privacy.report if asked.privacy else None
    numbers = {
        "steps": ((asked.steps or 0) + (told.steps if told else 0), policy.max_steps),
        "epochs": (asked.epochs if asked.steps is None else 0, policy.max_epochs),
        "batch_size": (asked.batch_size, policy.max_batch_size),
        "microbatch": (asked.microbatch, policy.max_microbatch),
        "length": (asked.model.max_length, policy.max_length),
        "threads": (asked.threads, policy.max_threads),
    }
    if asked.privacy is not None:
        numbers["per_unit"] = (asked.privacy.per_unit, policy.max_batch_size)
    numbers["answer_tokens"] = (asked.answer_tokens, policy.max_length)
    for name, (value, most) in numbers.items():
        if not value <= most:
            limit = {"per_unit": "batch_size", "answer_tokens": "length"}.get(name, name)
            yield f"{name} is {value:g}, and node.yaml's max_{limit} is {most:g}"


def _false_privacy(asked: Assignment, data: DataSet, policy: Policy) -> Iterator[str]:
    """Yield what of an order's privacy is not what it seems, or less than the site wants."""
    privacy, central, share = asked.privacy, asked.central, asked.noise_share
    if privacy is not None and central is not None:
        yield "the order has privacy of examples and of clients at once, and its cost is of one"
    if share is not None and central is None:
        yield "the order has a share of noise in no sum of clients"
    if central is not None and share is not None and central.quantile is not None:
        yield "a share of the noise hides no count of changes, which clip_quantile needs"
    if privacy is not None:
        wanted = data.unit or "example"
        if (privacy.unit, asked.data.unit) != (wanted, data.unit):
            yield (
                f"the order hides the unit {_shown(privacy.unit)}, and node.yaml wants "
                f"{wanted} hidden"
            )
        if asked.steps is None:
            yield "the order has privacy and says no number of steps, so that its cost is unknown"
    seeds = [one.insecure_seed for one in (privacy, share) if one is not None]
    if any(seed is not None for seed in seeds) and not policy.insecure_seed:
        yield (
            "privacy.insecure_seed makes noise that everybody can compute, and node.yaml does not "
            "allow it"
        )
    noise, least = _own_noise(asked, policy), policy.min_noise_multiplier
    if noise is not None and least is not None and not noise >= least:
        yield (
            f"the noise that hides its data has noise multiplier {noise:.4g}, and node.yaml's "
            f"min_noise_multiplier is {least:g}"
        )


def _own_noise(asked: Assignment, policy: Policy) -> float | None:
    """Return the noise multiplier of the noise that the site can count on; None without any."""
    if asked.privacy is not None:
        return asked.privacy.noise_multiplier
    if asked.central is None:
        return None
    whole = asked.central.noise_multiplier
    if policy.trust_coordinator_noise:
        return whole
    # whoever sees this client's update by itself sees it in this client's share of the noise
    return 0.0 if asked.noise_share is None else whole / math.sqrt(asked.noise_share.of)


def _protection(asked: Assignment, data: DataSet, policy: Policy) -> Protection:
    """Return what hides the data from whoever gets the answer to an order."""
    if data.public:
        return "public"
    if asked.privacy is not None:
        # An evaluation is told in noise, too; after training under DP-SGD what other actions tell
        # is of noised gradients alone (clients.reading refuses the rest).
        return "examples"
    if asked.action != "train" or asked.central is None:
        return "none"
    hidden = asked.noise_share is not None or policy.trust_coordinator_noise
    return "client" if hidden else "none"


def _unprotected(asked: Assignment) -> str:
    """Return why an order needs without_privacy."""
    ask = "; only the site's owner can allow that, with without_privacy in node.yaml"
    if asked.action == "evaluate":
        return f"it would tell exact scores of private data{ask}"
    if asked.action != "train":
        return f"it would tell what a method reads in private data, without noise{ask}"
    if asked.central is None:
        return f"the run has no privacy{ask}"
    return (
        "the noise of the run's sum would be made by the coordinator, which sees the update before "
        "it: set privacy.noise_shares, or have the site's owner set trust_coordinator_noise in "
        "node.yaml"
    )


def _shown(text: str) -> str:
    """Return what somebody else wrote as it can stand in a sentence."""
    return ascii(text)[1:-1][:60]
