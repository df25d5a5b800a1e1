"""The routes, and what is the same for all of them: bodies in, problems out.

To add a route: a line in ROUTES, which the OpenAPI page is written from too.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import chronos
from chronos.serve import anthropic, openai, responses, texts
from chronos.serve.ask import Service
from chronos.serve.fields import Field, parse, schema
from chronos.serve.guard import Guard, Rules, body_of, described
from chronos.serve.problem import Problem, of_error

_log = logging.getLogger("chronos")
Post = Callable[[Service, Any], Awaitable[Response]]
Get = Callable[[Service, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Door:
    """A POST of JSON. fields: of its body."""

    path: str
    answer: Post
    fields: Sequence[Field]


async def _root(service: Service, request: Request) -> Response:
    return JSONResponse({"name": "chronos", "version": chronos.__version__})


async def _health(service: Service, request: Request) -> Response:
    """200 while passes of the model end, or nobody waits for one."""
    state = service.worker.health()
    headers = {} if state == "ok" else {"retry-after": "2"}
    return JSONResponse({"status": state}, 200 if state == "ok" else 503, headers)


async def _models(service: Service, request: Request) -> Response:
    cards = [_card(service, name) for name in service.catalogue.models]
    return JSONResponse({"object": "list", "data": cards})


async def _model(service: Service, request: Request) -> Response:
    name = service.catalogue.find(request.path_params["name"]).name
    return JSONResponse(_card(service, name))


def _card(service: Service, name: str) -> dict[str, Any]:
    served = service.catalogue.models[name]
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "chronos",
        "max_model_len": served.context,
    }


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _openapi(service: Service, request: Request) -> Response:
    return JSONResponse(openapi())


GETS: dict[str, Get] = {
    "/": _root,
    "/health": _health,
    "/metrics": _metrics,
    "/openapi.json": _openapi,
    "/v1/models": _models,
    "/v1/models/{name:path}": _model,
    "/tokenizer_info": texts.tokenizer_info,
}
POSTS = (
    Door("/v1/chat/completions", openai.chat, openai.CHAT),
    Door("/v1/completions", openai.completion, openai.COMPLETION),
    Door("/v1/responses", responses.responses, responses.RESPONSES),
    Door("/v1/messages", anthropic.messages, anthropic.MESSAGES),
    Door("/v1/messages/count_tokens", anthropic.count_tokens, anthropic.COUNT),
    Door("/tokenize", texts.tokenize, texts.TOKENIZE),
    Door("/detokenize", texts.detokenize, texts.DETOKENIZE),
)


def application(service: Service, rules: Rules) -> ASGIApp:
    """The server as an ASGI application."""
    routes = [Route(path, _get(service, get), methods=["GET"]) for path, get in GETS.items()]
    routes += [Route(door.path, _post(service, door), methods=["POST"]) for door in POSTS]
    handlers: dict[Any, Any] = {HTTPException: _no_route}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), rules)


def openapi() -> dict[str, Any]:
    """OpenAPI 3.1 of the routes."""
    answers = {
        "200": {"description": "the answer"},
        "4XX": {"description": "what is wrong with the request"},
        "503": {"description": "no room now; Retry-After says when"},
        "529": {"description": "the same, in Anthropic's number"},
    }
    paths: dict[str, Any] = {}
    for path in GETS:
        plain = path.replace(":path", "")
        named = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[plain] = {
            "get": {"responses": answers} | ({"parameters": named} if plain != path else {})
        }
    for door in POSTS:
        content = {"application/json": {"schema": schema(door.fields)}}
        body = {"required": True, "content": content}
        paths[door.path] = {"post": {"requestBody": body, "responses": answers}}
    info = {"title": "Chronos", "version": chronos.__version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths}


def _get(service: Service, get: Get) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await get(service, request)
        except Exception as error:
            return _failed(error, request)

    return endpoint


def _post(service: Service, door: Door) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await door.answer(service, parse(await body_of(request)))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as error:
            return _failed(error, request)

    return endpoint


def _failed(error: Exception, request: Request) -> Response:
    problem = of_error(error)
    if problem.status == 500:
        _log.error("%s failed", request.url.path, exc_info=error)
    return described(problem, request.scope)


async def _no_route(request: Request, error: HTTPException) -> Response:
    known = {404: "there is no such route", 405: "that method does not fit this route"}
    what = known.get(error.status_code, error.detail)
    response = described(Problem(error.status_code, what), request.scope)
    response.headers.update(error.headers or {})
    return response
