"""What every request passes before anything looks into it: how large it may be, where it may come from."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware

from pipeline.service.config import LARGEST_UPLOAD
from pipeline.service.errors import Refusal, response

LARGEST_BODY = 256 << 10
"""Bytes of any request but an enrollment."""
_POLICY = (
    "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)


class Gate:
    """ASGI middleware.

    Args:
        app: what it stands before.
        most_bytes: by path, of a request's body; `LARGEST_BODY` for the rest.
        private: whether only this machine may ask, because nobody has to show a token. Then pages of other sites,
            which a browser on this machine may have open, are refused, too.
    """

    def __init__(self, app: Callable, most_bytes: dict[str, int], private: bool) -> None:
        self.app, self.most_bytes, self.private = app, most_bytes, private

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        most = self.most_bytes.get(path, LARGEST_BODY)
        too_large = _too_large(most)
        read = 0

        async def counted() -> dict:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise too_large
            return message

        async def guarded(message: dict) -> None:
            if message["type"] == "http.response.start":
                shown = MutableHeaders(scope=message)
                shown.setdefault("X-Content-Type-Options", "nosniff")
                shown.setdefault("Referrer-Policy", "no-referrer")
                shown.setdefault("Cache-Control", "no-store")
                shown.setdefault("Content-Security-Policy", _POLICY)
            await send(message)

        refusal = self._foreign(scope, headers) if self.private else None
        length = headers.get("content-length", "0")
        if not refusal and (not length.isascii() or not length.isdigit() or int(length[:20]) > most):
            refusal = too_large
        if refusal:
            await response(refusal)(scope, receive, guarded)
            return
        await self.app(scope, counted, guarded)

    def _foreign(self, scope: dict, headers: Headers) -> Refusal | None:
        client, host, origin = scope.get("client"), headers.get("host", ""), headers.get("origin")
        if client and not _is_loopback(client[0]):
            return Refusal(
                403,
                "local_only",
                "Without configured tokens only this machine is served: start the service with tokens",
            )
        if not _is_loopback(urlsplit(f"//{host}").hostname or ""):
            return Refusal(
                403, "local_only", f"Without configured tokens the service is not {host[:80]!r}: use 127.0.0.1"
            )
        if origin is not None and urlsplit(origin).netloc != host:
            return Refusal(403, "foreign_origin", f"Pages of {origin[:80]} may not use this service")
        return None


class Bounded:
    """ASGI middleware for Serve's proxy, which otherwise reads ahead of the application, however much comes.

    Args:
        most_bytes: of any request's body.
    """

    def __init__(self, app: Callable, most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        read, answering = 0, False

        async def counted() -> dict:
            nonlocal read
            message = await receive() if read <= self.most_bytes else {}
            read += len(message.get("body", b""))
            return message if read <= self.most_bytes else {"type": "http.disconnect"}

        async def noted(message: dict) -> None:
            nonlocal answering
            answering = True
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self.app(scope, counted, noted)
        except asyncio.CancelledError:
            if read <= self.most_bytes:
                raise
        if read > self.most_bytes and not answering:
            await response(_too_large(self.most_bytes))(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """What `PROXY_CALLBACK` names: Serve's proxy calls it when it starts."""
    return [Middleware(Bounded, most_bytes=int(os.environ.get(LARGEST_UPLOAD, 1 << 26)))]


def _too_large(most: int) -> Refusal:
    text = f"The request is larger than the {most:,} bytes that are taken here"
    return Refusal(413, "too_large", text, headers={"Connection": "close"})  # the rest is not read


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
