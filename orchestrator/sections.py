"""The sections of a run's file about one thing each: model, privacy, clients, data, backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from clients.holdout import BadHoldout, Holdout
from orchestrator.policy import Strict


class Model(Strict):
    """The base model: a Hugging Face id, a local folder or ``builtin:NAME``."""

    id: str = Field(min_length=1)
    revision: str | None = None
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    max_length: int = Field(default=128, ge=1, le=1_048_576)
    quantization: Literal["none", "nf4", "int8"] = "none"
    compute_dtype: Literal["float32", "bf16", "fp16"] = "float32"
    gradient_checkpointing: bool = False


def _by_name(value: Any) -> Any:
    """Return a mode that is given by its name alone as the section that it stands for."""
    return {"mode": value} if isinstance(value, str) else value


_ONLY_IN = {"stability": "automatic"} | dict.fromkeys(("quantile", "rate", "share"), "quantile")


class ClippingConfig(Strict):
    """How DP-SGD bounds what one example adds; a mode's options, or its name alone."""

    mode: Literal["flat", "per-layer", "automatic", "quantile"] = "flat"
    stability: float = Field(default=0.01, gt=0)
    quantile: float = Field(default=0.5, gt=0, lt=1)
    rate: float = Field(default=0.2, gt=0, le=10)
    share: float = Field(default=0.05, gt=0, lt=1)

    @model_validator(mode="after")
    def _of_the_mode(self) -> ClippingConfig:
        for name, mode in _ONLY_IN.items():
            default = type(self).model_fields[name].default
            if self.mode != mode and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is an option of mode {mode}, got mode {self.mode}; "
                    "leave it out, or choose that mode"
                )
        return self


class ReportConfig(Strict):
    """What clients tell of a round besides their updates, in noise that costs as a step does."""

    loss: float = Field(gt=0)
    count: bool = False
    steps: int = Field(default=1, ge=1)


def _bound(value: Any) -> Any:
    """Refuse an accountant that bounds nothing."""
    if value == "gdp":
        raise ValueError(
            "gdp is an approximation that can say less than was spent; give prv or rdp, which are "
            "upper bounds, and see it beside them with weft privacy plan"
        )
    return value


