"""The page at `/`: plain files, read once, each under a fixed address."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

_FOLDER = Path(__file__).parent / "static"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/style.css": ("style.css", "text/css; charset=utf-8"),
    "/static/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/static/sound.js": ("sound.js", "text/javascript; charset=utf-8"),
    "/static/spectrogram.js": ("spectrogram.js", "text/javascript; charset=utf-8"),
    "/favicon.ico": ("icon.svg", "image/svg+xml"),
}


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    for path, (name, media) in _FILES.items():
        routes.add_api_route(path, _sender((_FOLDER / name).read_bytes(), media))
    return routes


def _sender(content: bytes, media: str):
    async def send() -> Response:
        return Response(content, media_type=media, headers={"Cache-Control": "no-cache"})

    return send
