"""All that one client needs for one round: frozen, picklable, no live objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from strategies.spends import ClientLevel

if TYPE_CHECKING:  # torch takes seconds, and a config needs the specs alone
    from strategies.base import Broadcast, Tensors


Task: TypeAlias = Literal["classification", "token-classification", "causal-lm"]
"""What a model is for, and so which head it has and what a record must hold."""


@dataclass(frozen=True, slots=True)
class PluginChoice:
    """A plug-in by name, with checked options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which base model, and how it is loaded.

    Attributes:
        id: Hugging Face id, local folder, or ``builtin:NAME``.
        revision: Git revision on the Hub, or None.
        hash: sha256 of the weights, as :func:`clients.models.base_hash` gives it; checked on load.
        kind: ``classification``, ``token-classification`` or ``causal-lm``.
        labels: the declared label set, in index order; of ``token-classification`` the tags; empty
            for ``causal-lm``.
        pooling: ``mean``, ``cls``, ``last`` or ``auto`` (classification).
        max_length: tokens kept of an example, >= 1.
        quantization: ``none``, ``nf4`` or ``int8``.
        compute_dtype: ``float32``, ``bf16`` or ``fp16``.
        gradient_checkpointing: trade compute for memory.
    """

    id: str
    kind: Task
    revision: str | None = None
    hash: str = ""
    labels: tuple[str, ...] = ()
    pooling: str = "auto"
    max_length: int = 128
    quantization: str = "none"
    compute_dtype: str = "float32"
    gradient_checkpointing: bool = False

    @property
    def public_id(self) -> str:
        """The id where others may read it: empty for a local folder, whose path is nobody's."""
        local = Path(self.id).exists() or self.id.startswith((".", "/", "~"))
        return "" if local else self.id


@dataclass(frozen=True, slots=True)
class Shard:
    """One part of a data set that is split for simulation.

    Attributes:
        partition: ``iid``, ``dirichlet`` or ``column``.
        index: which part, 0 <= index < total (not used by ``column``).
        total: number of parts.
        seed: of the partition.
        alpha: Dirichlet concentration, > 0; smaller is less alike.
        column: the column to split by (``column``).
        value: the column's value that belongs to this part (``column``).
    """

    partition: Literal["iid", "dirichlet", "column"]
    index: int = 0
    total: int = 1
    seed: int = 0
    alpha: float = 0.5
    column: str = ""
    value: str = ""


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Which records: a URI, the names of its columns, and the part of it that is meant.

    Attributes:
        uri: such as ``jsonl:/data/notes.jsonl`` or ``builtin:parameter-types?split=test``; to
            whom they are elsewhere ``site:NAME``, as their site calls them.
        fields: weft's column name to the file's own, such as ``{"text": "note", "label": "dx"}``.
        shard: the part of it, or None for all.
        labels: keep only examples with these labels; empty keeps all. A label outside the model's
            label set is an error all the same.
        unit: the source's own name of the column that says whose an example is; empty where each
            example is somebody's by itself.
        part: ``train`` for what is left when ``holdout`` is split off, ``holdout`` for that;
            see :mod:`clients.holdout`.
        holdout: the share that is split off, in (0, 1); 0 where ``part`` is ``all``.
        holdout_by: the source's own name of the column whose values are split off whole; empty
            where records are.
    """

    uri: str
    fields: Mapping[str, str] = field(default_factory=dict)
    shard: Shard | None = None
    labels: tuple[str, ...] = ()
    unit: str = ""
    part: Literal["all", "train", "holdout"] = "all"
    holdout: float = 0.0
    holdout_by: str = ""


NO_DATA = DataSpec("none:")
"""The data of an assignment that reads none."""


@dataclass(frozen=True, slots=True)
class Clipping:
    """How DP-SGD bounds what one example adds; see :mod:`clients.clipping`.

    Attributes:
        mode: ``flat``, ``per-layer``, ``automatic`` or ``quantile``.
        stability: added to every norm (``automatic``), > 0: far shorter gradients stay short.
        quantile: share of the norms that are to be within the bound (``quantile``), in (0, 1).
        rate: how fast the bound moves there, > 0; at most by exp(rate) a step.
        share: part of a step's 1 / noise² that finding the quantile costs, in (0, 1).
    """

    mode: Literal["flat", "per-layer", "automatic", "quantile"] = "flat"
    stability: float = 0.01
    quantile: float = 0.5
    rate: float = 0.2
    share: float = 0.05


@dataclass(frozen=True, slots=True)
class Report:
    """What a client under DP-SGD tells of a round besides its update; see :mod:`clients.report`.

    Attributes:
        loss: what an example's loss is cut off at, > 0.
        count: whether the number of examples is told, too.
        steps: how many steps of training it costs as much as, >= 1.
    """

    loss: float
    count: bool = False
    steps: int = 1


@dataclass(frozen=True, slots=True)
class Privacy:
    """DP-SGD of one client.

    Attributes:
        noise_multiplier: noise standard deviation over ``max_grad_norm``, > 0.
        max_grad_norm: bound on the norm of what one example adds to a sum of gradients, > 0; with
            the clipping ``quantile`` only what it begins with.
        sample_rate: Poisson sampling probability of a unit per step, in (0, 1].
        unit: whose presence is hidden: ``example``, or the column that says whose an example is.
        insecure_seed: replaces the secret key, for tests; marks the version as not private.
        clipping: how that bound is kept.
        per_unit: how many of a unit's examples a step that takes it trains on at most, >= 1; they
            are clipped as one.
        report: what is told of a round besides its update, or None for nothing.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    unit: str = "example"
    insecure_seed: int | None = None
    clipping: Clipping = Clipping()
    per_unit: int = 1
    report: Report | None = None


