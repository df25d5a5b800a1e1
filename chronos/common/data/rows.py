"""One row of training data: JSON in the field names TRL uses, checked before anything uses it.

`text` | `messages` | `prompt` + `completion` | `prompt` + `chosen` + `rejected` | `prompt`.
A prompt and its answers are all text or all lists of messages. Other fields are kept: a reward may
want them.
Not covered: tool calls, images.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

Message = dict[str, str]
Turns = str | tuple[Message, ...]
# The fields of each kind, the most specific first.
_KINDS = {
    "preference": ("prompt", "chosen", "rejected"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}


class RowError(ValueError):
    """What is wrong with one row; the reader adds file and line."""


@dataclass(frozen=True)
class Document:
    """One example. `where` is file:line or the file's relative name; `key` decides its split.

    Of the fields only those of its `kind` are set. columns: a JSON row's other fields.
    """

    where: str
    kind: str = "text"
    text: str = ""
    messages: tuple[Message, ...] = ()
    prompt: Turns = ""
    completion: Turns = ""
    chosen: Turns = ""
    rejected: Turns = ""
    key: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


def decode_utf8(data: bytes) -> str:
    """Text without a byte order mark. Raises RowError naming the first bad byte."""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RowError(f"byte {error.start + 1} ({data[error.start]:#04x}) is not UTF-8") from None


def parse_row(line: bytes, where: str) -> Document:
    """The document of one JSON line. Raises RowError with the reason."""
    try:
        row = json.loads(decode_utf8(line), parse_constant=_refuse_constant)
    except RowError:
        raise
    except RecursionError:
        raise RowError("nested too deeply") from None
    except ValueError as error:
        raise RowError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"a row is a JSON object, not {_name(row)}")
    kind = _kind(row)
    fields: dict[str, Any] = {name: _FIELDS[name](row[name], name) for name in _KINDS[kind]}
    if len({type(value) for value in fields.values()}) > 1:
        raise RowError(f"{' and '.join(fields)} must all be text, or all lists of messages")
    key = json.dumps([fields[name] for name in _KINDS[kind]], sort_keys=True)
    columns = {name: value for name, value in row.items() if name not in fields}
    return Document(where, kind, key=key, columns=columns, **fields)


def _kind(row: Mapping[str, Any]) -> str:
    for kind, names in _KINDS.items():
        if all(name in row for name in names):
            return kind
    known = " | ".join("+".join(names) for names in _KINDS.values())
    found = ", ".join(sorted(row)[:8]) or "none"
    raise RowError(f"the fields must be {known}; found {found}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is {_name(value)}, not text")
    if not value.strip():
        raise RowError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{name} has a lone surrogate at character {error.start + 1}") from None
    return value


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise RowError(f"{name} is {_name(value)}, not a list of messages")
    if not value:
        raise RowError(f"{name} is empty")
    return tuple(_message(item, f"{name}[{i}]") for i, item in enumerate(value))


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{name} is {_name(item)}, not an object with role and content")
    role = item.get("role")
    if not isinstance(role, str) or not role:  # which there are is the chat template's business
        raise RowError(f"{name}.role is {_name(role)}, not the name of a speaker")
    return {"role": role, "content": _text(item.get("content"), f"{name}.content")}


def _conversation(value: Any, name: str) -> tuple[Message, ...]:
    messages = _messages(value, name)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"{name} has no assistant turn: there is nothing to learn")
    return messages


def _turns(value: Any, name: str) -> Turns:
    return _text(value, name) if isinstance(value, str) else _messages(value, name)


def _answer(value: Any, name: str) -> Turns:
    return _text(value, name) if isinstance(value, str) else _conversation(value, name)


_FIELDS = {
    "text": _text,
    "messages": _conversation,
    "prompt": _turns,
    "completion": _answer,
    "chosen": _answer,
    "rejected": _answer,
}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")
