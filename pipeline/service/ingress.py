"""The ingress: FastAPI before the engines, as a deployment of Ray Serve."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from pipeline.service import docs_page, errors, pages, speech_api, voices_api
from pipeline.service.config import ServiceConfig
from pipeline.service.gate import Gate
from pipeline.service.service import Service

_ABOUT = """Speech in enrolled voices, with OpenAI's interface for speech. Speech is synthetic and its files say so."""


def application(service: Service) -> FastAPI:
    """Everything that is answered over HTTP."""
    # FastAPI's own pages of documentation load their scripts from elsewhere
    app = FastAPI(title="lina-ray", description=_ABOUT, version="1", docs_url=None, redoc_url=None)
    errors.install(app)
    app.include_router(speech_api.router(service))
    app.include_router(voices_api.router(service))
    app.include_router(pages.router())
    app.add_middleware(Gate, most_bytes={"/v1/voices": service.config.upload_bytes}, private=service.private)

    @app.get("/healthz", tags=["service"])
    async def healthz() -> dict[str, Any]:
        """Whether an engine answers, and what the page must know; no token is needed."""
        facts = await service.facts()
        counts = {"said": service.said, "faulty": service.faulty}
        told = {"status": "ok", "tokens": not service.private, "longest_text": service.config.longest_text}
        return told | counts | facts

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page.page(app.openapi()))

    return app


class Ingress:
    """One replica."""

    def __init__(self, config: ServiceConfig, engine: Any, reader: Any) -> None:
        self.service = Service(config, engine, reader)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return application(self.service)
