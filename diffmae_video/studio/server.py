"""The studio's server: it answers this machine only, and a page of it loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import gradio
import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffmae_video.errors import DiffmaeError, UsageError
from diffmae_video.rendering.follow import resized
from diffmae_video.studio.page import build_page, look
from diffmae_video.studio.session import Session

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
"""Names by which the server may be called: a page of a stranger's name that resolves here gets nothing."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; worker-src 'self' blob:; "
    "connect-src 'self'; frame-ancestors 'none'; form-action 'self'"
)
"""Content-Security-Policy: the browser fetches nothing from another host."""
MOST_PAINTED = 8_000_000
"""Bytes of a mask that a page may send."""


class LocalOnly:
    """Refuses requests that were not made by a page of this server on this machine."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with the policy in its answer."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        origin = headers.get("origin")
        if host.rpartition(":")[0] not in NAMES or (origin is not None and origin != f"http://{host}"):
            await PlainTextResponse("This page answers this machine only.", 403)(scope, receive, send)
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, with_policy)


def build_app(session: Session, most_bytes: int) -> FastAPI:
    """The server's routes: pictures and marks of the session's clip, files to download, and the page.

    Args:
        most_bytes: largest clip that may be uploaded.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LocalOnly)

    def answer(work: Callable[[], Any]) -> Response:
        try:
            work()
        except DiffmaeError as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse(session.state())

    @app.get("/studio/state")
    def state() -> Response:
        return JSONResponse(session.state())

    @app.get("/studio/canvas.{kind}")
    def script(kind: str) -> Response:
        types = {"js": "text/javascript", "css": "text/css"}
        if kind not in types:
            return PlainTextResponse("There is no such file.", 404)
        text = files("diffmae_video.studio").joinpath(f"canvas.{kind}").read_text("utf-8")
        return Response(text, media_type=types[kind], headers={"cache-control": "no-cache"})

    @app.get("/studio/download/{what}")
    def download(what: str) -> Response:
        path = find_download(session, what)
        if path is None or not path.is_file():
            return PlainTextResponse("There is nothing to download yet; press Run first.", 404)
        return FileResponse(path, filename=path.name, content_disposition_type="inline")

    @app.get("/studio/{what}/{number}")
    def picture(what: str, number: int) -> Response:
        clip = session.clip
        store = {"frame": clip.frames, "result": clip.after}.get(what) if clip else None
        try:
            if clip is not None and what == "mask":
                hidden = resized(session.mask(number), clip.frames.shape)
                data = cv2.imencode(".png", hidden.astype(np.uint8) * 255)[1].tobytes()
                return Response(data, media_type="image/png")
            if store is not None:
                return Response(store.jpeg(number), media_type="image/jpeg")
        except (IndexError, ValueError):  # another clip was opened meanwhile
            pass
        return PlainTextResponse("There is no such picture.", 404)

    @app.post("/studio/mark/{number}")
    async def mark(number: int, request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_PAINTED:
                return JSONResponse({"error": "What was painted is too large; reload the page."}, 400)
        return answer(lambda: session.mark(number, bytes(body)))

    @app.post("/studio/box/{number}")
    def box(number: int, left: float, top: float, width: float, height: float) -> Response:
        return answer(lambda: session.mark_box(number, (left, top, width, height)))

    @app.post("/studio/forget/{number}")
    def forget(number: int) -> Response:
        return answer(lambda: session.forget(number))

    gradio.mount_gradio_app(
        app,
        build_page(session),
        path="/",
        max_file_size=most_bytes,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=True,
        allowed_paths=[],
        **look(),
    )
    return app


def find_download(session: Session, what: str) -> Path | None:
    """The file that `video`, `mask` or `report` names; None where it is not there yet."""
    clip = session.clip
    if clip is None or clip.result is None:
        return None
    result = Path(clip.result.directory)
    return {"video": Path(clip.result.video), "mask": session.mask_path, "report": result / "report.html"}.get(what)


def serve(session: Session, port: int, most_bytes: int, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C.

    Args:
        port: of this machine; 0 takes a free one.
        ready: called with the page's address once it answers.

    Raises:
        UsageError: the port is taken.
    """
    config = uvicorn.Config(build_app(session, most_bytes), host=HOST, port=port, log_level="warning", ws="none")
    try:
        listening = config.bind_socket()
    except SystemExit:
        raise UsageError(f"--port {port} is taken on this machine; name another, or 0 for a free one.") from None
    listening.listen()  # who connects from now on waits, and is not refused
    ready(f"http://{HOST}:{listening.getsockname()[1]}/")
    uvicorn.Server(config).run(sockets=[listening])
