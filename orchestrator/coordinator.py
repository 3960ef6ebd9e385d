"""Driving runs: claim one, keep its lease, drive it, record how it ended.

Every run is driven here, whether somebody waits for it or it was queued. Any number of processes,
on any machines that share the database and the home, may do it at once.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from clients.sources import MissingExtra
from clients.worker import perform
from orchestrator.backends.base import Backend, Perform
from orchestrator.backends.inline import InlineBackend
from orchestrator.closing import begin_closing, finish_closing
from orchestrator.config import RunConfig
from orchestrator.faulty import FaultyPerform, faulted
from orchestrator.federation import Cancelled, Federation, Observe, Paused, RoundFailed
from orchestrator.lease import Lease, driver_name, is_dead
from orchestrator.observers.of_run import watched
from orchestrator.plan import Plan
from orchestrator.recipes import drift
from orchestrator.retention import drop_after_close
from orchestrator.workspace import Workspace
from storage.ledger import LeaseLost, Ledger, RunRecord

LEASE_S = 60.0
MAX_CLAIMS = 5
_GETS_ON = frozenset({"committed", "queued", "released", "paused", "failed", "extended"})
"""What makes claims before it count no more: a round, an orderly end, or somebody's word."""
_LOG = logging.getLogger(__name__)


class RunBusy(RuntimeError):
    """Another process is driving this run."""


class Stopped(RuntimeError):
    """This process was asked to stop; the run it drove is back in the queue."""


class Drifted(RuntimeError):
    """What a run was begun with is not what is installed here."""


class ClaimedInVain(RuntimeError):
    """Whoever drove the run died of it, or with it, time and again."""


@dataclass(frozen=True, slots=True)
class Driving:
    """How a process drives runs.

    Attributes:
        backend: where clients train; by default what each run's config asks for.
        lease_s: seconds until a run of a driver that died is another's to claim, > 0.
        stop: set it to stop at the next event and put the run back into the queue.
        max_claims: after so many claims without a round committed in between a run fails, >= 1;
            None for any number.
        accept_drift: whether a run goes on that another weft, library or machine began.
    """

    backend: Backend | None = None
    lease_s: float = LEASE_S
    stop: threading.Event = field(default_factory=threading.Event)
    max_claims: int | None = MAX_CLAIMS
    accept_drift: bool = False


@dataclass(frozen=True, slots=True)
class Serving:
    """What a coordinator does with the queue.

    Attributes:
        limits: how many runs with a label, written ``key=value``, may be driven at once.
        once: whether to end after one look at the queue, and the run that it found.
        until_idle: whether to end when no run waits and none is being driven, by anyone.
        poll_s: seconds between looks at an empty queue, > 0.
        after: called with each run that was driven, however it ended.
        idle: called when nothing waits, at once and then every ``lease_s`` at most; it may queue.
    """

    limits: Mapping[str, int] = field(default_factory=dict)
    once: bool = False
    until_idle: bool = False
    poll_s: float = 1.0
    after: Callable[[RunRecord], None] = lambda record: None
    idle: Callable[[], None] = lambda: None


def planned(ledger: Ledger, record: RunRecord) -> Plan:
    """Return a run's plan with as many rounds as it has by now: it may have been extended."""
    plan = Plan.from_json(ledger.plan(record.id))
    return replace(plan, config=plan.config.model_copy(update={"rounds": record.rounds}))


def claim(workspace: Workspace, record: RunRecord, lease_s: float = LEASE_S) -> RunRecord:
    """Make this process the driver of a run, at once if its driver was a process here and is gone.

    Returns:
        The run's record, with the token.

    Raises:
        RunBusy: if another process is driving it, or died elsewhere and its lease is not over.
    """
    queue = workspace.ledger.queue
    if record.status == "running" and record.owner is not None and is_dead(record.owner):
        with suppress(LeaseLost):  # somebody was faster
            queue.release(record.id, record.token, "the process that drove it is gone")
    mine = queue.claim(driver_name(), lease_s, run=record.id)
    if mine is None:
        now = workspace.ledger.run(record.id)
        until = f" until {now.lease_until:%H:%M:%S} UTC at least" if now.lease_until else ""
        raise RunBusy(
            f"another process is driving run {now.id} ({now.owner}){until}; wait for it with: "
            f"weft runs wait {now.id}; or stop it with: weft runs pause {now.id}"
        )
    return mine