@dataclass(frozen=True, slots=True)
class NoiseShare:
    """A client's part of the noise in a sum of clients' changes; see :mod:`clients.shares`.

    Attributes:
        of: how many shares are the whole noise, >= 1.
        insecure_seed: replaces the secret key, for tests; marks the version as not private.
    """

    of: int
    insecure_seed: int | None = None


@dataclass(frozen=True, slots=True)
class Past:
    """Where a client finds what it kept of earlier tasks, and how it draws what it keeps.

    Attributes:
        update: digest of the newest update of its own that the run goes on from, which names what
            it kept then; empty for none.
        seed: of what it keeps of this task, the same in every round.
    """

    update: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is asked to do for one client.

    Attributes:
        action: ``init`` makes the adapter's first tensors, ``train`` an Update, ``evaluate`` an
            Evaluation; ``prepare`` and ``consolidate`` make an Update that holds only memory.
        run: the run's id; names the client's private key and state, and determines no bytes.
        client: the client's name.
        round: >= 1; 0 for ``init``.
        base: id of the version the round starts from.
        model: the base model.
        adapter: the adapter method.
        broadcast: the round's tensors.
        underlay: a frozen adapter underneath the trained one (``start: stack``, and what the
            adapter takes out of the base model); empty for none.
        memory: regulariser memory, namespaced ``PLUGIN/NAME``.
        data: the client's records; for ``init`` public data that the adapter reads, or
            :data:`NO_DATA`.
        num_examples: the client's declared size, under DP in units; 0 where it declares none (then
            it is counted). For ``init`` how many records are read at most.
        optimizer: the local optimizer.
        regularizers: in the order in which they apply.
        batch_size: examples a step; expected number under Poisson sampling.
        steps: optimizer steps in this round, or None for ``epochs``.
        epochs: passes over the data; not allowed under DP.
        microbatch: examples a forward pass holds at most.
        labels: labels that take part in the softmax; empty for the whole label set.
        head: ``train``, ``freeze`` or ``personal`` (trained, kept at the client).
        privacy: DP-SGD, or None.
        central: client-level DP, or None: what of it the client has to do is to bound its change,
            and to send nothing else.
        noise_share: with ``central``: the client puts its share of the noise in by itself, and what
            it sends is whole numbers; None where the coordinator makes the noise.
        seed: of everything random in this round but DP's noise and sample.
        threads: intra-op threads; changes rounding, so it is in the recipe.
        device: ``cpu`` or ``cuda``.
        site: folder of the client's private state (keys, outbox, personal tensors).
        public: whether the data are public: fingerprints are then unkeyed.
        uplink: encodings of what is sent back, in order; none for the tensors as they are.
        held: what the broadcast leaves out because the client holds it, by ``PART/NAME`` with the
            tensor's digest (:mod:`clients.downlink`); empty for nothing, and None where the client
            is to keep nothing either. How tensors travel determines no bytes.
        answer_tokens: to ``evaluate`` a causal model, tokens at most of the answers that are held
            against the completions; 0 for none.
        past: where what it kept of earlier tasks is, for regularizers that rehearse; else None.
    """

    action: Literal["init", "train", "evaluate", "prepare", "consolidate"]
    run: str
    client: str
    round: int
    base: str
    model: ModelSpec
    adapter: PluginChoice
    broadcast: Broadcast
    data: DataSpec
    optimizer: PluginChoice
    site: str
    underlay: Tensors = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)
    num_examples: int = 0
    regularizers: tuple[PluginChoice, ...] = ()
    batch_size: int = 16
    steps: int | None = None
    epochs: float = 1.0
    microbatch: int = 64
    labels: tuple[str, ...] = ()
    head: Literal["train", "freeze", "personal"] = "train"
    privacy: Privacy | None = None
    central: ClientLevel | None = None
    noise_share: NoiseShare | None = None
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    public: bool = False
    uplink: tuple[PluginChoice, ...] = ()
    held: Mapping[str, str] | None = None
    answer_tokens: int = 0
    past: Past | None = None

    @property
    def private(self) -> bool:
        """Whether nothing of the client's data may show but through noise."""
        return self.privacy is not None or self.central is not None

    def digest(self) -> str:
        """Return the sha256 that binds DP noise to everything this assignment says.

        Covers every field but those that name a place rather than a computation (``run``,
        ``site``, the data's URI and columns, the model's id where its hash says which it is),
        ``held``, with which nothing may be left out any more, ``answer_tokens``, since private
        scores have no answers, and ``past`` and ``noise_share`` where there is none. So it is
        the same for who sends it and for the site, which calls data and models by other names. On
        other data it is answered by the update that was made first, if at all: see
        :meth:`clients.site.Site.stored_update`.
        A tensor that several assignments share is read once: see :mod:`clients.digests`.

        Raises:
            ValueError: if the broadcast is not whole.
        """
        from clients.digests import digest_of

        if self.held:
            raise ValueError(
                f"the broadcast to {self.client!r} leaves out {len(self.held)} tensors, and a "
                "digest is of a whole one; expand it first"
            )
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        unbound = {"run", "site", "held", "answer_tokens"}
        unbound |= {name for name in ("past", "noise_share") if named[name] is None}
        named["data"] = replace(self.data, uri="", fields={})
        if self.model.hash:
            named["model"] = replace(self.model, id="", revision=None)
        return digest_of({k: v for k, v in named.items() if k not in unbound})
