"""Anthropic's door: /v1/messages and its count_tokens.

What clients send and read was taken from anthropic-python 2.14 and Claude Code 2.1.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from chronos.serve import chat as chats
from chronos.serve.answer import Answer, Events, Whole, event
from chronos.serve.ask import (
    Ask,
    Service,
    grammar_of_choice,
    grammar_of_schema,
    sampling_of,
    stops_of,
)
from chronos.serve.fields import Field, read
from chronos.serve.problem import Problem
from chronos.serve.tools import Call, Part, Tool

COUNT = (
    Field("model", ("string",)),
    Field("messages", ("array",), 1, required=True),
    Field("system", ("string", "array")),
    Field("tools", ("array",), 0, 128),
    Field("tool_choice", ("object",)),
)
MESSAGES = (
    *COUNT,
    Field("max_tokens", ("integer",), 1, 1 << 53, required=True),
    Field("stream", ("boolean",)),
    Field("stop_sequences", ("array",)),
    Field("temperature", ("number",), 0, 100),
    Field("top_p", ("number",), 0, 1),
    Field("top_k", ("integer",), 0, 1 << 31),
    Field("output_config", ("object",)),
)
_REFUSED: dict[str, Sequence[Any]] = {"mcp_servers": ([],), "container": ()}
_CHOICES = {"auto": "auto", "none": "none", "any": "required"}


async def messages(service: Service, body: Any) -> Response:
    """POST /v1/messages."""
    values = read(body, MESSAGES, _REFUSED)
    served = service.catalogue.find(values.get("model"))
    ask = Ask(served, sampling_of(values, served), values["max_tokens"])
    ask.stop = stops_of(values.get("stop_sequences"))
    chat, choice = _chat(service, values)
    several = not values.get("tool_choice", {}).get("disable_parallel_tool_use", False)
    ask.grammar = grammar_of_choice(choice, chat.tools, several)
    form = values.get("output_config", {}).get("format")
    if ask.grammar is None and isinstance(form, dict) and form.get("type") == "json_schema":
        ask.grammar = grammar_of_schema(form.get("schema"), "output_config")
    await ask.render(chat)
    answer = await ask.begin(service, values.get("stream"))
    if values.get("stream"):
        return Events(_chunks(ask, answer), answer, _error_event)
    return Whole(_whole(ask, answer), answer)


async def count_tokens(service: Service, body: Any) -> Response:
    """POST /v1/messages/count_tokens."""
    values = read(body, COUNT, _REFUSED)
    served = service.catalogue.find(values.get("model"))
    chat, _ = _chat(service, values)
    prompt = await asyncio.to_thread(chats.render, served.tokenizer, chat)
    return JSONResponse({"input_tokens": len(prompt)})


def _chat(service: Service, values: Mapping[str, Any]) -> tuple[chats.Chat, str | None]:
    """The conversation, and what tool_choice says in OpenAI's words. Raises Problem."""
    said: list[dict[str, Any]] = []
    if system := chats.text_of(values.get("system"), "system"):
        said.append({"role": "system", "content": system})
    for at, message in enumerate(values["messages"]):
        said += _messages(message, f"messages[{at}]")
    given = values.get("tool_choice", {})
    kind = given.get("type", "auto")
    choice = given.get("name") if kind == "tool" else _CHOICES.get(kind)
    if not isinstance(choice, str):
        raise Problem(400, "tool_choice must be auto, any, none or a tool", param="tool_choice")
    tools = [] if choice == "none" else list(_tools(service, values.get("tools", ())))
    return chats.Chat(chats.messages_of(said), tools), choice


def _tools(service: Service, given: Sequence[Any]) -> list[Tool]:
    tools = []
    for at, each in enumerate(given):
        kind = each.get("type", "custom") if isinstance(each, dict) else None
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            raise Problem(400, f"tools[{at}] must have a name", param="tools")
        if kind not in ("custom", None):
            service.say_once(f"tools of type {str(kind)[:40]} are left out: they run on a server")
            continue
        schema = each.get("input_schema")
        schema = schema if isinstance(schema, dict) else {"type": "object"}
        tools.append(Tool(each["name"], str(each.get("description") or ""), schema))
    return tools