def drive(workspace: Workspace, record: RunRecord, observe: Observe, driving: Driving) -> str:
    """Drive a run that this process has claimed, record how it ends, return its final version.

    Args:
        workspace: where.
        record: the run as its claim gave it, with the token.
        observe: called with each event.
        driving: how.

    Raises:
        RoundFailed: if a round got no update; the run can be resumed.
        Paused, Cancelled: if somebody asked for it.
        Stopped: if this process was asked to stop.
        ClaimedInVain: if the run was claimed too often.
        Drifted: if what it was begun with is not what is here; nothing more was written.
        LeaseLost: if somebody else drives the run by now; nothing more was written.
    """
    ledger = workspace.ledger
    with Lease(ledger.queue, record.id, record.token, driving.lease_s):
        try:
            finish_closing(workspace.home, ledger)  # what a driver that died has left to do
            _check_claims(ledger, record.id, driving.max_claims)
            if not driving.accept_drift:
                _check_drift(workspace, record)
            return _watched(workspace, record, observe, driving)
        except (Exception, KeyboardInterrupt) as error:
            interrupted = isinstance(error, KeyboardInterrupt) and driving.stop.is_set()
            with suppress(LeaseLost):
                _record_end(workspace, record, Stopped() if interrupted else error)
            raise


def _check_claims(ledger: Ledger, run: str, most: int | None) -> None:
    """Refuse a run that others claimed in vain, before it can do to us what it did to them.

    Raises:
        ClaimedInVain: if it was ``most`` times or more.
    """
    owners: list[str] = []
    for event in ledger.events(run, kinds={"claimed", *_GETS_ON}):
        owners = [] if event.kind in _GETS_ON else [*owners, event.data["owner"]]
    others = owners[:-1]
    if most is not None and len(others) >= most:
        raise ClaimedInVain(
            f"run {run} was claimed {len(others)} times without a round committed in between: its "
            f"drivers died or were lost, the last was {others[-1]}. See what ended them (memory, "
            f"say), mend it and go on with: weft run --resume {run}"
        )


def _check_drift(workspace: Workspace, record: RunRecord) -> None:
    """Refuse to go on with other libraries: the run would end at another version than it would.

    Raises:
        Drifted: if its last version was made with others.
    """
    found = drift(workspace.store.version(record.version).recipe) if record.version else []
    if found:
        raise Drifted(
            f"run {record.id} was begun with {'; '.join(found)}, and would not end at the version "
            "that it would have: go on where it was begun, or here with: "
            f"weft run --resume {record.id} --accept-drift"
        )


def _watched(workspace: Workspace, record: RunRecord, observe: Observe, driving: Driving) -> str:
    """Drive a run; who watches it is told if it fails."""
    plan = planned(workspace.ledger, record)
    with watched(plan, workspace.ledger, workspace.home, observe) as watching:
        try:
            seen = _stoppable(watching, driving.stop)
            seen("run", {"run": record.id, "name": record.name, "plan": plan})
            return _driven(workspace, record, plan, seen, driving.backend)
        except (Exception, KeyboardInterrupt) as error:
            if not isinstance(error, (Paused, Cancelled, LeaseLost)):
                watching("failed", {"reason": str(error) or type(error).__name__})
            raise


def _driven(
    workspace: Workspace, record: RunRecord, plan: Plan, seen: Observe, given: Backend | None
) -> str:
    queue = workspace.ledger.queue
    backend = given or _made(workspace, plan)
    used = backend
    try:
        if plan.config.faults:
            workspace, used = faulted(workspace, plan, backend, seen)
        federation = Federation(
            plan,
            workspace.store,
            workspace.ledger,
            used,
            workspace.home,
            observe=seen,
            token=record.token,
            wanted=partial(queue.wanted, record.id, record.token),
        )
        return federation.run()
    finally:
        if given is None:
            backend.close()


