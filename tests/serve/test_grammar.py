"""Replies that must have a shape have it, whatever the weights would rather write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chronos.serve.grammar import Grammar, of_schema
from chronos.serve.served import Served
from tests.conftest import wanted
from tests.support.serving import CHAT, HELLO, Running, serving

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 99}, "k": {"enum": ["x", "y"]}},
    "required": ["n", "k"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "put", "parameters": {
        "type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
        "additionalProperties": False}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def server(one_backend: str, folder: Path) -> Iterator[Running]:
    """With the model's own end token, by which a grammar ends a reply."""
    with serving(folder, backend=one_backend, stop_ids=None) as running:
        yield running


def fits(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"n", "k"}
        and isinstance(value["n"], int)
        and value["n"] <= 99
        and value["k"] in ("x", "y")
    )


def wild(seed: int) -> dict[str, Any]:
    return {"temperature": 2.0, "seed": seed, "max_tokens": 120}


@pytest.mark.parametrize("seed", range(20))
def test_a_schema_is_kept_at_any_temperature(server: Running, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    [choice] = server.chat(response_format=form, **wild(seed))["choices"]
    assert choice["finish_reason"] == "stop"
    assert fits(json.loads(choice["message"]["content"]))
    events = server.events(CHAT, messages=HELLO, response_format=form, **wild(seed))[:-1]
    said = [c["delta"].get("content") or "" for e in events for c in e["choices"]]
    assert "".join(said) == choice["message"]["content"]


def test_an_object_is_an_object(server: Running) -> None:
    form = {"type": "json_object"}
    bias = {str(server.service.catalogue.first.tokenizer.encode("}")[0]): 60}
    [choice] = server.chat(response_format=form, logit_bias=bias, **wild(3))["choices"]
    assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize("seed", range(2))
def test_forced_calls_fit_their_parameters(server: Running, seed: int) -> None:
    named = {"type": "function", "function": {"name": "put"}}
    [choice] = server.chat(tools=TOOLS, tool_choice=named, **wild(seed))["choices"]
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "put"
    given = json.loads(call["function"]["arguments"])
    assert given.keys() == {"on"} and isinstance(given["on"], bool)

    asked = {"tools": TOOLS, "tool_choice": "required", **wild(seed), "max_tokens": 200}
    [choice] = server.chat(**asked)["choices"]
    calls = choice["message"]["tool_calls"]
    events = server.events(CHAT, messages=HELLO, **asked)[:-1]
    streamed = [
        call for e in events for c in e["choices"] for call in c["delta"].get("tool_calls", ())
    ]
    assert [call["index"] for call in streamed] == list(range(len(calls)))
    assert [call["function"] for call in streamed] == [call["function"] for call in calls]
    assert len({call["id"] for call in [*calls, *streamed]}) == 2 * len(calls)
    for each in calls:
        given = json.loads(each["function"]["arguments"])
        assert fits(given) if each["function"]["name"] == "get" else given.keys() == {"on"}


@pytest.mark.parametrize("most", [8, 24, 48, 64])
def test_a_call_that_was_cut_is_told_by_the_length(server: Running, most: int) -> None:
    named = {"type": "function", "function": {"name": "get"}}
    asked = {"tools": TOOLS, "tool_choice": named, **wild(1), "max_tokens": most}
    [choice] = server.chat(**asked)["choices"]
    events = server.events(CHAT, messages=HELLO, **asked)[:-1]
    reasons = {c["finish_reason"] for e in events for c in e["choices"]} - {None}
    assert reasons == {choice["finish_reason"]}
    whole = "tool_calls" in choice["message"]
    assert choice["finish_reason"] == ("tool_calls" if whole else "length")


@pytest.mark.parametrize("door", ["chat", "messages", "responses"])
def test_what_cannot_be_enforced_is_refused(server: Running, door: str) -> None:
    schema = {"not": {"type": "object"}}
    form = {"type": "json_schema", "name": "s", "schema": schema}
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "chat": (CHAT, {"messages": HELLO, "response_format": {**form, "json_schema": form}}),
        "messages": ("/v1/messages", {"messages": HELLO, "output_config": {"format": form}}),
        "responses": ("/v1/responses", {"input": "x", "text": {"format": form}}),
    }
    path, body = bodies[door]
    response = server.post(path, max_tokens=5, **body)
    assert response.status_code == 400
    assert 'Unimplemented keys: ["not"]' in response.json()["error"]["message"]


def test_a_call_through_anthropics_door_and_through_responses(server: Running) -> None:
    draw = {"temperature": 2.0}
    tool = {"name": "get", "input_schema": SCHEMA}
    asked = {"messages": HELLO, "max_tokens": 120, "tools": [tool], **draw}
    choice = {"type": "tool", "name": "get"}
    whole = server.post("/v1/messages", **asked, tool_choice=choice).json()
    [block] = whole["content"]
    assert whole["stop_reason"] == "tool_use" and fits(block["input"])
    events = server.events("/v1/messages", **asked, tool_choice=choice)
    [text] = [
        e["delta"]["partial_json"] for e in events
        if e["type"] == "content_block_delta" and e["delta"]["type"] == "input_json_delta"
    ]  # fmt: skip
    assert fits(json.loads(text))
    tool = {"type": "function", "name": "get", "parameters": SCHEMA}
    whole = server.post("/v1/responses", input="x", tools=[tool], tool_choice="required", **draw)
    calls = [item for item in whole.json()["output"] if item["type"] == "function_call"]
    assert calls and all(fits(json.loads(call["arguments"])) for call in calls)


def test_thoughts_are_free_and_what_follows_is_not(folder: Path) -> None:
    served = Served.open(str(folder))
    grammar = Grammar(served, of_schema(SCHEMA), thinking=True)
    for token in served.tokenizer.encode("{1 + 1}? </thin </think>"):
        assert grammar.mask() is None
        grammar.take(token)
    allowed = grammar.mask()
    assert allowed is not None and allowed.shape == (served.vocab_size,)
    texts = {served.tokenizer.token_bytes(int(token)) for token in allowed.nonzero()[0]}
    assert texts and all(text.startswith(b"{") for text in texts)


def test_a_template_that_opens_thoughts_is_seen(folder: Path, tmp_path: Path) -> None:
    """And its replies begin in them: the reasoning is apart, and counted."""
    shutil.copytree(folder, tmp_path / "thinks")
    template = "{{ messages[-1].content }}{% if enable_thinking != false %}<think>\n{% endif %}"
    (tmp_path / "thinks" / "chat_template.jinja").write_text(template)
    with serving(tmp_path / "thinks", backend=wanted()[0]) as server:
        for thinks in (True, False):
            kwargs = {"enable_thinking": thinks}
            answer = server.chat(max_tokens=9, chat_template_kwargs=kwargs)
            message = answer["choices"][0]["message"]
            counted = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
            assert (counted == 9) == thinks
            assert bool(message.get("reasoning_content")) == thinks
            assert bool(message["content"]) == (not thinks)
            assert answer["choices"][0]["finish_reason"] == "length"
        events = server.events("/v1/messages", messages=HELLO, max_tokens=9)
        kinds = [e["delta"]["type"] for e in events if e["type"] == "content_block_delta"]
        assert kinds[-1] == "signature_delta" and set(kinds[:-1]) == {"thinking_delta"}
