"""What every request must pass before any route sees it: host, origin, key, type and size.

One wrapper around the whole application, so a new route cannot be forgotten. A web page that the
user of this machine looks at can send requests to it; what such pages can forge is refused: names
of hosts that point here (DNS rebinding), origins, and bodies that need no preflight.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chronos.serve.problem import Problem

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
MOST_BODY = 16 << 20
BODY_S = 60.0  # for a body to arrive
OPEN_PATHS = frozenset({"/health"})  # asked by whoever watches processes, and says nothing else
_HOST = re.compile(r"(?:([A-Za-z0-9_.-]{1,253})|\[([0-9A-Fa-f:.]{2,45})\])(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class Rules:
    """keys: any of them opens; none: no key is asked for. hosts: names that Host may have; None:
    any name. origins: of web pages that may ask, beside pages of this very host."""

    keys: Sequence[str] = ()
    hosts: frozenset[str] | None = LOOPBACK
    origins: frozenset[str] = frozenset()


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request_id = f"req_{uuid.uuid4().hex[:24]}"
        scope["request_id"] = request_id
        headers = Headers(scope=scope)
        origin = headers.get("origin")

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                out["x-request-id"] = out["request-id"] = request_id
                out["x-content-type-options"] = "nosniff"
                if origin in self._rules.origins:
                    out["access-control-allow-origin"] = origin
                    out["vary"] = "Origin"
            await send(message)

        try:
            response = self._checked(scope, headers, origin)
        except Problem as problem:
            response = described(problem, scope)
        await (response or self._app)(scope, receive, answer)

    def _checked(self, scope: Scope, headers: Headers, origin: str | None) -> Response | None:
        """An answer where the application need not see the request. Raises Problem."""
        host = _HOST.fullmatch(headers.get("host", ""))
        name = (host[1] or host[2]).lower() if host else ""
        hosts = self._rules.hosts
        if host is None or (hosts is not None and name not in hosts):
            raise Problem(421, "this server does not answer under that Host", code="wrong_host")
        own = (f"http://{host[0]}", f"https://{host[0]}")
        if origin is not None and origin not in self._rules.origins and origin not in own:
            raise Problem(
                403, "pages of that Origin may not ask; --cors allows one", code="wrong_origin"
            )
        if scope["method"] == "OPTIONS" and origin is not None:
            allowed = {
                "access-control-allow-methods": "GET, POST",
                "access-control-allow-headers": headers.get("access-control-request-headers", "*"),
                "access-control-max-age": "600",
            }
            return Response(status_code=204, headers=allowed)
        if scope["path"] not in OPEN_PATHS:
            self._check_key(headers)
        return None

    def _check_key(self, headers: Headers) -> None:
        if not self._rules.keys:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
        # All are compared, so that the time says nothing.
        fits = [hmac.compare_digest(given.encode(), key.encode()) for key in self._rules.keys]
        if not any(fits):
            raise Problem(401, "the API key is missing or wrong", code="invalid_api_key")


def described(problem: Problem, scope: Scope) -> JSONResponse:
    """A problem as the door that was knocked at writes it."""
    headers = {}
    if problem.retry_after is not None:
        headers["retry-after"] = str(problem.retry_after)
    if problem.status == 401:
        headers["www-authenticate"] = "Bearer"
    if not scope["path"].startswith("/v1/messages"):
        return JSONResponse(problem.openai(), problem.status, headers)
    status = 529 if problem.status == 503 else problem.status  # Anthropic's word for overloaded
    return JSONResponse(problem.anthropic(scope.get("request_id", "")), status, headers)


async def body_of(request: Request) -> bytes:
    """The whole body. Raises Problem where it is of a type that needs no preflight, too large or
    too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem(415, "the body must be application/json", code="wrong_content_type")
    said = request.headers.get("content-length", "0")
    large = Problem(413, f"the body is larger than {MOST_BODY >> 20} MiB", code="too_large")
    if not said.isdigit() or len(said) > 12 or int(said) > MOST_BODY:
        raise large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > MOST_BODY:
                    raise large
                chunks.append(chunk)
    except TimeoutError:
        raise Problem(408, f"the body took more than {BODY_S:g} seconds", code="timeout") from None
    return b"".join(chunks)
