"""Refusals in OpenAI's shape, one sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def problem(
    status: int, message: str, code: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an error's answer.

    Args:
        status: of HTTP.
        message: a sentence that holds nothing of what was asked.
        code: for programs.
        headers: besides.
    """
    document = {"error": error_document(status, message, code)}
    return JSONResponse(document, status, headers=dict(headers or {}))


def error_document(status: int, message: str, code: str) -> dict[str, Any]:
    """Return what OpenAI's ``error`` holds."""
    other = "server_error" if status >= 500 else "invalid_request_error"
    return {"message": message, "type": _TYPES.get(status, other), "param": None, "code": code}


def invalid(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence for what is wrong with a body, without what is in it."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return "the body is no JSON"
    where = ".".join(str(part) for part in first["loc"][1:2])  # deeper parts name types of ours
    if first["type"] == "extra_forbidden":
        return f"{where}: this server knows no such field; leave it out"
    what = str(first["msg"])
    what = what.removeprefix("Value error, ")
    return f"{where or 'the body'}: {what[:1].lower()}{what[1:]}"
