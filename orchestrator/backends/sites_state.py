"""What a coordinator must know to go on with a Flower run that another process began.

It holds the token of the run's task, so only its owner can read it. There is one file a run, in the
run's own folder; it is gone when the run has ended in an orderly way.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clients.files import write_durably
from orchestrator.backends.superlink import Task

FILE = "sites.json"


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent to a node and not answered.

    Attributes:
        ids: of the messages, each of which the same answer can come to.
        activated: when its node had come online last, as the last of them was sent.
    """

    ids: tuple[str, ...]
    activated: float


@dataclass(slots=True)
class SitesState:
    """The file of a run.

    Attributes:
        path: where it is.
        superlink: address of the SuperLink whose run it is.
        task: the claim on the Flower run; None where there is none.
        sent: what is on its way, by assignment.
    """

    path: Path
    superlink: str
    task: Task | None = None
    sent: dict[str, Sent] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, superlink: str) -> SitesState:
        """Return what the file says, or nothing where it is of another SuperLink or damaged."""
        state = cls(path, superlink)
        try:
            document = json.loads(path.read_text("utf-8"))
            if document["superlink"] == superlink:
                task = document["task"]
                sent = {
                    str(key): Sent(tuple(map(str, one["ids"])), float(one["activated"]))
                    for key, one in document["sent"].items()
                }
                state.task = Task(str(task["token"]), int(task["run"]), int(task["id"]))
                state.sent = sent
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return state
        return state

    def begin(self, task: Task) -> None:
        """Write down a claim on a new run, in which nothing is on its way."""
        self.task, self.sent = task, {}
        self.write()

    def write(self) -> None:
        """Write the file, so that after a crash it is whole."""
        if self.task is None:
            return
        document = {
            "superlink": self.superlink,
            "task": asdict(self.task),
            "sent": {key: asdict(one) for key, one in self.sent.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.path, json.dumps(document).encode())

    def forget(self) -> None:
        """Delete the file: the run is over."""
        self.task, self.sent = None, {}
        self.path.unlink(missing_ok=True)
