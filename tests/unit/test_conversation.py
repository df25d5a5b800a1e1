"""A conversation within a context: what is still read of it, and how it is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chronos.common.data.rows import parse_row
from chronos.common.errors import UsageError
from chronos.common.text.tokenizer import Tokenizer
from chronos.run.conversation import Conversation


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["aa bb"] * 3, 264)  # a token a letter, and three around a message


def test_the_oldest_exchanges_make_way_and_are_not_forgotten(tokenizer: Tokenizer) -> None:
    talk = Conversation([message("system", "be kind")])
    seen = []
    for number in range(6):
        talk.messages.append(message("user", f"question {number}"))
        ids = talk.prompt(tokenizer, context=60, reply=8)
        assert len(ids) <= 60 - 8
        text = tokenizer.decode(ids)
        assert text.startswith("be kind") and f"question {number}" in text
        assert "question 0" in text or talk.first > 0
        assert talk.messages[talk.first]["role"] == "user"
        talk.messages.append(message("assistant", f"answer {number}"))
        seen.append(talk.first)
    assert seen[0] == 0 and seen == sorted(seen) and seen[-1] >= 6
    assert len(talk.messages) == 12


def test_a_reply_gets_no_more_than_a_quarter_of_the_context(tokenizer: Tokenizer) -> None:
    """However many tokens it may have: otherwise nothing of the conversation would be read."""
    talk = Conversation(
        messages=[message("user", "a" * 10), message("assistant", "b"), message("user", "c" * 10)]
    )
    whole = len(tokenizer.apply_chat(talk.messages))
    talk.prompt(tokenizer, context=-(-whole * 4 // 3), reply=10_000)
    assert talk.first == 0
    talk.prompt(tokenizer, context=whole, reply=10_000)
    assert talk.first == 2


def test_a_message_that_fills_the_context_alone_is_refused(tokenizer: Tokenizer) -> None:
    talk = Conversation(messages=[message("user", "a" * 30)])
    length = len(tokenizer.apply_chat(talk.messages))
    assert len(talk.prompt(tokenizer, context=length + 1, reply=8)) == length
    with pytest.raises(UsageError, match=f"alone has {length} tokens and the context holds") as e:
        talk.prompt(tokenizer, context=length, reply=8)
    assert "--context" in e.value.fix


def test_it_is_kept_as_a_row_that_training_takes(tokenizer: Tokenizer) -> None:
    talk = Conversation([message("system", "be kind")])
    talk.messages += [message("user", "h\u00e9\n\U0001f980"), message("assistant", "yes")]
    line = talk.dumps()
    assert line.count("\n") == 1 and "\U0001f980" in line
    again = Conversation.loads(line, "chat.json")
    assert (again.start, again.messages, again.first) == (talk.start, talk.messages, 0)
    assert parse_row(line.encode(), "chat.json").messages == (*talk.start, *talk.messages)
    assert Conversation.loads(json.dumps(talk.messages), "x").messages == talk.messages


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", "not JSON"),
        ("{}", "no conversation"),
        ('[{"role": "user"}]', "no conversation"),
        ('{"messages": [{"role": 1, "content": "a"}]}', "no conversation"),
        ("7", "no conversation"),
    ],
)
def test_what_is_no_conversation_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Conversation.loads(text, "chat.json")
    assert caught.value.where == "chat.json"
