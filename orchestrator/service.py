"""The use cases: what people do with weft. The CLI and any other face only parse and print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clients.assignment import PluginChoice
from clients.into_base import IntoBase
from orchestrator.backends.base import Backend
from orchestrator.bases import remember_base
from orchestrator.config import RunConfig
from orchestrator.coordinator import (
    Driving,
    RunBusy,
    Serving,
    claim,
    drive,
    make_backend,
    serve,
)
from orchestrator.deploying import YankResult, alias_log, name_of, promote, rollback, yank
from orchestrator.differences import BadDiff, Diff, diff
from orchestrator.epsilons import spent_by_population
from orchestrator.exporting import AsLora, ForVllm, export
from orchestrator.federation import Observe
from orchestrator.importing import import_adapter
from orchestrator.launch import make_plan
from orchestrator.lease import driver_name
from orchestrator.merge_draft import draft
from orchestrator.merge_parts import Allow
from orchestrator.observers.of_run import observers_of
from orchestrator.provenance import (
    Ancestry,
    BadSelection,
    Selection,
    deployed_with,
    descendants,
    lineage,
)
from orchestrator.registering import register_client, register_clients
from orchestrator.replay import replay
from orchestrator.retraining import retrain
from orchestrator.signing import admitted, signed
from orchestrator.steering import (
    RunRefused,
    cancel,
    clone,
    extend,
    pause,
    requeue,
)
from orchestrator.versions import (
    EvaluationFailed,
    evaluate,
    evaluate_many,
    use,
)
from orchestrator.watching import WaitedTooLong, log, wait
from orchestrator.withdrawing import withdraw
from orchestrator.workspace import Workspace, open_workspace
from storage.ledger import Queueing, RunRecord

__all__ = [
    "Allow",
    "Ancestry",
    "AsLora",
    "BadDiff",
    "BadSelection",
    "Diff",
    "Driving",
    "EvaluationFailed",
    "ForVllm",
    "IntoBase",
    "RunBusy",
    "RunRefused",
    "Selection",
    "Serving",
    "WaitedTooLong",
    "Workspace",
    "YankResult",
    "alias_log",
    "cancel",
    "clone",
    "deployed_with",
    "descendants",
    "diff",
    "evaluate",
    "evaluate_many",
    "export",
    "extend",
    "import_adapter",
    "launch",
    "lineage",
    "log",
    "make_backend",
    "merge",
    "name_of",
    "open_workspace",
    "pause",
    "promote",
    "register_client",
    "register_clients",
    "replay",
    "requeue",
    "resume",
    "retrain",
    "rollback",
    "serve",
    "signed",
    "spent_by_population",
    "submit",
    "use",
    "wait",
    "withdraw",
    "yank",
]

# --- launch -----------------------------------------------------------------------------------


def launch(
    workspace: Workspace,
    config: RunConfig,
    observe: Observe = lambda kind, data: None,
    backend: Backend | None = None,
    queueing: Queueing | None = None,
) -> str:
    """Run a federation from start to end and return the id of its final version.

    Args:
        workspace: where.
        config: what to run.
        observe: called with each event.
        backend: where clients train; by default what the config asks for.
        queueing: its labels count against limits while it goes on; nobody else claims it.

    Raises:
        BadConfig: if the config cannot be run; nothing was started.
        LoggerUnavailable, BadWebhook: if a logger or the webhook cannot be had; likewise.
        RoundFailed: if a round got no update; the run can be resumed.
    """
    mine = replace(queueing or Queueing(), owner=driver_name())
    record = _create(workspace, config, mine)
    return drive(workspace, record, observe, Driving(backend, mine.lease_s))


def submit(
    workspace: Workspace,
    config: RunConfig,
    queueing: Queueing | None = None,
    run: str | None = None,
) -> str:
    """Plan a run, put it into the queue and return its id; a coordinator drives it.

    What can be wrong is found now, and what the run starts from is settled now: the start version
    that a name stands for, the base model's hash, the clients, their sizes and their noise.

    Args:
        workspace: where.
        config: what to run.
        queueing: how it waits.
        run: its id; by default one that nobody has.

    Raises:
        BadConfig: if the config cannot be run; nothing was queued.
        BadLabels: if the labels are too long.
        RunExists: if the id is taken.
    """
    return _create(workspace, config, queueing, run).id


def _create(
    workspace: Workspace, config: RunConfig, queueing: Queueing | None, run: str | None = None
) -> RunRecord:
    for ref in filter(None, (config.start_from, *config.library)):
        admitted(workspace, ref)
    plan = make_plan(config, workspace.store, workspace.ledger, workspace.sites)
    plan = plan if run is None else replace(plan, run=run)
    observers_of(plan, workspace.home)  # what they need is missed before there is a run
    remember_base(workspace, plan.model)
    return workspace.ledger.create_run(
        plan.run,
        config.name,
        config=plan.config.model_dump(mode="json"),
        plan=plan.to_json(),
        rounds=plan.config.rounds,
        queueing=queueing,
    )


def resume(
    workspace: Workspace,
    run: str,
    observe: Observe = lambda kind, data: None,
    backend: Backend | None = None,
    accept_drift: bool = False,
) -> str:
    """Go on with a run after a crash or a failure; it ends at the version it would have.

    Args:
        workspace: where the run is.
        run: id, prefix or name.
        observe: called with each event.
        backend: where clients train; by default what the run's config asks for.
        accept_drift: go on also with another weft, library or machine than it was begun with; then
            it may end at another version.

    Returns:
        The id of its final version.

    Raises:
        UnknownRun: if there is no such run.
        RunBusy: if another process is driving it.
        RunRefused: if it was cancelled.
        Drifted: if what it was begun with is not what is here.
    """
    record = workspace.ledger.run(run)
    if record.status == "completed" and record.version is not None:
        return record.version
    if record.status != "cancelled":  # claimed as it is: in the queue, somebody could be faster
        record = claim(workspace, record)
    requeue(workspace, record.id)  # what people wanted of it before, they want no more
    return drive(
        workspace, record, observe, Driving(backend, max_claims=None, accept_drift=accept_drift)
    )


# --- merge ------------------------------------------------------------------------------------


def merge(
    workspace: Workspace,
    refs: Sequence[str],
    method: PluginChoice,
    into: str,
    weights: Sequence[float] | None = None,
    allow: Allow = Allow(),  # noqa: B008  (frozen)
) -> str:
    """Merge versions into a new version of name ``into`` and return its id.

    Args:
        workspace: where.
        refs: at least two versions of one base model.
        method: the merge and its options.
        into: the name that the result gets.
        weights: one per version; by default 1 for each, so that task adapters add up.
        allow: what else may be: different layers, what must be converted.

    Raises:
        BadMerge: if they do not belong together.
        Unsigned: if the signature policy does not let one be loaded.
        UnknownPlugin, BadOptions: if the merge is unknown or wrongly set.
    """
    version = draft(workspace, refs, method, weights, allow).commit(workspace)
    workspace.store.name(into, version)
    return version
