"""Chat templates: from messages to the text a model was trained on.

Chronos' own template is rendered in this process. Any other one came with a model folder and is
rendered in a child process with limits (see `template_child`), about 0.1 s a call: `render_all`
takes many conversations at once for that reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
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


class TemplateError(DataError):
    """A chat template that fails, misbehaves or refuses the conversation."""


class ChatTemplate:
    """One Jinja template; `source` is its text."""

    def __init__(self, source: str) -> None:
        self.source = source

    def render(self, messages: Sequence[Any], reply: bool, **tokens: str) -> str:
        """Text of one conversation, opened for the assistant's reply if `reply`."""
        return self.render_all([(messages, reply)], **tokens)[0]

    def render_all(self, chats: Sequence[tuple[Sequence[Any], bool]], **tokens: str) -> list[str]:
        """`render` of many; `tokens` are names the template may use. Raises TemplateError."""
        jobs = [
            {"messages": messages, "add_generation_prompt": reply, **tokens}
            for messages, reply in chats
        ]
        render = _trusted if self.source in (CHAT_TEMPLATE, NO_TEMPLATE) else _foreign
        return render(self.source, jobs)


def _trusted(source: str, jobs: list[dict[str, Any]]) -> list[str]:
    from chronos.common.text.template_child import render_all  # Jinja costs 50 ms to import

    try:
        return render_all(source, jobs)
    except Exception as error:  # as for a foreign template
        raise TemplateError(f"chat template: {error}") from None


def _foreign(source: str, jobs: list[dict[str, Any]]) -> list[str]:
    script = Path(__file__).with_name("template_child.py")
    request = json.dumps({"source": source, "jobs": jobs}).encode()
    try:
        # -P: a file named json.py in the current folder must not become the child's json.
        done = subprocess.run(
            [sys.executable, "-P", str(script)],
            input=request,
            capture_output=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TemplateError(f"chat template was not rendered: {error}") from None
    if done.returncode == 1:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["failed"]
        raise TemplateError(f"chat template: {reason[-1]}")
    if done.returncode:
        raise TemplateError("chat template: it used too much time or memory and was ended")
    texts = json.loads(done.stdout)
    assert isinstance(texts, list) and len(texts) == len(jobs)
    return texts
