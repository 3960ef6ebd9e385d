"""node.yaml: who a site is, which data and base models it has, and what runs may do with them."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from clients.sources import BadDataURI, is_public, parse_uri, parts_of, several
from clients.yaml_files import BadFile, mapping_in

_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
_ADDRESS = r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9][A-Za-z0-9.-]*):[0-9]{1,5}$"
_HERE = ("127.0.0.1", "localhost", "[::1]")

Name = Annotated[str, StringConstraints(pattern=_NAME)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=200)]
BaseHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class BadSettings(ValueError):
    """A node.yaml that cannot be used; the message has a line for each mistake."""


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class DataSet(_Section):
    """A data set as it lies at the site. Only its name, and what a join file says, is told.

    Attributes:
        uri: where the records are; a relative path is relative to node.yaml.
        fields: weft's column names to the file's own.
        unit: the source's own name of the column that says whose a record is; empty where each
            record is somebody's by itself. Runs with privacy must hide this.
        population: whose data they are; data sets of one population share a budget.
        public: whether everyone may have them.
        holdout: the share that is never trained on, in [0, 1).
        epsilon: what all runs together may spend, > 0; None sets no bound.
        delta: at this delta.
    """

    uri: str
    fields: dict[Text, Text] = Field(default_factory=dict)
    unit: str = Field(default="", max_length=128)
    population: Text = ""
    public: bool = False
    holdout: float = Field(default=0.0, ge=0, lt=1)
    epsilon: float | None = Field(default=None, gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)

    @field_validator("uri")
    @classmethod
    def _known(cls, uri: str) -> str:
        try:
            schemes = {parse_uri(part).scheme for part in parts_of(uri)}
        except BadDataURI as error:
            raise ValueError(str(error)) from None
        if "site" in schemes:
            raise ValueError("site: is how others name this data set; write where it lies")
        return uri

    @model_validator(mode="after")
    def _consistent(self) -> DataSet:
        if self.unit in ("example", "client"):
            raise ValueError(
                f"unit {self.unit!r} means something else in a run; name the column with fields"
            )
        if is_public(self.uri) and not self.public:
            raise ValueError("builtin: data are everyone's already; write public: true")
        return self


class Policy(_Section):
    """What the site lets runs do. What is not allowed here is refused, with a reason.

    Attributes:
        adapters: names of adapter methods; None for any.
        strategies: names of strategies; None for any.
        without_privacy: whether runs may train on and score this node's private data without
            differential privacy; what they learn is not bounded then.
        trust_coordinator_noise: whether client-level DP counts whose noise the coordinator makes,
            which sees each update before it does; and whether noise that clients make in shares
            counts as the whole that it is in their sum, though it sees each update by itself.
        min_noise_multiplier: of the noise that this node itself adds, > 0; None for any.
        max_epsilon_per_run: that one run may spend of a population, > 0; None for any. Whoever
            begins runs can begin another: what bounds all of them is the data set's epsilon.
        insecure_seed: whether runs may make the noise from a seed that everybody knows: tests.
        max_steps: of an assignment.
        max_epochs: of an assignment that says no steps.
        max_batch_size: examples a step.
        max_microbatch: examples in memory at once.
        max_length: tokens of an example.
        max_threads: that an assignment may compute with.
        max_order_mb: of an order with all its tensors, in units of 2^20 bytes.
    """

    adapters: tuple[Text, ...] | None = None
    strategies: tuple[Text, ...] | None = None
    without_privacy: bool = False
    trust_coordinator_noise: bool = False
    min_noise_multiplier: float | None = Field(default=None, gt=0)
    max_epsilon_per_run: float | None = Field(default=None, gt=0)
    insecure_seed: bool = False
    max_steps: int = Field(default=10_000, ge=1)
    max_epochs: float = Field(default=10.0, gt=0)
    max_batch_size: int = Field(default=65_536, ge=1)
    max_microbatch: int = Field(default=1_024, ge=1)
    max_length: int = Field(default=8_192, ge=1)
    max_threads: int = Field(default=64, ge=1)
    max_order_mb: int = Field(default=2_048, ge=1)


class Settings(_Section):
    """A whole node.yaml, with absolute paths.

    Attributes:
        name: of the node.
        superlink: host and port where it dials in.
        root_certificates: PEM file of who may have signed the SuperLink's certificate; None for
            whom the system trusts.
        insecure: dial in without TLS; on this machine only.
        key: file of the private key.
        labels: of the site, such as ``{"region": "north"}``.
        models: folders of base models by hash, as ``weft node models FOLDER`` prints them.
        data: data sets by the names that others know them by.
        policy: what runs may do.
        state: folder of the site's private state and its ledger.
    """

    name: Name
    superlink: Annotated[str, StringConstraints(pattern=_ADDRESS)]
    root_certificates: Path | None = None
    insecure: bool = False
    key: Path
    labels: dict[Text, Text] = Field(default_factory=dict)
    models: dict[BaseHash, Path] = Field(min_length=1)
    data: dict[Name, DataSet] = Field(min_length=1, max_length=100)
    policy: Policy = Policy()
    state: Path = Path("state")
    _file: Path = PrivateAttr(default=Path("node.yaml"))

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.insecure and self.superlink.rpartition(":")[0] not in _HERE:
            raise ValueError(
                f"insecure: {self.superlink} is another machine, and without TLS anyone between "
                "can pass for it; leave insecure out"
            )
        if self.insecure and self.root_certificates is not None:
            raise ValueError("insecure: there are root_certificates, so leave insecure out")
        budgets: dict[str, tuple[str, tuple[float | None, float]]] = {}
        for name, data in self.data.items():
            if data.epsilon is None and not data.public and not self.policy.without_privacy:
                raise ValueError(
                    f"data.{name}: epsilon is required: what all runs together may spend on it; "
                    "of data that everyone may have, write public: true"
                )
            own = (data.epsilon, data.delta)
            other, theirs = budgets.setdefault(self.population(name), (name, own))
            if own != theirs:
                raise ValueError(
                    f"data.{name}: epsilon and delta must be those of data.{other}, which is of "
                    f"the same population {self.population(name)!r} and shares its budget"
                )
        return self

    @property
    def file(self) -> Path:
        """Where it was read."""
        return self._file

    def client(self, data_set: str) -> str:
        """Return what a data set's client is called: as the node, which may offer several."""
        return self.name if len(self.data) == 1 else f"{self.name}.{data_set}"

    def population(self, data_set: str) -> str:
        """Return whose data a data set holds."""
        return self.data[data_set].population or self.client(data_set)


