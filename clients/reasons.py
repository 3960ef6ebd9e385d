"""What of an error at a client may be told elsewhere."""

from __future__ import annotations

from clients.assignment import Assignment
from clients.sources import BadRecord


def reason_of(assignment: Assignment, error: BaseException) -> str:
    """Return one sentence for an exception at a client; it never contains data.

    Only messages of expected errors (ours, and the standard library's of the same kinds) leave the
    client. Of any other exception only the type does, since its text might hold data; and so it is
    of an error about records where they are private.
    """
    own = type(error).__module__.split(".")[0] in ("clients", "strategies")
    secret = assignment.private and isinstance(error, BadRecord)
    text = str(error)
    if secret or not own:
        text = f"{type(error).__name__} at the client (its text stays there)"
    return " ".join(text.split())
