"""What a reply's text says: thoughts, answer and calls of tools, told apart as it comes.

The forms of calls are a table: what opens and closes them, and what may stand between. What opens
like a call and is none, or is cut off, stays text; nothing a model writes is an error here.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for. parameters: JSON Schema of its arguments."""

    name: str
    description: str = ""
    parameters: Any = field(default_factory=lambda: {"type": "object"})

    def openai(self) -> dict[str, Any]:
        """As chat templates take it."""
        fields = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": fields}


@dataclass(frozen=True)
class Call:
    """arguments: a JSON object, as text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(frozen=True)
class Part:
    """Of a reply: kind is content or reasoning."""

    kind: str
    text: str


@dataclass(frozen=True)
class Form:
    """How one family of models writes calls. close: "" is the end of the reply."""

    open: str
    close: str
    read: Callable[[str], list[tuple[str, Any]] | None]


def _hermes(text: str) -> list[tuple[str, Any]] | None:
    """{"name", "arguments"}, Qwen 3 Coder's tags, or GLM's keys and values: all stand between the
    same two marks."""
    text = text.strip()
    if text.startswith("{"):
        return _json_calls(text)
    if named := re.fullmatch(r"<function=([^>\s]+)>(.*)</function>", text, re.S):
        pairs = re.findall(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", named[2], re.S)
        return [(named[1], {key: _value(value) for key, value in pairs})]
    if named := re.match(r"([\w.-]+)\s*(?=<arg_key>|$)", text):
        pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", text, re.S)
        return [(named[1], {key.strip(): _value(value) for key, value in pairs})]
    return None


def _json_calls(text: str) -> list[tuple[str, Any]] | None:
    """One object or an array of them."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = []
    for each in found if isinstance(found, list) else [found]:
        given = each.get("arguments", each.get("parameters")) if isinstance(each, dict) else None
        given = _value(given) if isinstance(given, str) else given
        if not isinstance(given, dict) or not isinstance(each.get("name"), str):
            return None
        calls.append((each["name"], given))
    return calls or None


def _kimi(text: str) -> list[tuple[str, Any]] | None:
    found = re.findall(
        r"<\|tool_call_begin\|>\s*(?:functions\.)?([\w.-]+?)(?::\d+)?\s*"
        r"<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>",
        text,
        re.S,
    )
    calls = [(name, _value(arguments.strip())) for name, arguments in found]
    return calls if calls and all(isinstance(given, dict) for _, given in calls) else None


FORMS = (
    Form(OPEN, CLOSE, _hermes),
    Form("[TOOL_CALLS]", "", lambda text: _json_calls(text.strip())),
    Form("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", _kimi),
)
# Texts that mean something here although some tokenizers have them as control tokens.
MARKS = (
    *(mark for form in FORMS for mark in (form.open, form.close) if mark),
    *(THINK, THINK_END),
    *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)


class ReplyText:
    """`push` text, take the parts that are final; `end` gives what was held back. calls: those that
    are complete."""

    def __init__(self, tools: Sequence[Tool], thinking: bool, leading_space: bool = False) -> None:
        """thinking: the prompt has opened the thoughts. leading_space: a first space is none of the
        text's."""
        self.calls: list[Call] = []
        self._names = {tool.name for tool in tools}
        self._state = "reasoning" if thinking else "start"
        self._held, self._space = "", leading_space
        self._form: Form | None = None

    def push(self, text: str) -> list[Part]:
        if self._space and text:
            self._space, text = False, text.removeprefix(" ")
        self._held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return _joined(parts)

    def end(self) -> list[Part]:
        """No more text comes."""
        parts: list[Part] = []
        if self._form is not None and not self._form.close:
            self._close(parts, self._held, "")
            self._held = ""
        opened = self._form.open if self._form is not None else ""
        if self._state == "behind":
            self._held = self._held.lstrip()
        kind = "reasoning" if self._state == "reasoning" else "content"
        parts.append(Part(kind, opened + self._held))
        self._held, self._form = "", None
        return _joined(parts)

    def _step(self, parts: list[Part]) -> bool:
        """Move on as far as the held text says; whether there may be more to do."""
        if self._form is not None:
            if not self._form.close or self._form.close not in self._held:
                return False
            inside, _, self._held = self._held.partition(self._form.close)
            self._close(parts, inside, self._form.close)
            return True
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(THINK):
                self._held, self._state = begun.removeprefix(THINK), "reasoning"
                return True
            if THINK.startswith(begun):
                return False
            self._state = "content"
        if self._state == "reasoning":
            return self._until(parts, "reasoning", {THINK_END: None})
        if self._state == "behind":  # blank lines behind thoughts and calls are no answer
            self._held = self._held.lstrip()
            if not self._held:
                return False
            self._state = "content"
        opens: dict[str, Form | None] = {form.open: form for form in FORMS} if self._names else {}
        return self._until(parts, "content", opens)

    def _until(self, parts: list[Part], kind: str, marks: dict[str, Form | None]) -> bool:
        """Give out text up to one of the marks, or to where one may begin."""
        found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        if not found:
            sizes = (n for m in marks for n in range(1, len(m)) if self._held.endswith(m[:n]))
            end = len(self._held) - max(sizes, default=0)
            parts.append(Part(kind, self._held[:end]))
            self._held = self._held[end:]
            return False
        at, mark = min(found)
        parts.append(Part(kind, self._held[:at]))
        self._held = self._held[at + len(mark) :]
        self._form = marks[mark]
        if self._form is None:
            self._state = "behind"
        return True

    def _close(self, parts: list[Part], inside: str, close: str) -> None:
        assert self._form is not None
        calls = self._form.read(inside)
        if calls is None or any(name not in self._names for name, _ in calls):
            parts.append(Part("content", self._form.open + inside + close))
        else:
            texts = [(name, json.dumps(given, ensure_ascii=False)) for name, given in calls]
            self.calls += [Call(name, text) for name, text in texts]
            self._state = "behind"
        self._form = None


def _joined(parts: list[Part]) -> list[Part]:
    """Without empty ones, neighbours of a kind together."""
    found: list[Part] = []
    for part in filter(lambda part: part.text, parts):
        if found and found[-1].kind == part.kind:
            found[-1] = Part(part.kind, found[-1].text + part.text)
        else:
            found.append(part)
    return found


def _value(text: str) -> Any:
    """An argument written as text: JSON where it is some."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
