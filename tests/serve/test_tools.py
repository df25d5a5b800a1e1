"""Thoughts, answers and calls are told apart however a text is cut; no call stays text."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from chronos.common.text.sampling import SamplingParams
from chronos.common.text.tokenizer import Tokenizer
from chronos.run.generation import Step
from chronos.serve.ask import Ask, ChatText
from chronos.serve.tools import ReplyText, Tool
from chronos.testing.tiny import tiny_tokenizer

TOOLS = [Tool("get"), Tool("put")]
HERMES = '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>'
CODER = (
    "<tool_call>\n<function=get>\n<parameter=a>\n1\n</parameter>\n"
    "<parameter=text>\ntwo\nlines\n</parameter>\n</function>\n</tool_call>"
)
GLM = "<tool_call>put\n<arg_key>a</arg_key>\n<arg_value>[1, 2]</arg_value>\n</tool_call>"
MISTRAL = '[TOOL_CALLS][{"name": "get", "arguments": {"a": 1}}, {"name": "put", "arguments": {}}]'
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_calls_section_end|>'
)


def told(
    text: str, cuts: random.Random | None = None, thinking: bool = False, tools: Any = TOOLS
) -> tuple[str, str, list[tuple[str, Any]]]:
    """Content, reasoning and calls of a text that comes in pieces."""
    reply, parts = ReplyText(tools, thinking), []
    at = 0
    while at < len(text):
        size = 1 if cuts is None else cuts.randint(1, 7)
        parts += reply.push(text[at : at + size])
        at += size
    parts += reply.end()
    content, reasoning = (
        "".join(part.text for part in parts if part.kind == kind)
        for kind in ("content", "reasoning")
    )
    return content, reasoning, [(call.name, json.loads(call.arguments)) for call in reply.calls]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (HERMES, [("get", {"a": 1})]),
        (CODER, [("get", {"a": 1, "text": "two\nlines"})]),
        (GLM, [("put", {"a": [1, 2]})]),
        (MISTRAL, [("get", {"a": 1}), ("put", {})]),
        (KIMI, [("get", {"a": 1})]),
        (f"{HERMES}\n{GLM}\n", [("get", {"a": 1}), ("put", {"a": [1, 2]})]),
    ],
)
def test_each_form_of_calls(text: str, calls: list[tuple[str, Any]]) -> None:
    for cuts in (None, random.Random(0), random.Random(1)):
        assert told(text, cuts) == ("", "", calls)
        assert told(f"Well: {text}", cuts) == ("Well: ", "", calls)


@pytest.mark.parametrize(
    "text",
    [
        HERMES[:-3],
        HERMES[:20],
        "<tool_call>{nonsense}</tool_call>",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get", "arguments": 3}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        "<tool_call>" + "[" * 5000 + "</tool_call>",
        "[TOOL_CALLS]",
        '[TOOL_CALLS][{"name": "get", "arg',
        "<tool",
        "a <tool_calls> b",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert told(text, random.Random(2)) == (text, "", [])


def test_without_tools_nothing_is_a_call() -> None:
    assert told(HERMES, tools=[]) == (HERMES, "", [])


@pytest.mark.parametrize("opened", [True, False])
def test_thoughts_are_apart(opened: bool) -> None:
    text = "Let me see.\n</think>\n\nFour."
    assert told(text if opened else f"\n<think>{text}", thinking=opened) == (
        "Four.",
        "Let me see.\n",
        [],
    )
    cut = "Let me"
    assert told(cut if opened else f"<think>{cut}", thinking=opened) == ("", cut, [])
    assert told("a <think> b </think>") == ("a <think> b </think>", "", [])


def test_a_call_in_thoughts_is_a_thought() -> None:
    text = f"I could {HERMES}</think>{HERMES}"
    assert told(text, thinking=True) == ("", f"I could {HERMES}", [("get", {"a": 1})])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.sampled_from(
            [HERMES, GLM, "<tool_call>", "</tool_call>", "<think>", "</think>", "a b", "<", "\n"]
        ),
        max_size=6,
    ),
    st.randoms(),
    st.booleans(),
)  # fmt: skip
def test_the_cuts_do_not_matter(parts: list[str], cuts: Any, thinking: bool) -> None:
    text = "".join(parts)
    assert told(text, cuts, thinking) == told(text, None, thinking)


def test_marks_that_are_control_tokens_count_and_are_not_shown() -> None:
    """Their steps have no text: some vocabularies have the marks of calls so."""
    core = tokenizers.Tokenizer.from_str(tiny_tokenizer()._core.to_str())
    core.add_special_tokens(["<tool_call>", "</tool_call>", "</think>"])
    tokenizer = Tokenizer(core)
    served: Any = SimpleNamespace(tokenizer=tokenizer)
    text = ChatText(Ask(served, SamplingParams(), tools=TOOLS, thinking=True))
    parts = []
    for piece in ("hm", "</think>", "So:", "<tool_call>", '{"name": "get", "arguments": {}}',
                  "</tool_call>"):  # fmt: skip
        token = tokenizer.control_ids.get(piece)
        parts += text.take(Step(7, piece) if token is None else Step(token, ""))
    parts += text.end()
    assert [(part.kind, part.text) for part in parts] == [("reasoning", "hm"), ("content", "So:")]
    assert [(call.name, call.arguments) for call in text.calls] == [("get", "{}")]
    assert text.thoughts == 1 and text.reason("stop") == "tool_calls"
    assert text.reason("length") == text.reason("context") == "length"
