"""The pages in a web application, and the process that serves them.

Nothing external is loaded: fonts are the reader's own, Gradio's statistics are off, and a
Content-Security-Policy keeps a browser from asking anybody else. Requests pass the same guard as
those to `chronos serve`: names of hosts that point here and foreign pages are refused.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which reads it

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chronos.common.errors import ChronosError
from chronos.serve.guard import LOOPBACK, Guard, Rules, body_of, described
from chronos.serve.problem import Problem
from chronos.ui.face import Face, Site
from chronos.ui.jobs import Jobs
from chronos.ui.pages import bench, chat, config, experts, export, pipeline, routing, runs, tune
from chronos.ui.recipes import Recipes
from chronos.ui.root import Root

# In the order of a newcomer's way. A page is a module with `build`, a key `tab.<name>` of the
# words, and this line.
PAGES = {
    "config": config,
    "pipeline": pipeline,
    "chat": chat,
    "export": export,
    "bench": bench,
    "tune": tune,
    "experts": experts,
    "routing": routing,
    "runs": runs,
}
_ASSETS = Path(__file__).parents[1] / "assets"
_CSS, _SCRIPT = ((_ASSETS / name).read_text("utf-8") for name in ("ui.css", "ui.js"))
_CLICK_S = 0.05  # a click may wait so long until it is seen
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'"
)


def pages(root: Path) -> tuple[gr.Blocks, Face]:
    """All pages, over the jobs and files of a folder. Raises UsageError where there is none."""
    place = Root(root)
    site = Site(place, Jobs(place), Recipes(place))
    with gr.Blocks(title="Chronos", analytics_enabled=False, fill_width=True) as made:
        # Nothing in it is secret; with a secret of each start's own, none would find it again.
        kept = gr.BrowserState({}, storage_key="chronos-ui", secret="chronos-ui")
        with gr.Row(elem_id="top"):
            gr.Markdown("# Chronos", elem_id="title")
            language = gr.Dropdown(
                site.words.languages(), value="en", show_label=False, container=False,
                elem_id="language", scale=0, min_width=140, filterable=False,
            )  # fmt: skip
        face = Face(site, language)
        with gr.Tabs(elem_id="pages") as tabs:
            for name, page in PAGES.items():
                with face.make(gr.Tab, label=f"@tab.{name}", id=name) as face.tabs[name]:
                    page.build(face)
        face.finish(made, tabs, kept)
    return made, face


def application(
    root: Path, *, port: int, local: bool = True, auth: Sequence[tuple[str, str]] = ()
) -> ASGIApp:
    """The UI as an ASGI application. local: names of hosts that are not loopback's are refused.
    auth: (user, password) of those who may use it; none: everybody who reaches it."""
    font = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="teal", font=font, font_mono=["ui-monospace", "monospace"]
    )
    made, face = pages(root)
    made.queue(default_concurrency_limit=8)
    # Gradio looks a thousand times a second whether a click waits: 2.4 % of a core without a page.
    made._queue.sleep_when_free = made._queue.progress_update_sleep_when_free = _CLICK_S
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    look = _Looks(face)
    app.add_route("/live/{tab}", look.answer, methods=["POST"])
    gr.mount_gradio_app(
        app,
        made,
        path="",
        server_name="127.0.0.1",
        server_port=port,
        auth=list(auth) or None,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=_CSS,
        head=f"<script>{_SCRIPT}</script>",
        max_file_size=0,
    )
    look.gradio = app.routes[-1].app  # the one that was mounted: it knows who has logged in
    return _Front(app, Rules((), LOOPBACK if local else None))


class _Looks:
    """Looks at what is live, past Gradio's machinery (assets/ui.js)."""

    gradio: Any

    def __init__(self, face: Face) -> None:
        self._face = face

    async def answer(self, request: Request) -> Response:
        try:
            if not self._known(request):
                raise Problem(401, "log in first", code="not_authenticated")
            given, seen = self._read(await body_of(request))
            found = await run_in_threadpool(
                self._face.look, request.path_params["tab"], given, seen
            )
        except Problem as problem:
            return described(problem, request.scope)
        except KeyError:
            return Response(status_code=404)
        except ChronosError as error:
            return JSONResponse({"error": str(error)}, 400)
        return Response(status_code=204) if found is None else JSONResponse(found)

    def _known(self, request: Request) -> bool:
        """Whether Gradio's login, where there is one, would let it pass."""
        app = self.gradio
        tokens = [
            request.cookies.get(f"access-token-{kind}{app.cookie_id}") for kind in ("", "unsecure-")
        ]
        return app.auth is None or any(token in app.tokens for token in tokens if token)

    def _read(self, body: bytes) -> tuple[list[Any], list[str]]:
        """(language and values, digests). Raises Problem."""
        try:
            said = json.loads(body)
            given, seen = said["given"], said["seen"]
            if given[0] in self._face.site.words.texts and all(isinstance(s, str) for s in seen):
                return list(given), list(seen)
        except (ValueError, KeyError, TypeError, IndexError):
            pass
        raise Problem(400, "no look at a page", code="invalid_value")


class _Front:
    """The guard around pages; start and end of the application pass it by."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._guarded = app, Guard(app, rules)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                head = MutableHeaders(scope=message)
                head["content-security-policy"] = _POLICY
                head["referrer-policy"] = "no-referrer"
            await send(message)

        app = self._app if scope["type"] == "lifespan" else self._guarded
        await app(scope, receive, answer)


def run(
    root: Path,
    sock: socket.socket,
    say: Callable[[str], None],
    *,
    local: bool = True,
    auth: Sequence[tuple[str, str]] = (),
) -> None:
    """Serve until SIGINT or SIGTERM. say: is told where. Jobs go on when it ends."""
    host, port = sock.getsockname()[:2]
    app = application(root, port=port, local=local, auth=auth)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    shown = f"[{host}]" if ":" in host else host
    say(f"open http://{shown}:{port}")
    uvicorn.Server(config).run([sock])
