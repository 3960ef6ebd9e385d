"""RunConfig: one YAML file plus ``--set`` overrides, checked whole before anything starts."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec, PluginChoice, Task
from clients.optimizers import OPTIMIZERS
from clients.regularizers import REGULARIZERS
from clients.tags import is_bio, scheme_problem
from clients.yaml_files import BadFile, mapping_in
from orchestrator.faults import Faults, from_list
from orchestrator.faults import problems as fault_problems
from orchestrator.loggers import LOGGERS
from orchestrator.observers.webhook import Notify
from orchestrator.policy import METRICS, TRAIN_LOSS, Rounds, Stop, Strict
from orchestrator.score_rules import problems as score_problems
from orchestrator.sections import (
    LEAST_DEADLINE_S,
    BackendConfig,
    EvaluateConfig,
    InitDataConfig,
    Model,
    Participants,
    PrivacyConfig,
    RankRule,
)
from storage.canonical import NotJson, canonical_json
from strategies import STRATEGIES
from strategies.encodings import ENCODINGS
from strategies.merges import MERGES
from strategies.plugins import BadOptions, Family, UnknownPlugin

FAMILIES: Mapping[str, Family] = {
    "strategy": STRATEGIES,
    "adapter": ADAPTERS,
    "optimizer": OPTIMIZERS,
    "regularizer": REGULARIZERS,
    "merge": MERGES,
    "encoding": ENCODINGS,
    "logger": LOGGERS,
}
NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class BadConfig(ValueError):
    """A run's configuration is wrong; the message names every place."""


def find_plugin(kind: str, name: str) -> Any:
    """Return the plug-in ``name`` of ``kind``; a hint for an unknown name searches all sockets.

    Raises:
        UnknownPlugin: naming the nearest of this kind and what the name is elsewhere.
    """
    try:
        return FAMILIES[kind].get(name)
    except UnknownPlugin as error:
        wanted = name.lower().replace("_", "-")
        others = [k for k, f in FAMILIES.items() if k != kind and wanted in f.names()]
        if others:
            where = " and ".join(f"a{'n' * (o[0] in 'aeiou')} {o}" for o in others)
            raise UnknownPlugin(f"no {kind} is called {name!r}; {name!r} is {where}") from None
        if "did you mean" not in str(error):
            for other, family in FAMILIES.items():
                close = difflib.get_close_matches(wanted, family.names(), n=1)
                if close and other != kind:
                    raise UnknownPlugin(
                        f"{error}; the nearest elsewhere is the {other} {close[0]!r}"
                    ) from None
        raise


def _name_first(value: Any) -> Any:
    """Accept ``lora`` and ``{name: lora, r: 8}`` alike."""
    if isinstance(value, str):
        return {"name": value, "options": {}}
    if isinstance(value, Mapping) and "options" not in value:
        named = {"name": value["name"]} if "name" in value else {}
        return {**named, "options": {k: v for k, v in value.items() if k != "name"}}
    return value


