"""OpenAI's door for agents: /v1/responses, without state: nothing is stored, so a request brings
its whole conversation.

What clients send and read was taken from openai-python 3.57 and Codex 0.171.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.responses import Response

from chronos.serve import chat as chats
from chronos.serve.answer import Answer, Events, Whole, event
from chronos.serve.ask import (
    Ask,
    Service,
    grammar_of_choice,
    grammar_of_schema,
    sampling_of,
)
from chronos.serve.fields import Field, read
from chronos.serve.openai import usage
from chronos.serve.problem import Problem
from chronos.serve.tools import Call, Part, Tool

RESPONSES = (
    Field("model", ("string",)),
    Field("input", ("string", "array"), required=True),
    Field("instructions", ("string",)),
    Field("max_output_tokens", ("integer",), 1, 1 << 53),
    Field("stream", ("boolean",)),
    Field("temperature", ("number",), 0, 100),
    Field("top_p", ("number",), 0, 1),
    Field("tools", ("array",), 0, 128),
    Field("tool_choice", ("string", "object"), choices=("none", "auto", "required")),
    Field("parallel_tool_calls", ("boolean",)),
    Field("text", ("object",)),
    Field("reasoning", ("object",)),
)
_REFUSED: dict[str, Sequence[Any]] = {
    "previous_response_id": (), "background": (False,), "conversation": (), "prompt": (),
    "top_logprobs": (0,),
}  # fmt: skip


async def responses(service: Service, body: Any) -> Response:
    """POST /v1/responses."""
    values = read(body, RESPONSES, _REFUSED)
    served = service.catalogue.find(values.get("model"))
    ask = Ask(served, sampling_of(values, served), values.get("max_output_tokens"))
    given = values.get("tool_choice", "auto")
    choice = given.get("name") if isinstance(given, dict) else given
    tools = [] if choice == "none" else _tools(service, values.get("tools", ()))
    ask.grammar = grammar_of_choice(choice, tools, values.get("parallel_tool_calls", True))
    form = values.get("text", {}).get("format")
    kind = form.get("type") if isinstance(form, dict) else "text"
    if ask.grammar is None and kind in ("json_schema", "json_object"):
        schema = form.get("schema", {}) if kind == "json_schema" else {"type": "object"}
        ask.grammar = grammar_of_schema(schema, "text")
    effort = values.get("reasoning", {}).get("effort")
    variables = {"reasoning_effort": effort} if isinstance(effort, str) else {}
    messages = chats.messages_of(_messages(service, values))
    await ask.render(chats.Chat(messages, tools, variables))
    answer = await ask.begin(service, values.get("stream"))
    if values.get("stream"):
        return Events(_chunks(ask, answer, values), answer, _error_event)
    return Whole(_whole(ask, answer, values), answer)


def _messages(service: Service, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Instructions and input items as messages of a chat. Raises Problem."""
    said: list[dict[str, Any]] = []
    if instructions := values.get("instructions"):
        said.append({"role": "system", "content": instructions})
    given = values["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    for at, item in enumerate(items):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            said.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if said and said[-1].get("tool_calls"):
                said[-1]["tool_calls"].append(call)
            else:
                said.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            made = {"role": "tool", "content": item.get("output")}
            said.append(made | {"tool_call_id": str(item.get("call_id"))})
        elif kind == "reasoning":
            service.say_once("reasoning items of /v1/responses are left out")
        else:
            raise Problem(
                400,
                f"input[{at}] of type {str(kind)[:40]!r} is not supported",
                code="unsupported_content",
                param="input",
            )
    return said


def _tools(service: Service, given: Sequence[Any]) -> list[Tool]:
    tools = []
    for each in given:
        kind = each.get("type") if isinstance(each, dict) else None
        if kind != "function" or not isinstance(each.get("name"), str):
            service.say_once(f"tools of type {str(kind)[:40]} are left out")
            continue
        schema = each.get("parameters")
        schema = schema if isinstance(schema, dict) else {"type": "object"}
        tools.append(Tool(each["name"], str(each.get("description") or ""), schema))
    return tools


def _head(ask: Ask, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": values.get("instructions"),
        "max_output_tokens": values.get("max_output_tokens"),
        "model": ask.served.name,
        "output": [],
        "parallel_tool_calls": values.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "store": False,
        "temperature": ask.sampling.temperature,
        "top_p": ask.sampling.top_p,
        "tool_choice": values.get("tool_choice", "auto"),
        "tools": values.get("tools", []),
        "usage": None,
    }


def _item(part: Part, status: str = "completed") -> dict[str, Any]:
    """An output item of text or thoughts, with its whole text."""
    if part.kind == "reasoning":
        content = [{"type": "reasoning_text", "text": part.text}]
        return {"id": _id("rs"), "type": "reasoning", "summary": [], "content": content}
    text: dict[str, Any] = {"type": "output_text", "text": part.text}
    text |= {"annotations": [], "logprobs": []}
    return {
        "id": _id("msg"), "type": "message", "role": "assistant", "status": status,
        "content": [text],
    }  # fmt: skip


def _call_item(call: Call) -> dict[str, Any]:
    return {
        "id": _id("fc"), "type": "function_call", "status": "completed", "call_id": call.id,
        "name": call.name, "arguments": call.arguments,
    }  # fmt: skip


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _done(head: dict[str, Any], answer: Answer, output: Any, cut: bool, thoughts: int) -> Any:
    """The response at its end. cut: by max_output_tokens or the context."""
    counted = usage(answer, thoughts)
    numbers = {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": counted["prompt_tokens_details"],
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": counted["completion_tokens_details"],
        "total_tokens": counted["total_tokens"],
    }
    details = {"reason": "max_output_tokens"} if cut else None
    status = "incomplete" if cut else "completed"
    return head | {
        "status": status, "incomplete_details": details, "output": output, "usage": numbers
    }  # fmt: skip


async def _whole(ask: Ask, answer: Answer, values: Mapping[str, Any]) -> dict[str, Any]:
    head = _head(ask, values)
    text, parts = await ask.whole(answer)
    output = [_item(part) for part in parts]
    output += [_call_item(call) for call in text.calls]
    cut = text.reason(answer.results[0].finish_reason) == "length"
    found: dict[str, Any] = _done(head, answer, output, cut, text.thoughts)
    return found


async def _chunks(ask: Ask, answer: Answer, values: Mapping[str, Any]) -> AsyncIterator[str]:
    head, items = _head(ask, values), _Items()
    [text] = ask.texts(answer)
    told = 0
    yield items.event("response.created", response=head)
    yield items.event("response.in_progress", response=head)
    async for _, step in answer:
        if step is None:
            yield f": ping {answer.state()}\n\n"
            continue
        for part in text.take(step):
            for each in items.part(part):
                yield each
        for call in text.calls[told:]:
            for each in items.call(call):
                yield each
        told = len(text.calls)
    for part in text.end():
        for each in items.part(part):
            yield each
    for call in text.calls[told:]:
        for each in items.call(call):
            yield each
    for each in items.close():
        yield each
    cut = text.reason(answer.results[0].finish_reason) == "length"
    done = _done(head, answer, items.output, cut, text.thoughts)
    # Of a reply that was cut too, which its status tells: Codex takes `response.incomplete` for a
    # failure.
    yield items.event("response.completed", response=done)


class _Items:
    """The events of output items, each added, filled and done; `output` has those that are."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._number = 0
        self._kind, self._text = "", ""
        self._item: dict[str, Any] = {}

    def event(self, kind: str, **fields: Any) -> str:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event(data, kind)

    def part(self, part: Part) -> list[str]:
        events = []
        if part.kind != self._kind:
            events = self.close()
            self._kind, self._text = part.kind, ""
            self._item = _item(Part(part.kind, ""), "in_progress")
            empty = {**self._item, "content": []}
            events.append(self._at("response.output_item.added", item=empty))
            events.append(self._of_part("response.content_part.added", self._content("")))
        self._text += part.text
        name = self._name("delta")
        more: dict[str, Any] = {"logprobs": []} if part.kind == "content" else {}
        at = {"item_id": self._item["id"], "content_index": 0, "delta": part.text}
        return [*events, self._at(name, **at, **more)]

    def call(self, call: Call) -> list[str]:
        events, item = self.close(), _call_item(call)
        opened = {**item, "status": "in_progress", "arguments": ""}
        events.append(self._at("response.output_item.added", item=opened))
        about = {"item_id": item["id"]}
        name = "response.function_call_arguments"
        events.append(self._at(f"{name}.delta", **about, delta=call.arguments))
        events.append(self._at(f"{name}.done", **about, name=call.name, arguments=call.arguments))
        events.append(self._at("response.output_item.done", item=item))
        self.output.append(item)
        return events

    def close(self) -> list[str]:
        """End the item that is open."""
        if not self._kind:
            return []
        more: dict[str, Any] = {"logprobs": []} if self._kind == "content" else {}
        at = {"item_id": self._item["id"], "content_index": 0, "text": self._text}
        events = [self._at(self._name("done"), **at, **more)]
        events.append(self._of_part("response.content_part.done", self._content(self._text)))
        item = {**_item(Part(self._kind, self._text)), "id": self._item["id"]}
        events.append(self._at("response.output_item.done", item=item))
        self.output.append(item)
        self._kind = ""
        return events

    def _name(self, what: str) -> str:
        text = "output_text" if self._kind == "content" else "reasoning_text"
        return f"response.{text}.{what}"

    def _content(self, text: str) -> dict[str, Any]:
        content: dict[str, Any] = _item(Part(self._kind, text))["content"][0]
        return content

    def _of_part(self, kind: str, part: dict[str, Any]) -> str:
        return self._at(kind, item_id=self._item["id"], content_index=0, part=part)

    def _at(self, kind: str, **fields: Any) -> str:
        return self.event(kind, output_index=len(self.output), **fields)


def _error_event(problem: Problem) -> str:
    error = {"code": problem.code, "message": problem.message, "param": problem.param}
    return event({"type": "error", "sequence_number": 0, **error}, "error")