def serve(
    workspace: Workspace,
    serving: Serving,
    driving: Driving,
    watch: Callable[[], AbstractContextManager[Observe]],
) -> int:
    """Claim queued runs and drive them, one after another; return how many.

    How a run ends is on its record, and is no error here.

    Args:
        workspace: whose queue.
        serving: what to do with it.
        driving: how to drive; its ``stop`` also ends the waiting.
        watch: called for each run; what it enters is shown the run's events.
    """
    queue, stop, count = workspace.ledger.queue, driving.stop, 0
    idle_again = -math.inf
    while not stop.is_set():
        record = queue.claim(driver_name(), driving.lease_s, serving.limits)
        if record is None:
            if time.monotonic() >= idle_again:
                serving.idle()
                idle_again = time.monotonic() + driving.lease_s
                continue
            if serving.once or (serving.until_idle and queue.is_idle()):
                break
            stop.wait(serving.poll_s)
            continue
        count += 1
        with watch() as observe:
            drive_to_an_end(workspace, record, observe, driving)
        serving.after(record)
        if serving.once:
            break
    return count


def _made(workspace: Workspace, plan: Plan) -> Backend:
    """Return the backend of a run, with what it needs of the workspace to reach sites."""
    local = make_backend(plan.config, len(plan.participants))
    if plan.config.backend.name != "superlink":
        return local
    from orchestrator.backends.mixed import MixedBackend
    from orchestrator.sites import sites_backend  # importing Flower takes a second

    try:
        return MixedBackend(local, sites_backend(plan, workspace.ledger, workspace.home))
    except BaseException:
        local.close()
        raise


def make_backend(config: RunConfig, num_clients: int) -> Backend:
    """Return what runs here as a run's ``config`` asks, with workers that suffer its faults.

    Args:
        config: of the run.
        num_clients: how many there are to serve, >= 1.

    Raises:
        clients.sources.MissingExtra: if Ray is not installed.
        orchestrator.backends.ray.RayUnavailable: if Ray cannot be started or joined.
    """
    chosen = config.backend
    work: Perform = partial(perform, checkpoint_s=chosen.checkpoint_s)
    if config.faults:
        work = FaultyPerform(config.faults, work)
    if chosen.here == "inline":
        return InlineBackend(work)
    if find_spec("ray") is None:
        raise MissingExtra(
            "backend ray needs the package ray, which is not installed; run: pip install "
            "'weft[ray]', or set backend.name: inline"
        )
    from orchestrator.backends.ray import RayBackend  # importing Ray takes a second

    return RayBackend(
        chosen.workers,
        config.threads,
        chosen.gpus_per_worker,
        chosen.address,
        perform=work,
        heartbeat_s=chosen.heartbeat_s,
        grace_s=chosen.grace_s,
        recycle_above_mb=chosen.recycle_above_mb,
        clients=num_clients,
    )


def drive_to_an_end(
    workspace: Workspace, record: RunRecord, observe: Observe, driving: Driving
) -> None:
    """Drive a run that this process has claimed; how it ends is on its record, and no error.

    Args:
        workspace: where.
        record: the run as its claim gave it, with the token.
        observe: called with each event.
        driving: how.
    """
    try:
        drive(workspace, record, observe, driving)
    except (RoundFailed, Paused, Cancelled, Stopped, ClaimedInVain, Drifted, LeaseLost) as error:
        _LOG.warning("%s", error)
    except Exception as error:  # one run's error must not keep the others waiting
        _LOG.error("run %s failed: %s", record.id, type(error).__name__, exc_info=True)


def _stoppable(observe: Observe, stop: threading.Event) -> Observe:
    """Return ``observe`` that raises after an event if the process is to stop."""

    def seen(kind: str, data: Mapping[str, Any]) -> None:
        observe(kind, data)
        if stop.is_set() and kind != "completed":
            raise Stopped("the coordinator was asked to stop; its run is back in the queue")

    return seen


def _record_end(workspace: Workspace, record: RunRecord, error: BaseException) -> None:
    """Record how a run stopped short of its end.

    Raises:
        LeaseLost: if somebody else drives it by now.
    """
    run, token, ledger, home = record.id, record.token, workspace.ledger, workspace.home
    if isinstance(error, LeaseLost):
        return
    if isinstance(error, Stopped):
        ledger.queue.release(run, token, "the coordinator was asked to stop")
    elif isinstance(error, Paused):
        ledger.record(run, "paused", {}, token=token, status="paused")
    elif isinstance(error, Cancelled):
        drop_after_close(workspace.store, run, home, record.config)
        begin_closing(home, run, record.config)
        ledger.record(run, "cancelled", {}, token=token, status="cancelled")
        finish_closing(home, ledger)
    else:
        reason = str(error) or type(error).__name__
        ledger.record(run, "failed", {"reason": reason}, token=token, status="failed", error=reason)
