"""From the messages of a request to token ids, under the model's own chat template.

Clients send more than templates know: developer messages, system messages in the middle, calls of
tools as text, content in parts. What a template has no place for is said in words that it has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chronos.common.text.chat_template import TemplateError
from chronos.common.text.tokenizer import Tokenizer
from chronos.serve.problem import Problem, of_error
from chronos.serve.tools import CLOSE, OPEN, THINK, Tool

_ROLES = {"developer": "system", "function": "tool"}
# What a template is called with, and a request may not replace.
_RESERVED = frozenset(
    "messages tools documents add_generation_prompt bos_token eos_token pad_token chat_template"
    " raise_exception strftime_now".split()
)
# Claude Code's first system block changes with every request: a cache would never be warm.
_NOISE = "x-anthropic-billing-header"


@dataclass(frozen=True)
class Chat:
    """A conversation to answer. messages: as OpenAI's, checked by `messages_of`. variables: what
    else the template is told."""

    messages: list[dict[str, Any]]
    tools: Sequence[Tool] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


def messages_of(given: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as templates take them. Raises Problem naming the one that is none."""
    return [_message(message, f"messages[{at}]") for at, message in enumerate(given)]


def tools_of(given: Sequence[Any] | None) -> list[Tool]:
    """The functions of a request's tools, in OpenAI's form. Raises Problem."""
    tools = []
    for at, each in enumerate(given or ()):
        function = each.get("function") if isinstance(each, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Problem(
                400,
                f"tools[{at}] must be a function with a name",
                code="invalid_value",
                param="tools",
            )
        parameters = function.get("parameters")
        if not isinstance(parameters, dict):
            parameters = {"type": "object"}
        tools.append(Tool(function["name"], str(function.get("description") or ""), parameters))
    return tools


def variables_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a request tells the template. Raises Problem for what is no plain value."""
    for name, value in given.items():
        if name in _RESERVED or not isinstance(value, str | int | float | bool | None):
            raise Problem(
                400,
                f"chat_template_kwargs: {name[:40]!r} cannot be set",
                code="invalid_value",
                param="chat_template_kwargs",
            )
    return dict(given)


def text_of(content: Any, where: str) -> str:
    """The text of a message's content: a string, parts of text, or nothing. Raises Problem."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Problem(400, f"{where}.content must be text", code="invalid_value", param="messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else "no object"
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise Problem(
                400,
                f"{where}: parts of type {str(kind)[:40]!r} are not supported, only text",
                code="unsupported_content",
                param="messages",
            )
        texts.append(text)
    return "\n".join(text for text in texts if not text.startswith(_NOISE))


def render(tokenizer: Tokenizer, chat: Chat) -> list[int]:
    """Ids of a prompt, opened for the reply. Raises Problem where the template refuses."""
    if not tokenizer.can_chat:
        raise Problem(400, "the model has no chat template; use /v1/completions", param="model")
    messages = chat.messages
    variables = dict(chat.variables)
    if "tools" in tokenizer.template.source:
        variables |= {"tools": [tool.openai() for tool in chat.tools]} if chat.tools else {}
    else:
        messages = _without_tools(messages, chat.tools)
    try:
        return tokenizer.apply_chat(messages, variables=variables)
    except TemplateError as error:
        refused = error
    try:  # many templates take one system message, at the start
        return tokenizer.apply_chat(_one_system(messages), variables=variables)
    except TemplateError:
        raise of_error(refused, "messages") from None


def opens_thoughts(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the template has begun the reply's reasoning."""
    names = {token: text for text, token in tokenizer.control_ids.items()}
    end = "".join(names.get(token) or tokenizer.decode([token]) for token in prompt[-12:])
    return end.rstrip().endswith(THINK)


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise Problem(
            400, f"{where} must be an object with a role", code="invalid_value", param="messages"
        )
    role = _ROLES.get(given["role"], given["role"])
    message: dict[str, Any] = {"role": role, "content": text_of(given.get("content"), where)}
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
        if isinstance(given.get(name), str):
            message[name] = given[name]
    if calls := given.get("tool_calls"):
        message["tool_calls"] = _calls(calls, where)
    return message


def _calls(given: Any, where: str) -> list[dict[str, Any]]:
    """With arguments as objects: most templates write them as JSON themselves."""
    calls = []
    for each in given if isinstance(given, list) else [None]:
        call = each if isinstance(each, dict) else {}
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Problem(
                400,
                f"{where}.tool_calls must be functions with names",
                code="invalid_value",
                param="messages",
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = {"text": arguments}
        if not isinstance(arguments, dict):
            arguments = {}
        made = {"name": function["name"], "arguments": arguments}
        calls.append({"id": str(call.get("id") or ""), "type": "function", "function": made})
    return calls


def _without_tools(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The same for a template that knows no tools: what there is and how it is called in a system
    message, calls as they are written, results as the user's."""
    said = []
    if tools:
        listed = "\n".join(json.dumps(tool.openai(), ensure_ascii=False) for tool in tools)
        form = f'{OPEN}\n{{"name": NAME, "arguments": OBJECT}}\n{CLOSE}'
        said.append({"role": "system", "content": f"Tools:\n{listed}\nCall one by writing\n{form}"})
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            text = f"<tool_response>\n{content}\n</tool_response>"
            said.append({"role": "user", "content": text})
            continue
        for call in message.get("tool_calls", ()):
            content += f"\n{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}"
        said.append({"role": message["role"], "content": content.lstrip("\n")})
    return said


def _one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All system messages as one, at the start."""
    texts = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others] if texts else others
