"""The pages in a web application, and the process that serves them.

Nothing external is loaded: fonts are the reader's own, Gradio's statistics are off, and a
Content-Security-Policy keeps a browser from asking anybody else. Requests pass the same guard as
those to `chronos serve`: names of hosts that point here and foreign pages are refused.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which reads it

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chronos.serve.guard import LOOPBACK, Guard, Rules
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
_CSS = (Path(__file__).parents[1] / "assets" / "ui.css").read_text("utf-8")
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'"
)


def blocks(root: Path) -> gr.Blocks:
    """All pages, over the jobs and files of a folder. Raises UsageError where there is none."""
    place = Root(root)
    site = Site(place, Jobs(place), Recipes(place))
    with gr.Blocks(title="Chronos", analytics_enabled=False, fill_width=True) as made:
        kept = gr.BrowserState({}, storage_key="chronos-ui")
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
    return made


def application(
    root: Path, *, port: int, local: bool = True, auth: Sequence[tuple[str, str]] = ()
) -> ASGIApp:
    """The UI as an ASGI application. local: names of hosts that are not loopback's are refused.
    auth: (user, password) of those who may use it; none: everybody who reaches it."""
    font = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="teal", font=font, font_mono=["ui-monospace", "monospace"]
    )
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks(root).queue(default_concurrency_limit=8),
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
        max_file_size=0,
    )
    return _Front(app, Rules((), LOOPBACK if local else None))


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
