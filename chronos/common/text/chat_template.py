"""Chat templates: from messages to the text a model was trained on.

Chronos' own template is rendered in this process. Any other one came with a model folder and is
rendered in a child process with limits (see `template_child`), one for all templates, which stays
alive between calls and is replaced after a failure. Knows no tokens: which of the text is a control
token is said by name.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chronos.common.errors import DataError

# No text of its own between control tokens: a prefix of the turns is then a prefix of the ids,
# since byte-level merges never cross a control token.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{ raise_exception('unknown role: ' ~ message.role) }}
{%- endif -%}
{{ '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""
NO_TEMPLATE = "{{ raise_exception('the model comes without one, so it cannot chat') }}"
# The child limits its own CPU time; this catches one that was stopped or starved.
_WALL_SECONDS = 60.0
# Noncharacters, of which three that no message has mark the template's own control tokens.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# Names for what a model thought, the standard one first; templates know one or another.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# [{"role": "user", "content": "..."}, ...]
Messages = Sequence[Mapping[str, Any]]


class TemplateError(DataError):
    """A chat template that fails, misbehaves or refuses the conversation."""


class ChatTemplate:
    """One Jinja template; `source` is its text."""

    def __init__(self, source: str) -> None:
        self.source = source

    def render(self, messages: Messages, reply: bool, **variables: Any) -> str:
        """Text of one conversation, opened for the assistant's reply if `reply`."""
        return "".join(self.render_all([(messages, reply)], **variables)[0])

    def render_all(
        self,
        chats: Sequence[tuple[Messages, bool]],
        control: Sequence[str] = (),
        **variables: Any,
    ) -> list[list[str]]:
        """`render` of many, each as a list: text, control token, text, control token, ..., text.

        control: the texts of control tokens. One counts where the template wrote it (or a role
        between two parts that it wrote), never where a message did, whatever the template does to
        that. variables: names the template may use, as bos_token or tools. Raises TemplateError.
        """
        prepared = [(_as_transformers(messages), reply) for messages, reply in chats]
        said = json.dumps([prepared, variables], ensure_ascii=False, default=str)
        marks = _free_marks(said + self.source)
        for name, value in variables.items():
            if isinstance(value, str) and value in control:
                variables[name] = marks[0] + value + marks[2]
        jobs = [
            {
                "tools": None, "documents": None, **variables,
                "messages": messages, "add_generation_prompt": reply,
            }
            for messages, reply in prepared
        ]  # fmt: skip
        request = {"source": self.source, "control": list(control), "marks": marks, "jobs": jobs}
        try:
            texts = _rendered(request)
        except TemplateError as error:
            raise TemplateError(_without(marks, error.what)) from None
        return [
            _split(text, marks, control, {m.get("role") for m in messages})
            for text, (messages, _) in zip(texts, prepared, strict=True)
        ]


def _rendered(request: dict[str, Any]) -> list[str]:
    if request["source"] not in (CHAT_TEMPLATE, NO_TEMPLATE):
        return _CHILD.render(request)
    from chronos.common.text.template_child import render_all  # Jinja costs 50 ms to import

    try:
        return render_all(**request)
    except Exception as error:  # as for a foreign template
        raise TemplateError(f"chat template: {error}") from None


class _Child:
    """The process that renders templates, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._forget)

    def render(self, request: dict[str, Any]) -> list[str]:
        """The texts of a request. Raises TemplateError, with the template's own reason."""
        line = json.dumps(request, default=str).encode() + b"\n"
        with self._lock:
            try:
                answer = json.loads(self._exchange(line))
            except OSError as error:
                self._end()
                raise TemplateError(f"chat template was not rendered: {error}") from None
            except ValueError:  # half a line or none
                self._end()
                raise TemplateError(
                    "chat template: it used too much time or memory and was ended"
                ) from None
            except BaseException:  # an interrupt would leave the answer for the next request
                self._end()
                raise
            if "MemoryError" in answer.get("error", ""):
                self._end()
        if "error" in answer:
            raise TemplateError(f"chat template: {answer['error']}")
        texts: list[str] = answer["texts"]
        return texts

    def close(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            self._end()

    def _exchange(self, line: bytes) -> bytes:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        watch = threading.Timer(_WALL_SECONDS, process.kill)
        watch.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:
            return b""
        finally:
            watch.cancel()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            script = Path(__file__).with_name("template_child.py")
            # -P: a file named json.py in the current folder must not become the child's json.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdin, process.stdout)):
            try:
                pipe.close()
            except OSError:  # what was not flushed has no reader any more
                continue

    def _forget(self) -> None:
        """After a fork: the process is the parent's, and its lock may be held by no thread here."""
        if self._process is not None:
            self._process.returncode = 0  # so that nobody here waits for it
        self._process, self._lock = None, threading.Lock()


_CHILD = _Child()


def _as_transformers(messages: Messages) -> list[dict[str, Any]]:
    """Messages as Transformers hands them to a template: no key without a value, and the thoughts
    under each name that templates read."""
    prepared = []
    for message in messages:
        known = {key: value for key, value in message.items() if value is not None}
        thoughts = next((known[key] for key in _REASONING if key in known), None)
        if thoughts is not None:
            known = {"thinking": thoughts, **known, "reasoning_content": thoughts}
        prepared.append(known)
    return prepared


def _free_marks(text: str) -> str:
    free = [mark for mark in _MARKS if mark not in text]
    if len(free) < 3:
        raise DataError("the messages use nearly every Unicode noncharacter from U+FDD0 to U+FDEF")
    return "".join(free[:3])


def _split(text: str, marks: str, control: Sequence[str], roles: set[Any]) -> list[str]:
    """The text cut at the control tokens that the template wrote, without marks."""
    opened, border, closed = list(marks)
    other = f"[^{marks}]"
    token = re.compile(f"{opened}({other}+)(?:{border}({other}*){border}({other}+))?{closed}")
    names, parts, end = frozenset(control), [], 0
    for match in token.finditer(text):
        name = "".join(filter(None, match.groups()))
        if name in names and (not match[2] or match[2] in roles):
            parts += [_without(marks, text[end : match.start()]), name]
            end = match.end()
    return [*parts, _without(marks, text[end:])]


def _without(marks: str, text: str) -> str:
    return text.translate(dict.fromkeys(map(ord, marks)))