class PrivacyConfig(Strict):
    """Differential privacy: give ``epsilon``, or the ``noise_multiplier`` itself.

    At ``level: example`` every client clips and noises its examples' gradients (DP-SGD); at
    ``level: client`` the coordinator clips the clients' whole changes, and noises their sum.
    """

    epsilon: float | None = Field(default=None, gt=0)
    noise_multiplier: float | None = Field(default=None, gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    clipping: Annotated[ClippingConfig, BeforeValidator(_by_name)] = ClippingConfig()
    report: ReportConfig | None = None
    max_participations: int | None = Field(default=None, ge=1)
    unit: str = Field(default="example", min_length=1, max_length=128)
    per_unit: int = Field(default=1, ge=1)
    level: Literal["example", "client"] = "example"
    clip: float | None = Field(default=None, gt=0)
    clip_quantile: float | None = Field(default=None, gt=0, lt=1)
    noise_shares: int | None = Field(default=None, ge=1)
    accountant: Annotated[Literal["prv", "rdp"], BeforeValidator(_bound)] = "prv"
    insecure_seed: int | None = None
    over_budget: Literal["refuse", "shorten"] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> PrivacyConfig:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either epsilon or noise_multiplier")
        if (self.level == "client") != (self.clip is not None):
            raise ValueError(
                "clip is the norm of a client's whole change at level: client, which needs it; at "
                "level: example it is max_grad_norm"
            )
        of_examples = (self.max_grad_norm, self.unit, self.clipping.mode, self.report)
        if self.level == "client" and of_examples != (1.0, "example", "flat", None):
            raise ValueError(
                "max_grad_norm, unit, clipping and report are of examples; at level: client the "
                "unit is the client and clip bounds its change, so leave them out"
            )
        if self.per_unit > 1 and not self.unit_column:
            raise ValueError(
                f"per_unit: {self.per_unit} examples of one unit in a step need a unit that has "
                "several; set unit to the column that says whose an example is, or leave it out"
            )
        if self.level == "example" and self.unit == "client":
            raise ValueError(
                "a column called client would read as level: client, which hides whole clients; "
                "give it another name with fields, such as {owner: client}, and set unit: owner"
            )
        if self.clip_quantile is not None and self.level != "client":
            raise ValueError("clip_quantile moves the clip of level: client; leave it out")
        if self.noise_shares is not None and self.level != "client":
            raise ValueError(
                "noise_shares are of the noise in a sum of clients, at level: client; at level: "
                "example every client makes all of its noise already, so leave it out"
            )
        if self.noise_shares is not None and self.clip_quantile is not None:
            raise ValueError(
                "clip_quantile needs a noised count of the changes within the clip, which the "
                "coordinator makes from single updates; with noise_shares it sees none without "
                "noise, so leave one of them out"
            )
        return self

    def steps_a_round(self, training: int) -> int:
        """Return as how many steps a round counts that has so many of training."""
        return training + (self.report.steps if self.report else 0)

    @property
    def unit_column(self) -> str:
        """The column that says whose an example is; empty where each is a unit by itself."""
        return "" if self.unit == "example" else self.unit


def _split(value: Any) -> Any:
    """Return the share that each client holds out, as it is written."""
    if value is None or isinstance(value, bool):
        return value
    try:
        found = Holdout.of(str(value))
    except BadHoldout as error:
        raise ValueError(str(error)) from None
    if found.data:
        raise ValueError(
            f"simulated clients split a share off, such as 0.1, got the data set {value!r}"
        )
    return str(found)


class Simulate(Strict):
    """Clients made by splitting one data set."""

    data: str
    fields: dict[str, str] = Field(default_factory=dict)
    by: Literal["iid", "dirichlet", "column"] = "iid"
    parts: int | None = Field(default=None, ge=1, le=100_000)
    alpha: float = Field(default=0.5, gt=0)
    column: str | None = None
    seed: int = 0
    public: bool = False
    holdout: Annotated[str | None, BeforeValidator(_split)] = None

    @model_validator(mode="after")
    def _complete(self) -> Simulate:
        if self.by == "column" and not self.column:
            raise ValueError("by: column needs column: NAME, the column to split by")
        if self.by != "column" and self.parts is None:
            raise ValueError(f"by: {self.by} needs parts: N, the number of clients")
        return self


class Participants(Strict):
    """Who takes part: registered clients by label or by name, or a simulation."""

    select: dict[str, str] | None = None
    names: tuple[str, ...] | None = None
    simulate: Simulate | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Participants:
        given = [k for k in ("select", "names", "simulate") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of select (labels), names, simulate")
        return self


class RankRule(Strict):
    """The rank of some clients' adapters: those with all the labels, or with one of the names."""

    where: dict[str, str] = Field(default_factory=dict)
    names: tuple[str, ...] = ()
    r: int = Field(ge=1)

    @model_validator(mode="after")
    def _some(self) -> RankRule:
        if bool(self.where) == bool(self.names):
            raise ValueError("give either where (labels) or names, whose rank this is")
        return self

    def fits(self, name: str, labels: Mapping[str, str]) -> bool:
        """Return whether this is the rank of a client."""
        return name in self.names if self.names else self.where.items() <= labels.items()


class Held(Strict):
    """Held-back data that the coordinator may read."""

    data: str
    fields: dict[str, str] = Field(default_factory=dict)


class EvaluateConfig(Strict):
    """What is scored while the run goes on: held-back data, or what clients hold out.

    Clients under privacy tell noised scores; all of the run's together cost each ``epsilon``, of
    what the run may spend.
    """

    data: str | None = None
    fields: dict[str, str] = Field(default_factory=dict)
    clients: Literal["all"] | dict[str, str] | tuple[str, ...] | None = None
    every: int = Field(default=1, ge=1)
    epsilon: float | None = Field(default=None, gt=0)
    loss: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_of(self) -> EvaluateConfig:
        if (self.data is None) == (self.clients is None):
            raise ValueError("give either data, held-back records, or clients: all, labels, names")
        if self.clients is None and (self.epsilon, self.loss) != (None, None):
            raise ValueError(
                "epsilon and loss are of what clients tell; data of the coordinator's own cost "
                "nothing, so leave them out"
            )
        if self.clients is not None and self.fields:
            raise ValueError("fields are of data; clients' columns are declared with the clients")
        return self

    def due(self, round_: int, rounds: int) -> bool:
        """Return whether a round of so many is scored: every so many of them is, and the last."""
        return round_ % self.every == 0 or round_ == rounds

    def times(self, rounds: int) -> int:
        """Return how often so many rounds are scored."""
        return rounds // self.every + bool(rounds % self.every)


class InitDataConfig(Strict):
    """Public data from which the adapter's first tensors are made (init eva, corda, lora_ga)."""

    data: str
    fields: dict[str, str] = Field(default_factory=dict)
    examples: int = Field(default=256, ge=1)
    public: bool = False


def _measured(value: Any) -> Any:
    """Accept ``auto`` for None: what is measured."""
    return None if value == "auto" else value


LEAST_DEADLINE_S = 5.0
"""Of a round over sites: an order whose time is up before its node asks for it is never done."""


class BackendConfig(Strict):
    """Where clients are trained. Nothing here changes a result."""

    name: Literal["ray", "inline", "superlink"] = "ray"
    local: Literal["inline", "ray"] = "inline"
    superlink: str | None = Field(default=None, pattern=r"^(http://)?\S+:[0-9]{1,5}$")
    certificates: str | None = None
    secret_file: str | None = None
    away_s: float = Field(default=90.0, gt=0)
    workers: Annotated[int | None, Field(ge=1), BeforeValidator(_measured)] = None
    address: str | None = None
    gpus_per_worker: Annotated[float | None, Field(ge=0), BeforeValidator(_measured)] = 0.0
    heartbeat_s: float = Field(default=600.0, gt=0)
    grace_s: float = Field(default=30.0, ge=0)
    checkpoint_s: float | None = Field(default=None, ge=0)
    recycle_above_mb: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_workers(self) -> BackendConfig:
        if self.here == "inline" and self.address is not None:
            raise ValueError("address: inline runs in this process; use name: ray with an address")
        for key in ("local", "superlink", "certificates", "secret_file", "away_s"):
            default = type(self).model_fields[key].default
            if self.name != "superlink" and getattr(self, key) != default:
                raise ValueError(f"{key}: it is of name: superlink, got {self.name}; leave it out")
        return self

    @property
    def here(self) -> Literal["inline", "ray"]:
        """Where what needs no site is done."""
        return self.local if self.name == "superlink" else self.name
