"""Versions follow aliases: what an alias points at is loaded, switched to, and the old one let go.

A version is read and prepared on this thread, while the model goes on answering with the old one.
If it cannot be loaded, the old one stays, and the reason is said. If the store is out of reach,
everything stays as it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from clients.serving.bank import Bank
from clients.serving.classifying import Classifier
from orchestrator.serving.engine import Engine, Worker
from orchestrator.serving.loading import Loaded
from orchestrator.serving.shelf import Served, Shelf

_LOG = logging.getLogger(__name__)
RETRY_S = 10.0
"""Seconds after which a version that could not be loaded is tried again."""

REPEAT_S = 4.0
"""Seconds after which what was reported is said again."""

_Said = tuple[str | None, str | None]
Report = Callable[[str, str | None, str | None], None]
"""Told for an alias: which version alone answers for it now, and why it is not the one meant."""


@dataclass(frozen=True, slots=True)
class Model:
    """The base model with its adapters, and who runs it.

    Attributes:
        backbone: the base model.
        bank: its adapters.
        worker: runs it.
        engine: on whose thread all of these are touched.
    """

    backbone: object
    bank: Bank
    worker: Worker
    engine: Engine

    def put(self, loaded: Loaded) -> Served:
        """Lay a version beside the others, between two steps."""
        slot = self.engine.call(lambda: self._put(loaded)).result()
        spec = loaded.spec
        return Served(loaded.version, slot, spec.kind, spec.labels, spec.max_length)

    def drop(self, served: Served) -> None:
        """Let a version go, between two steps."""
        self.engine.call(lambda: self._drop(served.slot)).result()

    def _put(self, loaded: Loaded) -> int:
        slot = self.bank.put(loaded.changes)
        if loaded.head is not None and isinstance(self.worker, Classifier):
            self.worker.put_head(slot, loaded.head)
        return slot

    def _drop(self, slot: int) -> None:
        if isinstance(self.worker, Classifier):
            self.worker.drop_head(slot)
        self.bank.drop(slot)


@dataclass(frozen=True, slots=True)
class _Trouble:
    target: str
    reason: str
    until: float


class Follower:
    """Keeps what is served as the aliases have it.

    Args:
        pointers: name and alias by ``NAME@ALIAS``.
        pointing: asks the store which version a name's alias points at.
        load: reads the version that an alias points at.
        model: the base model and its adapters.
        shelf: what is served.
        report: told of each change, again if it raises, and every few seconds: it is alive.
    """

    def __init__(
        self,
        pointers: Mapping[str, tuple[str, str]],
        pointing: Callable[[str, str], str | None],
        load: Callable[[str], Loaded],
        model: Model,
        shelf: Shelf,
        report: Report,
    ) -> None:
        self._pointers, self._pointing, self._load = pointers, pointing, load
        self._model, self._shelf, self._report = model, shelf, report
        self._troubles: dict[str, _Trouble] = {}
        self._said: dict[str, tuple[_Said, float]] = {}
        self.repeat_s = REPEAT_S
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        self.is_store_up = True
        self.num_switches = 0

    def problems(self) -> dict[str, str]:
        """Return why an alias is not served as it points, for those that are not."""
        return {pointer: one.reason for pointer, one in dict(self._troubles).items()}

    def begin(self) -> None:
        """Load what all aliases point at.

        Raises:
            UnknownVersion: if an alias points nowhere.
            Unsigned, OtherBase, Unservable, NotAModel: if what it points at cannot be served.
        """
        for pointer in self._pointers:
            self._switch(pointer, self._load(pointer))

    def start(self, poll_s: float) -> None:
        """Look after the aliases from now on, every ``poll_s`` seconds, > 0."""

        def follow() -> None:
            while not self._ends.wait(poll_s):
                self.look()

        self._thread = threading.Thread(target=follow, name="weft-follow", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Follow no more."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """Look once where the aliases point, and do what follows from it. Raises nothing."""
        with self._lock:
            for pointer in self._pointers:
                self._guarded(pointer, partial(self._look_at, pointer))
            try:
                for served in self._shelf.take_unused():
                    self._model.drop(served)
            except Exception:
                _LOG.exception("a version that nobody uses could not be let go")
            for pointer in self._pointers:
                self._guarded(pointer, partial(self._say, pointer))

    def _guarded(self, pointer: str, work: Callable[[], None]) -> None:
        try:
            work()
        except ConnectionError as error:
            if self.is_store_up:
                _LOG.warning("the store is out of reach; serving goes on as it is: %s", error)
            self.is_store_up = False
        except Exception:
            _LOG.exception("%s could not be followed; it is served as before", pointer)

    def _look_at(self, pointer: str) -> None:
        target = self._pointing(*self._pointers[pointer])
        self.is_store_up = True
        now = self._shelf.pointers().get(pointer)
        if target is None or (now is not None and now.version == target):
            self._troubles.pop(pointer, None)
            return
        trouble = self._troubles.get(pointer)
        if trouble and trouble.target == target and time.monotonic() < trouble.until:
            return
        try:
            self._switch(pointer, self._load(pointer))
        except ConnectionError:
            raise
        except Exception as error:
            if not _is_ours(error):
                raise
            reason = str(error.args[0] if isinstance(error, LookupError) else error)
            self._troubles[pointer] = _Trouble(target, reason, time.monotonic() + RETRY_S)
            if trouble is None or (trouble.target, trouble.reason) != (target, reason):
                _LOG.error("%s is served as before: %s", pointer, reason)
        else:
            self._troubles.pop(pointer, None)
            self.num_switches += 1

    def _switch(self, pointer: str, loaded: Loaded) -> None:
        if self._shelf.get(loaded.version) is None:
            self._shelf.put(self._model.put(loaded))
        self._shelf.point(pointer, loaded.version)
        _LOG.info("%s is answered by %s", pointer, loaded.version)

    def _say(self, pointer: str) -> None:
        """Report what answers for an alias; while several versions do, none."""
        now = self._shelf.pointers().get(pointer)
        trouble = self._troubles.get(pointer)
        # as long as older answers are under way, no version alone answers
        alone = now.version if now and self._shelf.is_drained(pointer) else None
        what: _Said = (alone, trouble.reason if trouble else None)
        said, said_at = self._said.get(pointer, (None, 0.0))
        if what != said or time.monotonic() - said_at >= self.repeat_s:
            self._report(pointer, *what)
            self._said[pointer] = what, time.monotonic()


def _is_ours(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in (
        "clients",
        "orchestrator",
        "storage",
        "strategies",
    )
