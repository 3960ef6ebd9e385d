"""What a look at a deployment finds, and what is to be done about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look found.

    Attributes:
        check: what was looked at, in a word or two.
        verdict: ``warn`` is what may be meant so; ``fail`` breaks runs or opens the deployment.
        says: what is there, and what that means.
        do: what to do about it; empty where nothing is.
    """

    check: str
    verdict: Verdict
    says: str
    do: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


def ok(check: str, says: str) -> Finding:
    """Return that all is well."""
    return Finding(check, "ok", says)


def warn(check: str, says: str, do: str) -> Finding:
    """Return what may be meant so."""
    return Finding(check, "warn", says, do)


def fail(check: str, says: str, do: str) -> Finding:
    """Return what must not stay so."""
    return Finding(check, "fail", says, do)


def any_fails(findings: Iterable[Finding]) -> bool:
    """Return whether something must not stay as it is."""
    return any(finding.verdict == "fail" for finding in findings)
