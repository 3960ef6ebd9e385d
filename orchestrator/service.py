"""The use cases: what people do with weft. The CLI and any other face only parse and print."""

from __future__ import annotations

import fcntl
import getpass
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clients import data, models
from clients.assignment import Assignment, DataSpec, ModelSpec, PluginChoice
from clients.evaluate import Evaluation
from clients.export import export_peft
from orchestrator.backends.base import Backend, Failure, complete
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BackendConfig, BadConfig, RunConfig, find_plugin
from orchestrator.federation import Federation, Observe
from orchestrator.launch import make_plan
from orchestrator.merging import (
    check_alike,
    common_stack,
    effective,
    merged_heads,
    split_head,
)
from orchestrator.observers.of_run import observers_of, watched
from orchestrator.plan import Plan
from orchestrator.recipes import merge_recipe
from orchestrator.spending import Epsilon, composed, epsilon_of_lineage, spend_from_row
from orchestrator.workspace import Workspace, base_of, open_workspace, remember_base
from storage.ledger import ClientRecord
from storage.lineage import Lineage, Version
from strategies.base import Broadcast, Tensors

__all__ = [
    "Ancestry",
    "EvaluationFailed",
    "RunBusy",
    "Workspace",
    "check_data",
    "evaluate",
    "evaluate_many",
    "export",
    "launch",
    "lineage",
    "make_backend",
    "merge",
    "name_of",
    "open_workspace",
    "promote",
    "register_client",
    "resume",
    "spent_by_population",
    "use",
]

_DELTA = 1e-5


class RunBusy(RuntimeError):
    """Another process is driving this run."""


class EvaluationFailed(RuntimeError):
    """A version could not be scored."""


# --- launch -----------------------------------------------------------------------------------


def launch(
    workspace: Workspace,
    config: RunConfig,
    observe: Observe = lambda kind, data: None,
    backend: Backend | None = None,
) -> str:
    """Run a federation from start to end and return the id of its final version.

    Raises:
        BadConfig: if the config cannot be run; nothing was started.
        LoggerUnavailable, BadWebhook: if a logger or the webhook cannot be had; likewise.
        RoundFailed: if a round got no update; the run can be resumed.
    """
    plan = make_plan(config, workspace.store, workspace.ledger)
    observers_of(plan, workspace.home)  # what they need is missed before there is a run
    workspace.ledger.create_run(
        plan.run,
        config.name,
        config=config.model_dump(mode="json"),
        plan=plan.to_json(),
        rounds=config.rounds,
    )
    remember_base(workspace, plan.model)
    return _drive(workspace, plan, observe, backend)


def resume(
    workspace: Workspace,
    run: str,
    observe: Observe = lambda kind, data: None,
    backend: Backend | None = None,
) -> str:
    """Go on with a run after a crash or a failure; it ends at the version it would have.

    Returns:
        The id of its final version.

    Raises:
        UnknownRun: if there is no such run.
        RunBusy: if another process is driving it.
    """
    record = workspace.ledger.run(run)
    if record.status == "completed" and record.version is not None:
        return record.version
    return _drive(workspace, Plan.from_json(record.plan), observe, backend)


def _drive(workspace: Workspace, plan: Plan, observe: Observe, backend: Backend | None) -> str:
    ledger, run = workspace.ledger, plan.run
    with (
        _sole_driver(workspace, run),
        watched(plan, ledger, workspace.home, observe) as observe,
    ):
        ledger.set_status(run, "running", error=None)
        observe("run", {"run": run, "name": plan.config.name, "plan": plan})
        used = backend
        try:
            used = used or make_backend(
                plan.config.backend, plan.config.threads, len(plan.participants)
            )
            federation = Federation(plan, workspace.store, ledger, used, workspace.home, observe)
            return federation.run()
        except (Exception, KeyboardInterrupt) as error:
            reason = str(error) or type(error).__name__
            ledger.set_status(run, "failed", error=reason)
            ledger.append(run, "failed", {"reason": reason})
            observe("failed", {"reason": reason})
            raise
        finally:
            if backend is None and used is not None:
                used.close()


