"""The examples that a client keeps for later tasks: a sample of all that it was offered so far.

They are the client's personal data. They lie in its :class:`clients.site.Site` and nowhere else: no
Update, Version, log or recipe has anything of them but what the keyed fingerprint of the data says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from safetensors.torch import load, save
from torch import Tensor

from clients.assignment import ModelSpec
from clients.examples import Example
from clients.tags import IGNORED

_EXAMPLES, _OUTPUTS = "examples.json", "outputs.safetensors"
_BY_NAME = ("label", "words", "tags")  # written otherwise than they are held
_KEPT = [f.name for f in fields(Example) if f.name not in ("unit", *_BY_NAME)]


class NotKept(ValueError):
    """What was kept does not go with the run's labels."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One example, as it was when it was kept.

    Attributes:
        example: what it says; its label is an index into the label set of the run.
        labels: indices of the labels that took part in its softmax; empty for a language model.
        outputs: the logits of those, float32 ``[len(labels)]``, of tags ``[words, len(labels)]``
            with NaN at a word that the model did not see; None where none are kept.
    """

    example: Example
    labels: tuple[int, ...] = ()
    outputs: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Reservoir:
    """What a client keeps.

    Attributes:
        offered: how many examples it was offered in all.
        kept: those that it keeps.
        public: whether all that it was offered was public.
    """

    offered: int = 0
    kept: tuple[Kept, ...] = ()
    public: bool = True


def offered(
    before: Reservoir, examples: Sequence[Example], labels: tuple[int, ...], size: int, seed: int
) -> tuple[Reservoir, dict[int, int]]:
    """Return the reservoir after it was offered examples, and where it has which of them.

    Vitter's algorithm R: of ``n`` examples that it was offered in all, it keeps each with
    probability ``size / n``, whichever task it was of. With a smaller size than before it first
    keeps some of what it has, drawn evenly; with a larger one it grows only if it never let go of
    any, because what it let go of cannot come back: both keep that true.

    Args:
        before: what it was.
        examples: each once, in any order: they are offered in one that the seed draws.
        labels: indices of the labels that take part in their softmax.
        size: how many it may keep, >= 1.
        seed: of all that is drawn.

    Returns:
        The reservoir, and by place in its ``kept`` the index into ``examples``.
    """
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    kept = list(before.kept)
    if before.offered > len(kept):
        size = min(size, len(kept))
    while len(kept) > size:
        kept.pop(below(len(kept)))
    places: dict[int, int] = {}
    count = before.offered
    for index in torch.randperm(len(examples), generator=generator).tolist():
        count += 1
        place = len(kept) if len(kept) < size else below(count)
        if place < size:
            kept[place : place + 1] = [Kept(examples[index], labels)]
            places[place] = index
    return replace(before, offered=count, kept=tuple(kept)), places


def written(reservoir: Reservoir, model: ModelSpec) -> dict[str, bytes]:
    """Return a reservoir as bytes by name; the examples are the same bytes whatever the outputs.

    Labels are written by name, so that a label set may grow.
    """
    rows = []
    for one in reservoir.kept:
        row = {name: asdict(one.example)[name] for name in _KEPT}
        label = one.example.label
        row["label"] = None if label is None else model.labels[label]
        row["labels"] = [model.labels[i] for i in one.labels]
        if one.example.words:
            row["words"] = one.example.words
            row["tags"] = [None if i == IGNORED else model.labels[i] for i in one.example.tags]
        rows.append(row)
    document = {"offered": reservoir.offered, "public": reservoir.public, "kept": rows}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    outputs = {
        f"{place}": one.outputs.detach().cpu().contiguous()
        for place, one in enumerate(reservoir.kept)
        if one.outputs is not None
    }
    return {_EXAMPLES: text.encode(), **({_OUTPUTS: save(outputs)} if outputs else {})}


def read(parts: Mapping[str, bytes], model: ModelSpec) -> Reservoir:
    """Return the reservoir that :func:`written` gave; an empty one of nothing.

    Raises:
        NotKept: if one of its labels is not in the model's label set.
    """
    if _EXAMPLES not in parts:
        return Reservoir()
    document = json.loads(parts[_EXAMPLES])
    outputs = load(parts[_OUTPUTS]) if _OUTPUTS in parts else {}
    place = {label: i for i, label in enumerate(model.labels)}
    kept = []
    for number, row in enumerate(document["kept"]):
        tags = row.get("tags", ())
        names = [*row["labels"], row["label"], *tags]
        unknown = [name for name in names if name is not None and name not in place]
        if unknown:
            raise NotKept(
                f"an example that was kept has the label {unknown[0]!r} in its task, which is "
                "outside the run's label set; declare all labels that were there before"
            )
        label = None if row["label"] is None else place[row["label"]]
        example = Example(
            **{name: row[name] for name in _KEPT},
            label=label,
            words=tuple((start, end) for start, end in row.get("words", ())),
            tags=tuple(IGNORED if name is None else place[name] for name in tags),
        )
        labels = tuple(place[name] for name in row["labels"])
        kept.append(Kept(example, labels, outputs.get(f"{number}")))
    return Reservoir(document["offered"], tuple(kept), document["public"])
