"""A conversation within a model's context: what was said, and how much of it the model still reads.

Messages are dicts of `role` and `content`, as chat templates take them. Nothing is forgotten here:
the oldest exchanges are left out of prompts once they do not fit. Knows a tokenizer and no model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chronos.common.errors import UsageError

if TYPE_CHECKING:
    from chronos.common.text.tokenizer import Tokenizer

Message = dict[str, Any]


@dataclass
class Conversation:
    """start: instructions that every prompt begins with. first: of `messages`, the first one that
    the model reads."""

    start: list[Message] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    first: int = 0

    def prompt(self, tokenizer: Tokenizer, context: int, reply: int) -> list[int]:
        """Ids of the start and of the latest messages, opened for a reply of up to `reply` tokens.

        What is older is left out from an earlier message of the user's on, until there is room for
        the reply, or for a quarter of the context if that is less. Raises UsageError where the last
        message alone fills the context, and what the chat template raises.
        """
        room, first = context - min(reply, context // 4), self.first
        while True:
            ids = tokenizer.apply_chat([*self.start, *self.messages[first:]])
            later = (n for n in range(first + 1, len(self.messages)) if self._opens(n))
            following = next(later, None)
            if len(ids) <= room or (following is None and len(ids) < context):
                self.first = first
                return ids
            if following is None:
                raise UsageError(
                    f"the message alone has {len(ids)} tokens and the context holds {context}",
                    "",
                    "shorten it, or start with a larger --context N",
                )
            first = following

    def _opens(self, number: int) -> bool:
        return bool(self.messages[number]["role"] == "user")

    def dumps(self) -> str:
        """One line of JSON: the row that training takes."""
        return json.dumps({"messages": [*self.start, *self.messages]}, ensure_ascii=False) + "\n"

    @classmethod
    def loads(cls, text: str, where: str) -> Conversation:
        """Of what `dumps` wrote, or of a list of messages. Raises UsageError."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError(f"that is not JSON: {error}", where) from None
        messages = data.get("messages") if isinstance(data, dict) else data
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise UsageError(
                "that is no conversation",
                where,
                'it looks like {"messages": [{"role": "user", "content": "..."}]}',
            )
        start = 0
        while start < len(messages) and messages[start]["role"] == "system":
            start += 1
        return cls(messages[:start], messages[start:])


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )
