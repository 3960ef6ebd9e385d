"""Algebra on named tensors: the weighted mean of updates, and low-rank products in factored form.

A low-rank layer changes its base weight by ``scaling * B @ A`` with ``A: [rank, in_features]`` and
``B: [out_features, rank]``. Nothing here forms that ``[out_features, in_features]`` product: every
function works on the factors, in float64, at a cost linear in ``in_features + out_features``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Annotated, NamedTuple, TypeAlias

import torch
from torch import Tensor

from strategies.base import Tensors, Update
from strategies.plugins import Form
from strategies.sums import bundles, plus_each

LABEL = "label:"
Weighting: TypeAlias = Annotated[
    str, Form(f"examples|uniform|{LABEL}.+", f"examples, uniform or {LABEL}NAME")
]
"""What an update counts: its ``num_examples``, 1, or the number in an operator's label; each times
its ``weight``.

A strategy's option of this type is called ``weighting``: where that names a label, the orchestrator
puts its number on each update as ``declared``. All three are public also under DP.
"""


class NotLowRank(ValueError):
    """The tensors are not those of a low-rank adapter."""


class BadUpdate(ValueError):
    """An update does not fit the adapter, or the other updates of its round."""


class Factors(NamedTuple):
    """One low-rank layer: its base weight changes by ``scaling * b @ a``.

    Attributes:
        a: ``[rank, in_features]``.
        b: ``[out_features, rank]``.
        scaling: 0-d; ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA.
    """

    a: Tensor
    b: Tensor
    scaling: Tensor


_A, _B, _SCALING = ".lora_A.weight", ".lora_B.weight", ".scaling"
CORE, MAGNITUDES = ".lora_core.weight", ".lora_magnitudes"
_BETWEEN = {  # KaSA's, LoRA-SB's and SD-LoRA's
    ".lora_diag": "a diagonal",
    CORE: "a core",
    MAGNITUDES: "magnitudes",
}
_ROUNDING = 1e-4  # relative, of float32 factors that were refactored
_UPDATES, _UPDATES_BYTES = 16, 2**29  # that are averaged together

ALL_TRAINED = r"(?!.*\.scaling$).*"
"""What is trained where nothing but the scalings is frozen; see
:class:`strategies.base.Broadcast`."""

A_AND_HEAD, B_AND_HEAD = (rf".*\.lora_{factor}\..*|.*\.shift\..*|head\..*" for factor in "AB")
"""What is trained where the other factor is frozen; likewise. A shift is the change of a whole
parameter of the base model, such as a bias, and like a head no factor."""


def lora_layers(tensors: Tensors) -> dict[str, Factors]:
    """Return the low-rank layers of an adapter by layer name, sorted; other tensors are left out.

    Raises:
        NotLowRank: if there is none, or one lacks a factor or its scaling, or the factors' shapes
            do not fit each other.
    """
    layers = {}
    for name in sorted(n for n in tensors if n.endswith((_A, _B))):
        layer = name.removesuffix(_A).removesuffix(_B)
        names = [layer + suffix for suffix in (_A, _B, _SCALING)]
        missing = [n for n in names if n not in tensors]
        if missing:
            raise NotLowRank(f"layer {layer!r} is incomplete: the adapter has no {missing[0]!r}")
        for between in (what for part, what in _BETWEEN.items() if layer + part in tensors):
            raise NotLowRank(
                f"layer {layer!r} has {between} between its factors, so that B A is not its "
                "delta; use a strategy that takes every tensor by itself, such as fedavg"
            )
        factors = Factors(*(tensors[n] for n in names))
        a, b = factors.a.shape, factors.b.shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or factors.scaling.dim() != 0:
            shapes = ", ".join(str(list(t.shape)) for t in factors)
            raise NotLowRank(
                f"layer {layer!r} has lora_A, lora_B and scaling of shapes {shapes}; they must be "
                "[rank, in_features], [out_features, rank] and []"
            )
        layers[layer] = factors
    if not layers:
        raise NotLowRank(
            "the adapter has no low-rank layer (NAME.lora_A.weight, NAME.lora_B.weight, "
            "NAME.scaling); use an adapter of the LoRA family"
        )
    return layers


def lora_tensors(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return layers as named tensors; the inverse of :func:`lora_layers`."""
    return {
        layer + suffix: tensor
        for layer, factors in layers.items()
        for suffix, tensor in zip((_A, _B, _SCALING), factors, strict=True)
    }


def weighted_mean(
    updates: Iterable[Update], like: Tensors, weighting: Weighting
) -> dict[str, Tensor]:
    """Return the weighted mean of the updates' tensors, or nothing if no update has weight.

    Reads ``updates`` once, and keeps beside the running sum at most 16 of them, of 512 MiB in all,
    or one: what several add to a tensor is added while the sum of that tensor is in the processor's
    cache. The sum is in float64 and divided once, at the end: clients that agree get their float32
    values back exactly, and so do the entries that a mask kept from being trained. For the same
    reason this is the mean of the values rather than the old value plus the mean change; the two
    are the same number. How many updates are kept at a time changes no bit of it.

    Args:
        updates: the round's updates; all train the same tensors.
        like: the adapter they were trained from; gives the result's dtypes.
        weighting: see :data:`Weighting`.

    Raises:
        BadUpdate: if an update has a tensor that ``like`` has not, or of another shape, or trained
            other tensors than the updates before it, or has no weight: see :func:`weight_of`.
    """
    size_bytes = sum(tensor.nbytes for tensor in like.values())
    most = max(1, min(_UPDATES, _UPDATES_BYTES // max(1, size_bytes)))
    matching = _matching(updates, like)
    sums: dict[str, Tensor] = {}
    counted: list[float] = []
    ended = False
    while not ended:
        group = list(islice(matching, most))
        ended = len(group) < most
        weights = [weight_of(update, weighting) for update in group]
        counted += weights
        total = math.fsum(counted)
        sizes = {n: t.numel() for n, t in (group[0].tensors if group else sums).items()}
        for names in bundles(sizes):
            before = [sums[name] for name in names] if sums.keys() >= set(names) else None
            done = plus_each(before, [[u.tensors[n] for n in names] for u in group], weights)
            # sums that are done make room for the next ones in the same memory
            for name, tensor in zip(names, done, strict=True):
                last = ended and total
                sums[name] = tensor.div_(total).to(like[name].dtype) if last else tensor
        group.clear()  # before others are read
    return sums if any(counted) else {}


def _matching(updates: Iterable[Update], like: Tensors) -> Iterator[Update]:
    """Yield the updates; refuse one that does not fit ``like`` or those before it."""
    names: set[str] | None = None  # not the view of an update, which would keep it
    for update in updates:
        check_update(update, like)
        names = set(update.tensors) if names is None else names
        if names != update.tensors.keys():
            odd = min(names ^ update.tensors.keys())
            raise BadUpdate(
                f"the update of {update.client!r} and those before it do not train the same "
                f"tensors ({odd!r} is in one only); all clients of a round must"
            )
        yield update


def weight_of(update: Update, weighting: Weighting) -> float:
    """Return what an update counts, >= 0; see :data:`Weighting`.

    Raises:
        BadUpdate: if it counts a negative number of examples, or no weight was declared for it.
    """
    who = f"the update of {update.client!r}"
    if update.num_examples < 0:
        raise BadUpdate(f"{who} counts {update.num_examples} examples; it must be at least 0")
    if weighting == "examples":
        return update.weight * update.num_examples
    if weighting == "uniform":
        return update.weight
    if update.declared is None or not (math.isfinite(update.declared) and update.declared > 0):
        raise BadUpdate(
            f"{who} has the declared weight {update.declared}, and updates are weighed by "
            f"{weighting!r}; the client's label must be a number > 0"
        )
    return update.weight * update.declared


def check_update(update: Update, like: Tensors) -> None:
    """Refuse an update that does not fit ``like``; other shapes would silently broadcast.

    Raises:
        BadUpdate: naming the client and what of its update is wrong.
    """
    who = f"the update of {update.client!r}"
    for name, tensor in update.tensors.items():
        if name not in like:
            raise BadUpdate(f"{who} has {name!r}, which the adapter has not")
        if tensor.shape != like[name].shape:
            raise BadUpdate(
                f"{who} has {name!r} of shape {list(tensor.shape)}, "
                f"the adapter has it of shape {list(like[name].shape)}"
            )


def factored_svd(
    b: Tensor, a: Tensor, rank_of: Callable[[Tensor], int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of ``b @ a`` without forming the product.

    QR of both factors, then the SVD of the small core: O((out + in) rank²). Unlike the SVD of a
    dense product it is defined for a rank-deficient ``b`` too: the rows of ``vh`` stay in the row
    space of ``a`` (arXiv 2505.12805 leaves that to whatever the SVD returns).

    The result is canonical: the entry of largest magnitude of every row of ``vh`` is positive, and
    singular values that are only the rounding of zero are exactly zero.

    Args:
        b: ``[out, rank]``.
        a: ``[rank, in]``.
        rank_of: from the singular values, how many of them to return; None for all.

    Returns:
        In float64, with ``k = min(out, rank, in)`` and ``q = min(rank, in)``: ``u``, ``[out, k]``
        with orthonormal columns; the singular values, ``[k]``, descending; and ``vh``, ``[q, in]``
        with orthonormal rows. ``b @ a = u @ diag(s) @ vh[:k]``; the rows of ``vh`` beyond ``k``
        complete the row space. With ``rank_of``, only the first so many of each.
    """
    left, right = _QR.of(b), _QR.of(a.T)
    core = left.r @ right.r.T
    u, s, vh = torch.linalg.svd(core, full_matrices=True)
    rounding = max(core.shape) * torch.finfo(core.dtype).eps * left.r.norm() * right.r.norm()
    s = torch.where(s > rounding, s, 0.0)
    if rank_of is not None:
        keep = rank_of(s)
        s, vh = s[:keep], vh[:keep]
    k = s.numel()
    u, vh = left.q_times(u[:, :k]), right.q_times(vh.T).T
    peaks = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(peaks < 0, -1.0, 1.0)
    return u * signs[:k].T, s, vh * signs


class _QR(NamedTuple):
    """A thin QR decomposition in float64 whose Q stays a product of reflections.

    Applying them to the few columns that are wanted costs a fraction of writing Q out.

    Attributes:
        reflections: ``[rows, k]``, LAPACK's form; ``k = min(rows, columns)``.
        lengths: ``[k]``, of the reflections (LAPACK's tau).
        r: ``[k, columns]``, upper triangular.
    """

    reflections: Tensor
    lengths: Tensor
    r: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> _QR:
        """Decompose ``matrix``, ``[rows, columns]``."""
        reflections, lengths = torch.geqrf(matrix.to(torch.float64))
        k = lengths.numel()
        return cls(reflections[:, :k], lengths, reflections[:k].triu())

    def q_times(self, matrix: Tensor) -> Tensor:
        """Return ``Q @ matrix``; ``matrix`` is ``[k, n]``."""
        padded = matrix.new_zeros(self.reflections.shape[0], matrix.shape[1])
        padded[: matrix.shape[0]] = matrix
        return torch.ormqr(self.reflections, self.lengths, padded)


def refactor(factors: Factors, row_norm: float = 1.0) -> Factors:
    """Return the same product with orthonormal rows of ``a``, up to their common norm.

    FedSVD's step (arXiv 2505.12805, Algorithm 1): ``a`` becomes the right singular vectors and
    ``b`` the left ones times the singular values, in descending order. The product ``b @ a``, the
    row space of ``a``, shapes and dtypes are unchanged; the scaling takes no part. Where the
    singular values are distinct, doing it twice changes nothing more. A zero ``b`` stays zero. If
    the rank exceeds ``in_features``, the rows of ``a`` beyond it are zero.

    Args:
        factors: one layer.
        row_norm: norm of the rows of the new ``a``, > 0.
    """
    u, s, vh = factored_svd(factors.b, factors.a)
    a, b = torch.zeros_like(factors.a), torch.zeros_like(factors.b)
    a[: vh.shape[0]] = (vh * row_norm).to(a.dtype)
    b[:, : s.numel()] = (u * s / row_norm).to(b.dtype)
    return Factors(a, b, factors.scaling)


def refactored(adapter: Tensors, row_norm: float = 1.0) -> dict[str, Tensor]:
    """Return ``adapter`` with :func:`refactor` done to every low-rank layer.

    Raises:
        NotLowRank: as :func:`lora_layers`.
    """
    layers = lora_layers(adapter)
    return {
        **adapter,
        **lora_tensors({name: refactor(factors, row_norm) for name, factors in layers.items()}),
    }


def product_norm(b: Tensor, a: Tensor) -> float:
    """Return the Frobenius norm of ``b @ a``, from the factors.

    >>> product_norm(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]]))
    10.0
    """
    return float(torch.linalg.matrix_norm(_QR.of(b).r @ _QR.of(a.T).r.T))


def same_products(one: Tensors, other: Tensors) -> bool:
    """Return whether two adapters have the same delta in every layer, but for rounding.

    Raises:
        NotLowRank: as :func:`lora_layers`.
    """
    before, after = lora_layers(one), lora_layers(other)
    if before.keys() != after.keys():
        return False
    for name, x in before.items():
        y = after[name]
        b = torch.cat([x.scaling * x.b, -y.scaling * y.b], dim=1)
        change = product_norm(b, torch.cat([x.a, y.a]))
        if change > _ROUNDING * product_norm(x.scaling * x.b, x.a):
            return False
    return True