class Choice(Strict):
    """A plug-in by name, and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    def checked(self, kind: str) -> PluginChoice:
        """Return the choice with every option parsed and every default filled in.

        Raises:
            UnknownPlugin: if no plug-in of ``kind`` has this name.
            BadOptions: if an option is unknown or wrong.
        """
        plugin = find_plugin(kind, self.name)
        return PluginChoice(plugin.name, plugin.check(self.options))


PluginField = Annotated[Choice, BeforeValidator(_name_first)]


class RunConfig(Rounds):
    """One federated run. Unknown keys are refused."""

    name: str = Field(pattern=NAME)
    model: Annotated[Model, BeforeValidator(lambda v: {"id": v} if isinstance(v, str) else v)]
    task: Task = "classification"
    labels: tuple[str, ...] = ()
    task_labels: tuple[str, ...] = ()
    adapter: PluginField = Choice(name="lora")
    ranks: tuple[RankRule, ...] = ()
    init_data: InitDataConfig | None = None
    head: Literal["train", "freeze", "personal"] = "train"
    strategy: PluginField = Choice(name="fedsvd")
    regularizers: tuple[PluginField, ...] = ()
    optimizer: PluginField = Choice(name="adamw")
    uplink: tuple[PluginField, ...] = ()
    batch_size: int = Field(default=16, ge=1)
    microbatch: int = Field(default=64, ge=1)
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    privacy: PrivacyConfig | None = None
    accept_unbounded: str | None = Field(default=None, min_length=1, max_length=1000)
    clients: Participants
    start: Literal["fresh", "continue", "stack"] = "fresh"
    start_from: str | None = None
    library: tuple[str, ...] = ()
    seed: int = 0
    threads: int = Field(default=1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    evaluate: EvaluateConfig | None = None
    loggers: tuple[PluginField, ...] = ()
    notify: Notify | None = None
    backend: Annotated[
        BackendConfig, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)
    ] = BackendConfig()
    faults: Annotated[Faults | None, BeforeValidator(from_list)] = None

    @model_validator(mode="before")
    @classmethod
    def _kept_by_level(cls, data: Any) -> Any:
        """Keep no update by default where only their sum is private."""
        privacy = data.get("privacy") if isinstance(data, Mapping) else None
        central = isinstance(privacy, Mapping) and privacy.get("level") == "client"
        return {"retention": "none", **data} if central else data

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if problems := list(_problems(self)):
            raise ValueError("\n".join(problems))
        return self

    @property
    def local_steps(self) -> int | None:
        """Optimizer steps a round; None where ``epochs`` says it. 10 under DP-SGD by default."""
        return self.steps or (10 if self.dp_sgd else None)

    @property
    def dp_sgd(self) -> PrivacyConfig | None:
        """Privacy of examples, at every client."""
        return self.privacy if self.privacy and self.privacy.level == "example" else None

    @property
    def client_level(self) -> PrivacyConfig | None:
        """Privacy of whole clients, in their sum."""
        return self.privacy if self.privacy and self.privacy.level == "client" else None

    @property
    def keyed_by_clients(self) -> bool:
        """Whether noise comes from keys of the clients' own."""
        shared = self.client_level is not None and self.client_level.noise_shares is not None
        return self.dp_sgd is not None or shared

    @property
    def judge(self) -> Stop:
        """Which metric makes a version the best."""
        return self.stop or Stop(metric=self.metrics[0])

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an evaluation measures; entities only where the tags mark some."""
        found = METRICS[self.task]
        if self.task == "token-classification" and not is_bio(self.labels):
            return tuple(name for name in found if not name.startswith("entity_"))
        return found

    def checked_plugins(self) -> dict[str, Any]:
        """Return every plug-in choice, parsed.

        Raises:
            BadConfig: naming the first that is unknown or wrongly set.
        """
        try:
            return {
                "adapter": self.adapter.checked("adapter"),
                "strategy": self.strategy.checked("strategy"),
                "optimizer": self.optimizer.checked("optimizer"),
                "regularizers": tuple(r.checked("regularizer") for r in self.regularizers),
                "uplink": tuple(one.checked("encoding") for one in self.uplink),
                "loggers": tuple(one.checked("logger") for one in self.loggers),
            }
        except (UnknownPlugin, BadOptions) as error:
            raise BadConfig(str(error)) from None

    def model_spec(self, base_hash: str = "") -> ModelSpec:
        """Return the base model as clients load it."""
        return ModelSpec(
            id=self.model.id,
            kind=self.task,
            revision=self.model.revision,
            hash=base_hash,
            labels=self.labels,
            pooling=self.model.pooling,
            max_length=self.model.max_length,
            quantization=self.model.quantization,
            compute_dtype=self.model.compute_dtype,
            gradient_checkpointing=self.model.gradient_checkpointing,
        )


def _problems(config: RunConfig) -> Iterable[str]:
    """Yield a sentence for each combination that makes no sense."""
    yield from _label_problems(config)
    yield from config.round_problems()
    c = config
    if c.steps is not None and c.epochs is not None:
        yield "give steps or epochs, not both"
    yield from _privacy_problems(c)
    if c.start != "fresh" and c.start_from is None:
        yield f"start: {c.start} needs start_from, the version to start from"
    if c.backend.name == "superlink" and c.deadline_s < LEAST_DEADLINE_S:
        yield (
            f"deadline_s: must be at least {LEAST_DEADLINE_S:g} with backend: superlink, where a "
            f"site that was idle asks for orders every 3 s, got {c.deadline_s:g}"
        )
    for key, wanted in (("stop", c.stop is not None), ("select: best", c.select == "best")):
        if wanted and c.evaluate is None and c.judge.metric != TRAIN_LOSS:
            yield f"{key}: there is nothing to judge versions by; give evaluate, held-back data"
    if c.judge.metric not in (*c.metrics, TRAIN_LOSS):
        allowed = ", ".join((*c.metrics, TRAIN_LOSS))
        yield f"stop.metric: {c.task} is not scored by {c.judge.metric!r} ({allowed})"
    if c.head == "personal" and c.evaluate is not None:
        yield "evaluate: with head: personal every client has its own head; leave evaluate out"
    yield from score_problems(c)
    for key, names in (
        ("regularizers", [one.name for one in c.regularizers]),
        ("loggers", [one.name for one in c.loggers]),
        ("clients.names", c.clients.names or ()),
    ):
        if _repeats(names):
            what = "a client is named" if key == "clients.names" else "one is given"
            yield f"{key}: {what} twice"
    yield from _fault_problems(c)


def _privacy_problems(c: RunConfig) -> Iterable[str]:
    if c.client_level:
        yield from c.one_sum_problems()
        if c.client_level.noise_shares is not None and c.uplink:
            yield (
                "uplink: with privacy.noise_shares the sum alone is private, and an encoding is of "
                "each update by itself; updates are whole numbers of 32 bits already, so leave it "
                "out"
            )
    if c.judge.metric == TRAIN_LOSS and c.privacy and c.privacy.report is None:
        yield (
            "stop.metric: train_loss is what clients' data say, and under privacy no loss leaves "
            "them but in noise that costs: set privacy.report.loss (at level: example), or judge "
            "by evaluate, held-back data"
        )
    if c.dp_sgd and c.epochs is not None:
        yield (
            "epochs: under privacy a round has a fixed number of steps, because passes over the "
            "data would reveal its exact size; give steps"
        )
    if c.dp_sgd and c.dp_sgd.per_unit > c.microbatch:
        yield (
            f"privacy.per_unit: {c.dp_sgd.per_unit} examples that are clipped as one must fit into "
            f"a microbatch, which holds {c.microbatch}; raise microbatch, or lower per_unit"
        )
    if c.privacy and c.accept_unbounded is not None:
        yield "accept_unbounded: it is for a run without privacy; leave one of them out"


def _fault_problems(c: RunConfig) -> Iterable[str]:
    if c.faults is not None:
        simulated, inline = c.clients.simulate is not None, c.backend.here == "inline"
        yield from fault_problems(c.faults, rounds=c.rounds, simulated=simulated, inline=inline)


def _label_problems(config: RunConfig) -> Iterable[str]:
    c = config
    if c.task != "causal-lm" and len(c.labels) < 2:
        yield f"labels: {c.task} needs the declared label set, at least two labels"
    if c.task == "causal-lm" and (c.labels or c.task_labels):
        yield "labels: causal-lm has no labels; leave labels and task_labels out"
    if c.task == "token-classification":
        problem = scheme_problem(c.labels, c.task_labels)
        if problem is not None:
            yield problem
        if c.model.pooling != "auto":
            yield (
                f"model.pooling: {c.task} has a vector for each token and pools none, got "
                f"{c.model.pooling!r}; leave it out"
            )
    if _repeats(c.labels):
        yield "labels: the label set names a label twice"
    unknown = [label for label in c.task_labels if label not in c.labels]
    if unknown:
        yield f"task_labels: {unknown[0]!r} is not in labels ({', '.join(c.labels)})"


def _repeats(names: Sequence[str]) -> bool:
    return len(set(names)) < len(names)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``KEY.PATH=VALUE`` overrides and check everything.

    Raises:
        BadConfig: with a line for each mistake.
    """
    return parse_config(read_document(path), overrides)