def _messages(given: Any, where: str) -> list[dict[str, Any]]:
    """One of Anthropic's messages as OpenAI's: results of tools are messages of their own there."""
    if not isinstance(given, dict) or not isinstance(given.get("content"), str | list):
        raise Problem(400, f"{where} must be an object with a role and content", param="messages")
    content = given["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts: list[Any] = []
    thoughts, calls, results = [], [], []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            text = chats.text_of(block.get("content"), where)
            made = {"role": "tool", "content": text, "tool_call_id": str(block.get("tool_use_id"))}
            results.append(made)
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            texts.append(block)
    message: dict[str, Any] = {"role": given.get("role"), "content": texts}
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    # Results answer the calls before this message's own text.
    return [*results, message] if texts or calls or thoughts or not results else results


def _usage(answer: Answer, made: int) -> dict[str, int]:
    """Tokens that were kept are counted apart."""
    [job] = answer.jobs
    return {
        "input_tokens": len(job.prompt) - job.cached,
        "cache_read_input_tokens": job.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": made,
    }


def _head(ask: Ask, answer: Answer) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": ask.served.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(answer, 0),
    }


def _ended(ask: Ask, answer: Answer, reason: str) -> dict[str, Any]:
    """stop_reason and stop_sequence. reason: OpenAI's."""
    names = {"length": "max_tokens", "tool_calls": "tool_use"}
    found = {"stop_reason": names.get(reason, "end_turn"), "stop_sequence": None}
    stopped = answer.results[0].stopped_by
    if stopped and reason == "stop":
        found = {"stop_reason": "stop_sequence", "stop_sequence": stopped}
    return found


def _block(part: Part) -> dict[str, Any]:
    if part.kind == "content":
        return {"type": "text", "text": part.text}
    return {"type": "thinking", "thinking": part.text, "signature": ""}


def _use(call: Call, given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": given}


async def _whole(ask: Ask, answer: Answer) -> dict[str, Any]:
    text, parts = await ask.whole(answer)
    content = [_block(part) for part in parts]
    content += [_use(call, json.loads(call.arguments)) for call in text.calls]
    result = answer.results[0]
    ended = _ended(ask, answer, text.reason(result.finish_reason))
    usage = _usage(answer, len(result.tokens))
    return _head(ask, answer) | {"content": content, "usage": usage} | ended


async def _chunks(ask: Ask, answer: Answer) -> AsyncIterator[str]:
    blocks = _Blocks()
    [text] = ask.texts(answer)
    told = 0
    started = False

    def named(data: dict[str, Any]) -> str:
        return event(data, data["type"])

    # The first message tells how much of the prompt was kept, which is known when it begins; until
    # then the stream says that it is alive.
    yield ": ping\n\n"
    async for _, step in answer:
        if not started and answer.jobs[0].begun:
            started = True
            yield named({"type": "message_start", "message": _head(ask, answer)})
        if step is None:
            yield named({"type": "ping"}) if started else f": ping {answer.state()}\n\n"
            continue
        for part in text.take(step):
            for data in blocks.part(part):
                yield named(data)
        for call in text.calls[told:]:
            for data in blocks.call(call):
                yield named(data)
        told = len(text.calls)
    if not started:
        yield named({"type": "message_start", "message": _head(ask, answer)})
    for part in text.end():
        for data in blocks.part(part):
            yield named(data)
    for call in text.calls[told:]:
        for data in blocks.call(call):
            yield named(data)
    for data in blocks.close():
        yield named(data)
    result = answer.results[0]
    ended = _ended(ask, answer, text.reason(result.finish_reason))
    usage = _usage(answer, len(result.tokens))
    yield named({"type": "message_delta", "delta": ended, "usage": usage})
    yield named({"type": "message_stop"})


class _Blocks:
    """The events of content blocks, each opened, filled and closed, numbered in order."""

    def __init__(self) -> None:
        self._index, self._kind = -1, ""

    def part(self, part: Part) -> list[dict[str, Any]]:
        events = []
        if part.kind != self._kind:
            events = self.close()
            self._index, self._kind = self._index + 1, part.kind
            events.append(self._start(_block(Part(part.kind, ""))))
        if part.kind == "content":
            delta = {"type": "text_delta", "text": part.text}
        else:
            delta = {"type": "thinking_delta", "thinking": part.text}
        return [*events, self._delta(delta)]

    def call(self, call: Call) -> list[dict[str, Any]]:
        events = self.close()
        self._index, self._kind = self._index + 1, "call"
        events.append(self._start(_use(call, {})))
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        return [*events, self._delta(delta), *self.close()]

    def close(self) -> list[dict[str, Any]]:
        if not self._kind:
            return []
        events: list[dict[str, Any]] = []
        if self._kind == "reasoning":
            events.append(self._delta({"type": "signature_delta", "signature": ""}))
        self._kind = ""
        return [*events, {"type": "content_block_stop", "index": self._index}]

    def _start(self, block: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _error_event(problem: Problem) -> str:
    return event(problem.anthropic(""), "error")