def load_settings(path: str | Path) -> Settings:
    """Return what a node.yaml says.

    Raises:
        BadSettings: with a line for each mistake, naming file and key; also where others may read
            the private key.
    """
    file = Path(path).expanduser().absolute()
    try:
        document = mapping_in(file, "weft node init writes one", "name: clinic-north")
    except BadFile as error:
        raise BadSettings(str(error)) from None
    settings = parse_settings(document, file)
    refuse_shown_key(settings.key, f"{file}: key")
    return settings


def parse_settings(document: Mapping[str, Any], file: Path) -> Settings:
    """Return what a node.yaml with this content would say; looks at no file.

    Args:
        document: the content.
        file: where it is, or would be.

    Raises:
        BadSettings: with a line for each mistake, naming file and key.
    """
    try:
        settings = Settings.model_validate(document)
    except ValidationError as error:
        lines = [f"{file}: {_sentence(one)}" for one in error.errors(include_url=False)]
        raise BadSettings("\n".join(lines)) from None
    settings = _anchored(settings, file.parent)
    settings._file = file
    return settings


def refuse_shown_key(key: Path, where: str) -> None:
    """Refuse a private key that somebody else may read; one that is not there yet may come.

    Args:
        key: its file.
        where: what names it, for the message.

    Raises:
        BadSettings: if others may read it.
    """
    try:
        status = key.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise BadSettings(f"{where}: {key} cannot be read ({error.strerror})") from None
    if status.st_mode & 0o077:
        raise BadSettings(
            f"{where}: others may read {key} (mode {status.st_mode & 0o777:04o}); run: "
            f"chmod 600 {key}"
        )


def _anchored(settings: Settings, folder: Path) -> Settings:
    """Return settings with every path absolute: a relative one is relative to ``folder``."""

    def place(path: Path) -> Path:
        return Path(os.path.normpath(folder / path.expanduser()))

    roots = settings.root_certificates
    return settings.model_copy(
        update={
            "root_certificates": None if roots is None else place(roots),
            "key": place(settings.key),
            "models": {digest: place(path) for digest, path in settings.models.items()},
            "state": place(settings.state),
            "data": {
                name: data.model_copy(update={"uri": _anchored_uri(data.uri, place)})
                for name, data in settings.data.items()
            },
        }
    )


def _anchored_uri(uri: str, place: typing.Callable[[Path], Path]) -> str:
    anchored = []
    for part in parts_of(uri):
        scheme, _, rest = part.partition(":")
        if scheme in ("jsonl", "csv", "parquet"):
            path, mark, options = rest.partition("?")
            part = f"{scheme}:{place(Path(path))}{mark}{options}"
        anchored.append(part)
    return several(anchored)


def _sentence(error: Any) -> str:
    """Return one pydantic error as a sentence: where, what is wrong, what is allowed."""
    where = ".".join(str(part) for part in error["loc"])
    kind, message = error["type"], str(error["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = _options(error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f" (options: {', '.join(known)})"
        return f"{where}: there is no such option{hint}"
    if kind == "missing":
        return f"{where}: is required"
    if kind == "value_error":
        return f"{where}: {message}" if where else message
    if kind == "string_pattern_mismatch":
        given = repr(error["input"])
        return (
            f"{where.removesuffix('.[key]')}: must be {_form(error['ctx']['pattern'])}, got {given}"
        )
    return f"{where}: {message[:1].lower()}{message[1:]}, got {error['input']!r}"


def _form(pattern: str) -> str:
    if pattern == _NAME:
        return "1 to 63 lower-case letters, digits, '.', '_' and '-'"
    if pattern == _ADDRESS:
        return "HOST:PORT, such as weft.example.org:443"
    return "the 64 hex digits that weft node models FOLDER prints"


def _options(where: tuple[Any, ...]) -> list[str]:
    """Return the options that there are at a place in node.yaml."""
    sections: Mapping[str, type[BaseModel]] = {"policy": Policy, "data": DataSet}
    section = sections.get(str(where[0]), Settings) if where else Settings
    return list(section.model_fields)
