"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

# OpenAI's clients try 408, 409, 429 and 5xx again unless this header says that it would not help.
NO_RETRY = {"x-should-retry": "false"}

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


LONGEST_MESSAGE = 500


def _printable(text: str) -> str:
    """Names in a request may hold half characters, which no answer could be encoded with, and be megabytes long."""
    if len(text) > LONGEST_MESSAGE:
        text = text[:LONGEST_MESSAGE] + "..."
    return text.encode("utf-8", "replace").decode()


class ApiError(Exception):
    """An answer other than success; `param` names the field of the request at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_printable(message))
        self.status = status
        self.code = code
        self.param = None if param is None else _printable(param)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def internal_error() -> ApiError:
    """What a client learns of a failure whose details are in the log alone."""
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def shutting_down() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down; try another one, or later",
        code="shutting_down",
        headers={"Retry-After": "5"},
    )


def timed_out(seconds: float) -> ApiError:
    return ApiError(
        504,
        f"not finished within this server's limit of {seconds:g} s; ask for fewer tokens, or serve with --timeout",
        code="timeout",
        headers=NO_RETRY,
    )


_CODES = {
    "json_invalid": "invalid_json",
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
}


def validation_error(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's complaints about a request, named by its field."""
    first = errors[0]
    kind, place = first["type"], first["loc"][1:]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "malformed")
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    name = ""
    for part in place:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    if kind == "extra_forbidden":
        message = f"this server does not know '{name}'; leave it out"
    else:
        message = f"{name or 'body'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return ApiError(400, message, code=_CODES.get(kind, "invalid_value"), param=name or None)