def read_document(path: str | Path, hint: str = "weft init writes one") -> dict[str, Any]:
    """Return the mapping in a YAML file, unchecked.

    Args:
        path: the file's.
        hint: how to come by such a one.

    Raises:
        BadConfig: if there is none.
    """
    try:
        return mapping_in(Path(path), hint, "name: task-1")
    except BadFile as error:
        raise BadConfig(str(error)) from None


def parse_config(document: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Return the checked config in ``document`` after ``overrides``.

    Raises:
        BadConfig: with a line for each mistake.
    """
    merged = _plain(document)
    for override in overrides:
        _override(merged, override)
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise BadConfig("\n".join(_sentence(e) for e in error.errors())) from None
    except UnicodeEncodeError:  # pydantic cannot write it into its message either
        _refuse_unrecordable(merged)
        raise
    config.checked_plugins()
    _refuse_unrecordable(merged)
    return config


def _refuse_unrecordable(document: Mapping[str, Any]) -> None:
    """Refuse what cannot be on a run's record, which is JSON.

    Raises:
        BadConfig: naming the first place of it.
    """
    try:
        canonical_json(document, "the config")
    except NotJson as error:
        raise BadConfig(str(error)) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def with_values(document: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``document`` with values at dotted paths, as ``--set`` puts them; shorter paths first.

    Raises:
        BadConfig: if a path leads through what is not a mapping.
    """
    merged = _plain(document)
    for path, value in sorted(values.items(), key=lambda item: (item[0].count("."), item[0])):
        _put(merged, path.split("."), _plain(value), path)
    return dict(merged)


def _override(document: dict[str, Any], text: str) -> None:
    """Apply one ``--set path.to.key=value``; the value is read as YAML."""
    path, equals, raw = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise BadConfig(f"--set {text!r} must read path.to.key=value, such as rounds=20")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise BadConfig(f"--set {path}: the value is not YAML ({error})") from None
    _put(document, keys, value, f"--set {text!r}")


def _put(document: dict[str, Any], keys: Sequence[str], value: Any, what: str) -> None:
    inner = document
    for depth, key in enumerate(keys[:-1]):
        below = inner.get(key)
        if isinstance(below, str):  # a short form, such as strategy: fedsvd
            below = {("id" if key == "model" else "name"): below}
        elif below is None:
            below = _default(key)
        if not isinstance(below, dict):
            raise BadConfig(f"{what}: {'.'.join(keys[: depth + 1])} is not a mapping")
        inner[key] = below
        inner = below
    inner[keys[-1]] = value


def _default(key: str) -> dict[str, Any]:
    """Return what an override inside an absent section starts from: the default's name."""
    field = RunConfig.model_fields.get(key)
    default = field.default if field else None
    return {"name": default.name} if isinstance(default, Choice) else {}


def _sentence(error: Any) -> str:
    """Return one pydantic error as a line: where, what is wrong, what is allowed."""
    where = ".".join(str(part) for part in error["loc"])
    kind, message = error["type"], str(error["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        owner: type[BaseModel] | None = RunConfig
        known = list(RunConfig.model_fields)
        for part in error["loc"][:-1]:
            field = None if owner is None else owner.model_fields.get(str(part))
            owner = None if field is None else _model_of(field.annotation)
            known = [] if owner is None else list(owner.model_fields)
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        if not close and len(error["loc"]) > 1 and error["loc"][-1] in RunConfig.model_fields:
            hint = "; it stands at the top, beside name and rounds"
        allowed = f" (options: {', '.join(known)})" if known and not close else ""
        return f"{where}: there is no such option{hint}{allowed}"
    if kind == "missing":
        return f"{where}: is required"
    if kind == "value_error":
        return f"{where}: {message}" if where else message
    if where == "name":
        return (
            "name: must be 1 to 64 lower-case letters, digits, '.', '_' and '-', "
            f"got {error['input']!r}"
        )
    return f"{where}: {message[:1].lower()}{message[1:]}, got {error['input']!r}"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
