"""Errors in OpenAI's shape, with "type" beside "error" so that Anthropic's clients read the same object."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from ggtool.serve.engine.requests import RequestError

_RETRY_AFTER_S = 1
_KINDS = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("not_found_error", "model_not_found"),
    405: ("invalid_request_error", None),
    413: ("request_too_large", None),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("overloaded_error", None),
}


def error_body(error: RequestError) -> dict[str, Any]:
    """Return the JSON of an error."""
    kind, code = _KINDS.get(error.status, ("api_error", None))
    if error.status == 404 and error.param != "model":
        code = None
    fields = {"message": error.message, "type": kind, "param": error.param, "code": code}
    return {"type": "error", "error": fields}


def error_response(error: RequestError) -> JSONResponse:
    """Return the response of an error; 429 and 503 say when to try again."""
    headers = {"Retry-After": str(_RETRY_AFTER_S)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


def invalid_body(error: ValidationError) -> RequestError:
    """Return the 400 of a body that does not fit, with the first wrong field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = [str(part) for part in first["loc"] if not str(part).endswith("]") and "Body" not in str(part)]
    param = ".".join(place)[:200] or None
    message = f"{param}: {first['msg']}" if param else first["msg"]
    return RequestError(400, message[:500], param)