def make_backend(config: BackendConfig, threads: int, num_clients: int) -> Backend:
    """Return the backend that ``config`` asks for.

    Raises:
        orchestrator.backends.ray.RayUnavailable: if Ray cannot be started or joined.
    """
    if config.name == "inline":
        return InlineBackend()
    from orchestrator.backends.ray import RayBackend  # importing Ray takes a second

    cores = os.cpu_count() or 1
    workers = config.workers or max(1, min(num_clients, cores // threads))
    return RayBackend(workers, threads, config.gpus_per_worker, config.address)


@contextmanager
def _sole_driver(workspace: Workspace, run: str) -> Iterator[None]:
    folder = workspace.home / "runs" / run
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusy(f"another process is driving run {run}; wait for it or stop it") from None
        yield


# --- clients ----------------------------------------------------------------------------------


def register_client(workspace: Workspace, record: ClientRecord, check: bool = True) -> ClientRecord:
    """Register a client node; without a declared size, it is counted and rounded.

    Args:
        workspace: where.
        record: the client.
        check: whether to look at its data set; a client elsewhere cannot be looked at from here.

    Raises:
        ClientExists: if the name is taken.
        data.DataNotFound: if its data set is not there.
        BadConfig: if its data set holds no readable record.
    """
    record = replace(record, data=data.absolute(record.data))
    if check:
        report = data.check(DataSpec(record.data, dict(record.fields)), None, None)
        if report.total == report.num_bad:
            why = f" ({report.problems[0]})" if report.problems else ""
            raise BadConfig(f"{record.data} holds no readable record{why}")
        if record.num_examples is None:
            record = replace(record, num_examples=_rounded(report.total))
    if data.is_public(record.data):
        record = replace(record, public=True)
    workspace.ledger.add_client(record)
    return record


def _rounded(count: int) -> int:
    """Return a count to two significant digits: an exact size tells that a record was added."""
    scale = int(10 ** max(0, len(str(count)) - 2))
    return max(1, round(count / scale) * scale)


def spent_by_population(workspace: Workspace, population: str) -> dict[str, Any]:
    """Return what a population has spent in all, as JSON; ``text`` says it in words."""
    rows = workspace.ledger.spends(population)
    budget = workspace.ledger.budget(population)
    if not rows:
        return {"epsilon": 0.0, "text": "nothing"}
    delta = budget[1] if budget else _DELTA
    spent = composed(population, [spend_from_row(r) for r in rows], delta)
    limit = f" of {budget[0]:g}" if budget else ""
    return {**asdict(spent), "text": f"{spent}{limit}, in {len(rows)} rounds"}


def check_data(
    spec: DataSpec, labels: Sequence[str], model: str | None, max_length: int
) -> data.DataReport:
    """Return what is in a data set and what is wrong with it.

    Args:
        spec: the data set.
        labels: the label set; empty to take labels as they are written.
        model: base model whose tokenizer counts lengths, or None.
        max_length: tokens kept of an example.
    """
    form = ModelSpec(model or "", "classification", labels=tuple(labels), max_length=max_length)
    tokenizer = models.tokenizer(form) if model else None
    return data.check(spec, form if labels else None, tokenizer)


# --- lineage ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ancestry:
    """What a version is made of.

    Attributes:
        lineage: versions and edges, down to the first.
        epsilons: the ε it has inherited, by population; each event counts once.
    """

    lineage: Lineage
    epsilons: tuple[Epsilon, ...]


def lineage(workspace: Workspace, ref: str) -> Ancestry:
    """Return a version's ancestors down to client updates, and what privacy it has cost.

    Raises:
        UnknownVersion: if there is no such version.
    """
    found = workspace.store.lineage(ref)
    epsilons = epsilon_of_lineage(v.recipe for v in found.nodes.values())
    return Ancestry(found, tuple(epsilons))


# --- merge ------------------------------------------------------------------------------------


def merge(
    workspace: Workspace,
    refs: Sequence[str],
    method: PluginChoice,
    into: str,
    weights: Sequence[float] | None = None,
) -> str:
    """Merge versions into a new version of name ``into`` and return its id.

    Args:
        workspace: where.
        refs: at least two versions of one base model.
        method: the merge and its options.
        into: the name that the result gets.
        weights: one per version; by default 1 for each, so that task adapters add up.

    Raises:
        BadMerge: if they do not belong together.
        UnknownPlugin, BadOptions: if the merge is unknown or wrongly set.
    """
    store = workspace.store
    if len(refs) < 2:
        raise BadConfig("a merge needs at least two versions")
    chosen = list(weights or [1.0] * len(refs))
    if len(chosen) != len(refs):
        raise BadConfig(f"give one weight per version: {len(refs)} versions, {len(chosen)} weights")
    plugin = find_plugin("merge", method.name)
    options = plugin.check(method.options)
    versions = [store.version(ref) for ref in refs]
    check_alike(versions, refs)
    stack = common_stack(versions)
    parts = [split_head(store.tensors(v.id)) for v in versions]
    adapter = plugin.build([adapter for adapter, _ in parts], chosen, **options)
    head = merged_heads([head for _, head in parts], versions, chosen)
    by_id = {v.id: v.recipe for v in versions}
    version = store.commit(
        {**adapter, **head},
        parents={v.id: "merge" for v in versions},
        recipe=merge_recipe(
            by_id,
            {v.id: w for v, w in zip(versions, chosen, strict=True)},
            PluginChoice(plugin.name, options),
            stack,
        ),
    )
    store.name(into, version)
    return version


def promote(workspace: Workspace, name: str, alias: str, ref: str, why: str = "") -> None:
    """Point ``name@alias`` at a version; the alias keeps its history.

    Raises:
        UnknownVersion: if there is no such version.
    """
    workspace.store.promote(name, alias, ref, who=getpass.getuser(), why=why)


def name_of(workspace: Workspace, ref: str) -> str:
    """Return the one name of a version.

    Raises:
        BadConfig: if it has none or several.
    """
    names = sorted({name.partition(":")[0] for name in workspace.store.version(ref).names})
    if len(names) != 1:
        raise BadConfig(f"{ref} has {len(names)} names ({', '.join(names)}); choose with --name")
    return names[0]


# --- use a version ----------------------------------------------------------------------------


def evaluate(
    workspace: Workspace,
    ref: str,
    dataset: DataSpec,
    model: str | None = None,
    backend: Backend | None = None,
) -> Evaluation:
    """Score a version on a data set, among all labels that the version has seen.

    Args:
        workspace: where the version is.
        ref: the version.
        dataset: what to score it on; its ``labels`` choose examples.
        model: where its base model lies now, if not where it was last seen.
        backend: where to run; by default in this process.

    Raises:
        UnknownVersion, models.ModelNotFound, data.DataNotFound: if one is not there.
        EvaluationFailed: if a worker failed, with its reason.
    """
    version = workspace.store.version(ref)
    return evaluate_many(workspace, [(version, dataset)], model, backend)[0]


def evaluate_many(
    workspace: Workspace,
    wanted: Sequence[tuple[Version, DataSpec]],
    model: str | None = None,
    backend: Backend | None = None,
) -> list[Evaluation]:
    """Score several versions, on several workers where the backend has them.

    Raises:
        EvaluationFailed: if one could not be scored.
    """
    assignments = [
        replace(use(workspace, version, dataset, model), client=str(number))
        for number, (version, dataset) in enumerate(wanted)
    ]
    used = backend or InlineBackend()
    found: dict[str, Evaluation] = {}
    for result in complete(used, assignments, 3600.0, lambda a: None):
        if isinstance(result, Failure):
            raise EvaluationFailed(f"the version cannot be scored: {result.reason}")
        if isinstance(result, Evaluation):
            found[result.client] = result
    return [found[a.client] for a in assignments]


def use(
    workspace: Workspace, version: Version, dataset: DataSpec, model: str | None = None
) -> Assignment:
    """Return the assignment that uses a version, stack and all, on a data set.

    Raises:
        EvaluationFailed: if its heads are personal.
        models.ModelNotFound: if nobody says where its base model is.
    """
    _refuse_personal(version)
    tensors = effective(workspace.store, version)
    return Assignment(
        action="evaluate",
        run="",
        client="",
        round=0,
        base=version.id,
        model=base_of(workspace, version, model),
        adapter=_as_it_is(version, tensors),
        broadcast=Broadcast(tensors),
        data=dataset,
        optimizer=PluginChoice(""),
        site=str(workspace.home / "sites"),
        head="freeze",
        labels=tuple(version.recipe["seen_labels"]),
    )


def _refuse_personal(version: Version) -> None:
    if version.recipe.get("training", {}).get("head") == "personal":
        raise EvaluationFailed(
            f"{version.id[:12]} has personal heads, which stay at the clients that trained them; "
            "it cannot be used without one: train with head: train or freeze"
        )


def _as_it_is(version: Version, tensors: Tensors) -> PluginChoice:
    """Return the adapter that holds exactly ``tensors``: a merge may cover more layers."""
    choice = version.recipe["adapter"]
    layers = sorted({k.removesuffix(".scaling") for k in tensors if k.endswith(".scaling")})
    # ranks come with the tensors; what else chose layers or ranks is of the first version alone
    reset: dict[str, Any] = {"layers": None, "rank_pattern": {}, "alpha_pattern": {}}
    return PluginChoice(choice["name"], {**choice["options"], **reset, "target_modules": layers})


def export(
    workspace: Workspace, ref: str, folder: str | Path, model: str | None = None
) -> list[Path]:
    """Write a version as a PEFT folder that peft, vLLM and the Hub load as is.

    A stacked version is exported whole: its factors and those underneath, concatenated.

    Raises:
        UnknownVersion: if there is no such version.
        FileExistsError: if the folder is not empty.
    """
    version = workspace.store.version(ref)
    _refuse_personal(version)
    spec = base_of(workspace, version, model)
    ancestry = lineage(workspace, version.id)
    return export_peft(
        Path(folder),
        tensors=effective(workspace.store, version),
        spec=spec,
        base_revision=spec.revision,
        card=_card(version, ancestry),
        extra={
            "version": version.id,
            "seen_labels": version.recipe["seen_labels"],
            "base_hash": spec.hash,
        },
    )


def _card(version: Version, ancestry: Ancestry) -> str:
    lines = [f"Version `{version.id}`.", ""]
    kinds = version.recipe["kind"]
    lines.append(f"Made by: {kinds}; {len(ancestry.lineage.nodes)} versions in its history.")
    clients = sorted(
        {leaf["client"] for v in ancestry.lineage.nodes.values() for leaf in v.recipe["updates"]}
    )
    lines.append(f"Trained at: {', '.join(clients) or 'nowhere'}.")
    for spent in ancestry.epsilons:
        lines.append(f"- {spent.population}: {spent}{', public data' if spent.public else ''}")
    return "\n".join(lines)
