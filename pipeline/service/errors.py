"""Whatever is refused says why, in the shape that clients of OpenAI's interface know."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger("ray.serve")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}
_LONGEST = 500
"""Characters of a message: what a client sent is quoted, not echoed."""


class Refusal(HTTPException):
    """A request that is not carried out.

    Args:
        status: of HTTP.
        code: one snake_case word for programs.
        message: what was wrong and what would be right, for people.
        param: the field at fault.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.param = code, param


def busy(message: str, code: str, seconds: float) -> Refusal:
    """Too much at the moment: says after how many seconds to try again."""
    return Refusal(429, code, message, headers={"Retry-After": str(max(1, round(seconds)))})


def body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message[:_LONGEST], "type": kind, "param": param, "code": code}}


def response(error: HTTPException) -> JSONResponse:
    code = getattr(error, "code", None) or _CODES.get(error.status_code, "bad_request")
    message = str(error.detail)
    if not isinstance(error, Refusal) and error.status_code == 404:
        message = "There is nothing at this address; GET /openapi.json lists what there is"
    content = body(error.status_code, code, message, getattr(error, "param", None))
    return JSONResponse(content, error.status_code, error.headers)


def install(app: FastAPI) -> None:
    """Makes every error of an application one of these."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        return response(error)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        param = place[0] if place else None  # what follows is the branch of a union that came closest
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            param, message = None, "The body is not valid JSON"
        code = {"missing": "missing_parameter", "extra_forbidden": "unknown_parameter"}.get(first["type"])
        text = f"{param}: {message}" if param else message
        return JSONResponse(body(400, code or "invalid_value", text, param), 400)

    async def failed(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(body(500, "internal_error", "The service failed; its log says how"), 500)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, failed)
