"""What goes over the wire: the doors of OpenAI's and Anthropic's clients, streamed and whole."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from chronos.common.text.sampling import PIECE
from chronos.testing.tiny import CONFIG
from tests.support.serving import CHAT, HELLO, TEXT, Running

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
VOCAB, CONTEXT = CONFIG.vocab_size, 4 * PIECE
SEEDED = {"temperature": 1.5, "seed": 7}


def one(answer: Any) -> Any:
    [choice] = answer["choices"]
    return choice


def deltas(events: list[Any], index: int = 0, field: str = "content") -> str:
    choices = [choice for e in events if e != "[DONE]" for choice in e["choices"]]
    return "".join(c["delta"].get(field) or "" for c in choices if c["index"] == index)


@pytest.mark.parametrize("stop", [[], ["ex", "\n  "]])
def test_a_streamed_chat_is_the_whole_one(server: Running, stop: list[str]) -> None:
    asked = {"messages": HELLO, "max_tokens": 40, "n": 2, "stop": stop, **SEEDED}
    whole = server.chat(**asked)
    events = server.events(CHAT, **asked, stream_options={"include_usage": True})
    first, *_, usage, done = events
    assert done == "[DONE]"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert usage["choices"] == []
    told = {k: v for k, v in usage["usage"].items() if k != "chronos"}
    assert told == {k: v for k, v in whole["usage"].items() if k != "chronos"}
    assert told["total_tokens"] == told["prompt_tokens"] + told["completion_tokens"]
    for choice in whole["choices"]:
        assert deltas(events, choice["index"]) == choice["message"]["content"]
        assert not any(text in choice["message"]["content"] for text in stop)
        [reason] = [
            c["finish_reason"] for e in events[:-2] for c in e["choices"]
            if c["index"] == choice["index"] and c["finish_reason"]
        ]  # fmt: skip
        assert reason == choice["finish_reason"]
    assert not any("usage" in event for event in events[:-2])


def test_no_usage_is_streamed_unless_asked_for(server: Running) -> None:
    *chunks, done = server.events(CHAT, messages=HELLO, max_tokens=2)
    assert done == "[DONE]" and all(chunk["choices"] for chunk in chunks)


def test_a_streamed_text_is_the_whole_one(server: Running) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "logprobs": 2, **SEEDED}
    whole = one(server.text("for line", **asked))
    events = server.events(TEXT, prompt="for line", **asked)[:-1]
    choices = [one(event) for event in events]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name, values in whole["logprobs"].items():
        streamed = [v for c in choices if c["logprobs"] for v in c["logprobs"][name]]
        assert streamed == values, name
    assert len(whole["logprobs"]["tokens"]) == 12


def said(path: str, answer: Any) -> str:
    """The text of a whole answer."""
    if path == MESSAGES:
        return "".join(block["text"] for block in answer["content"])
    if path == RESPONSES:
        return "".join(part["text"] for item in answer["output"] for part in item["content"])
    choice = one(answer)
    return str(choice["text"] if path == TEXT else choice["message"]["content"])


def streamed(path: str, events: list[Any]) -> str:
    """The text that the events of a stream join to."""
    if path == CHAT:
        return deltas(events)
    if path == TEXT:
        return "".join(one(event)["text"] for event in events if event != "[DONE]")
    if path == MESSAGES:
        found = [e["delta"] for e in events if e["type"] == "content_block_delta"]
        return "".join(delta["text"] for delta in found)
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


@pytest.mark.parametrize("path", [CHAT, TEXT, MESSAGES, RESPONSES])
def test_fifty_streams_join_to_their_whole_replies(server: Running, path: str) -> None:
    """Random weights write bytes that are no characters, so many are cut by the ends of chunks."""

    def ask(number: int) -> tuple[str, str]:
        text = f"{'café ☕ ' * (number % 3)}def f{number}(x):"
        body: dict[str, Any] = {"temperature": 1.2, "seed": number}
        body["max_output_tokens" if path == RESPONSES else "max_tokens"] = 6 + number % 5
        if path in (CHAT, MESSAGES):
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt" if path == TEXT else "input"] = text
        if path in (MESSAGES, RESPONSES):  # these have no seed
            body["temperature"] = 0
            body.pop("seed")
        whole = server.post(path, **body)
        assert whole.status_code == 200, whole.text
        return said(path, whole.json()), streamed(path, server.events(path, **body))

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(ask, range(50)))
    assert [whole for whole, _ in told] == [joined for _, joined in told]
    assert len({whole for whole, _ in told}) > 25 and "\ufffd" in "".join(map("".join, told))


def test_several_texts_and_ids_are_answered_in_order(server: Running) -> None:
    ids = [5, 6, 7]
    many = server.text(["for line", "class", "for line"], temperature=0, echo=True)
    texts = [choice["text"] for choice in many["choices"]]
    assert texts[0] == texts[2] != texts[1] and texts[1].startswith("class")
    assert texts[0].removeprefix("for line") == one(server.text("for line"))["text"]
    assert one(server.text([ids, [1]]) | {"choices": server.text([ids])["choices"]})["text"]
    assert server.text(ids)["usage"]["prompt_tokens"] == 3


def test_the_model_door_tells_what_it_has(server: Running) -> None:
    [card] = server.http.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == (server.model, CONTEXT)
    assert server.http.get(f"/v1/models/{server.model}").json() == card
    assert server.http.get("/v1/models/no/such").status_code == 404
    assert server.http.head("/").status_code == 200
    assert server.http.get("/health").json() == {"status": "ok"}


def test_tokens_and_back(server: Running) -> None:
    tokenizer = server.service.catalogue.first.tokenizer
    told = server.post("/tokenize", prompt="return left").json()
    assert told["tokens"] == tokenizer.encode_prompt("return left")
    assert told["count"] == len(told["tokens"]) and told["max_model_len"] == CONTEXT
    back = server.post("/detokenize", tokens=told["tokens"]).json()
    assert back == {"prompt": "return left"}
    chat = server.post("/tokenize", messages=HELLO).json()["tokens"]
    assert chat == tokenizer.apply_chat(HELLO)
    end = server.http.get("/tokenizer_info").json()["eos_token"]
    assert server.post("/tokenize", prompt=end).json()["tokens"] == [tokenizer.eos_id]
    assert len(server.post("/tokenize", prompt=f"a {end}").json()["tokens"]) > 2
    assert server.post("/detokenize", tokens=[VOCAB + 10**6]).status_code == 400
    assert server.post("/tokenize").status_code == 400


def test_log_probabilities_of_a_chat(server: Running) -> None:
    content = one(server.chat(logprobs=True, top_logprobs=4, **SEEDED))["logprobs"]["content"]
    text = b"".join(bytes(each["bytes"]) for each in content).decode("utf-8", "replace")
    assert text == one(server.chat(**SEEDED))["message"]["content"]
    for each in content:
        top = [other["logprob"] for other in each["top_logprobs"]]
        assert len(top) == 4 and top == sorted(top, reverse=True)
        assert each["logprob"] <= top[0] and np.exp(top).sum() <= 1.0001


def test_a_bias_forces_and_forbids(server: Running) -> None:
    forced = server.text([1, 2], logit_bias={"40": 100}, max_tokens=5)
    decode = server.service.catalogue.first.tokenizer.decode
    assert one(forced)["text"] == decode([40] * 5)
    others = {str(i): -100 for i in range(VOCAB) if i != 41}
    assert one(server.text([1, 2], logit_bias=others, max_tokens=3, **SEEDED))["text"] == decode(
        [41] * 3
    )


def test_max_tokens_beyond_the_context_are_clamped_and_a_longer_prompt_is_refused(
    server: Running,
) -> None:
    full = [3 + i % 90 for i in range(CONTEXT - 5)]
    answer = server.text(full, max_tokens=32_000)
    assert answer["usage"]["completion_tokens"] == 6
    assert one(answer)["finish_reason"] == "length"
    response = server.post(TEXT, prompt=[*full, *full], max_tokens=5)
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "context_length_exceeded"
    told = f"prompt is too long: {2 * len(full)} tokens > {CONTEXT} maximum"
    assert error["message"].startswith(told)
    assert f"maximum context length is {CONTEXT} tokens" in error["message"]


def test_the_end_token_ends_a_reply_and_is_not_told(server: Running) -> None:
    free = server.text([9, 8], max_tokens=6, logprobs=0, temperature=0)
    second = one(free)["logprobs"]["tokens"][1]
    tokenizer = server.service.catalogue.first.tokenizer
    [token] = tokenizer.encode(second)[:1]
    server.worker._batch._stop_ids = frozenset({token})  # type: ignore[union-attr]
    try:
        ended = server.text([9, 8], max_tokens=6, temperature=0)
        [choice] = server.text([9, 8], max_tokens=6, temperature=0, logprobs=0)["choices"]
        told = choice["logprobs"]
    finally:
        server.worker._batch._stop_ids = frozenset()  # type: ignore[union-attr]
    assert one(ended)["finish_reason"] == "stop"
    assert one(free)["text"].startswith(one(ended)["text"])
    assert ended["usage"]["completion_tokens"] < 6
    made = ended["usage"]["completion_tokens"]
    # What it was worth is told, as lm-eval counts on: a token more than the text has.
    assert len(told["tokens"]) == made + 1 and len(told["token_logprobs"]) == made + 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": 5}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [1]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1 << 63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"deep": {}}}, "chat_template_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"images": ["http://example.org/x"]}, "images"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    server: Running, fields: dict[str, Any], param: str
) -> None:
    response = server.post(CHAT, **({"messages": HELLO, "max_tokens": 2} | fields))
    assert response.status_code == 400 and len(response.content) < 1000
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert len(error["message"]) <= 300


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff", b"[]", b'"x"', b'{"n":NaN}', b"[" * 100_000, b'{"n":' + b"9" * 5000 + b"}",
     json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode()],
)  # fmt: skip
def test_bodies_that_are_no_request(server: Running, raw: bytes) -> None:
    response = server.http.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400 and len(response.content) < 1000
    assert response.json()["error"]["message"]


def test_what_nobody_knows_and_what_asks_for_nothing_is_ignored(server: Running) -> None:
    plain = server.chat()["choices"]
    fields = {"user": "u", "metadata": {}, "store": False, "made_up": [1], "images": []}
    neutral = {"logprobs": None, "repetition_penalty": 1.0, "stop": None, "tools": [], "n": 1}
    assert server.chat(**fields, **neutral)["choices"] == plain


def test_a_model_is_never_a_path(server: Running) -> None:
    """Nor is any file opened to find out."""
    opened: list[Any] = []
    watching = [True]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching and event == "open":
            opened.append(args[0])

    sys.addaudithook(hook)  # there is no way to take it back
    with open(os.devnull):
        assert opened == [os.devnull]
    for name in ("../../etc", "/etc", "org/name", ""):
        response = server.post(CHAT, messages=HELLO, model=name)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
    watching.clear()
    assert opened == [os.devnull]
    assert server.chat(model=server.model)["model"] == server.model


def test_messages_that_templates_have_no_place_for(server: Running) -> None:
    """Developer messages, parts of text, system messages in the middle, calls and their results:
    the tiny model's template knows none of them."""
    parts = [{"type": "text", "text": "def add(left,"}, {"type": "text", "text": "right):"}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "system", "content": "Really short."},
        {"role": "user", "content": "go on"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert server.chat(messages=messages, tools=tools)["usage"]["completion_tokens"] == 8


def test_a_message_of_anthropic_is_the_chat(server: Running) -> None:
    asked = {"messages": HELLO, "max_tokens": 30, "temperature": 0}
    content = one(server.chat(**asked))["message"]["content"]
    whole = server.post(MESSAGES, **asked).json()
    assert whole["content"] == [{"type": "text", "text": content}]
    assert whole["stop_reason"] == "max_tokens" and whole["type"] == "message"
    counted = server.post(f"{MESSAGES}/count_tokens", messages=HELLO).json()["input_tokens"]
    used = whole["usage"]
    assert used["input_tokens"] + used["cache_read_input_tokens"] == counted
    events = server.events(MESSAGES, **asked)
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert events[0]["message"]["usage"]["input_tokens"] == counted
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1
    text = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
    assert text == content
    assert events[-2]["usage"]["output_tokens"] == 30
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"


def test_a_stop_sequence_is_named(server: Running) -> None:
    asked = {"messages": HELLO, "max_tokens": 30, "temperature": 0}
    text = server.post(MESSAGES, **asked).json()["content"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    stopped = server.post(MESSAGES, **asked, stop_sequences=["\0never", stop]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop)
    shown = "".join(block["text"] for block in stopped["content"])
    assert shown == text[: text.index(stop)]


def test_errors_of_anthropics_door_have_its_form(server: Running) -> None:
    response = server.post(MESSAGES, messages=HELLO)
    body = response.json()
    assert response.status_code == 400 and body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["request_id"] == response.headers["request-id"]
    long = [{"role": "user", "content": "x y" * CONTEXT}]
    error = server.post(MESSAGES, messages=long, max_tokens=5).json()["error"]
    assert error["message"].startswith("prompt is too long: ")


def test_system_blocks_that_change_with_each_request_are_left_out(server: Running) -> None:
    counts = []
    for noise in ("1", "23456"):
        header = {"type": "text", "text": f"x-anthropic-billing-header: {noise}"}
        system = [header, {"type": "text", "text": "Be short."}]
        asked = {"system": system, "messages": HELLO}
        counts.append(server.post(f"{MESSAGES}/count_tokens", **asked).json())
    plain = server.post(f"{MESSAGES}/count_tokens", system="Be short.", messages=HELLO).json()
    assert counts == [plain, plain]


def test_a_response_is_the_chat(server: Running) -> None:
    content = one(server.chat(max_tokens=20, temperature=0))["message"]["content"]
    asked = {"input": HELLO[0]["content"], "max_output_tokens": 20, "temperature": 0}
    whole = server.post(RESPONSES, **asked).json()
    [item] = whole["output"]
    assert item["content"][0]["text"] == content
    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["usage"]["output_tokens"] == 20
    events = server.events(RESPONSES, **asked)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.completed"
    said = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(said) == content
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == content


def test_items_of_a_response_are_the_messages_of_a_chat(server: Running) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
        {"role": "user", "content": "b"},
        call,
        {"type": "function_call_output", "call_id": "c", "output": "3"},
        {"type": "reasoning", "summary": []},
    ]
    tools = [{"type": "web_search"}, {"type": "function", "name": "f", "parameters": {}}]
    asked = {"input": items, "tools": tools, "instructions": "x", "max_output_tokens": 3}
    assert server.post(RESPONSES, **asked).json()["usage"]["output_tokens"] == 3
    for refused in ({"previous_response_id": "r"}, {"background": True}):
        response = server.post(RESPONSES, input="x", **refused)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == next(iter(refused))
    assert server.post(RESPONSES, input=[{"type": "item_reference"}]).status_code == 400


def test_routes_and_methods_that_are_none(server: Running) -> None:
    for path, method, status in (("/v2", "GET", 404), (CHAT, "GET", 405), ("/health", "PUT", 405)):
        response = server.http.request(method, path)
        assert response.status_code == status and response.json()["error"]["message"]


def test_metrics_rise_by_what_usage_said(server: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def counted() -> dict[str, float]:
        families = text_string_to_metric_families(server.http.get("/metrics").text)
        return {
            sample.name: sample.value for family in families for sample in family.samples
            if sample.name.endswith(("_tokens_total", "_count", "_loads_total", "bytes_total"))
        }  # fmt: skip

    server.chat()
    before, usage = counted(), server.chat(max_tokens=5)["usage"]
    now = counted()
    rose = {name.removeprefix("chronos:"): now[name] - before[name] for name in now}
    assert rose["prompt_tokens_total"] == usage["prompt_tokens"]
    assert rose["generation_tokens_total"] == usage["completion_tokens"] == 5
    assert rose["time_to_first_token_seconds_count"] == 1
    assert rose["inter_token_latency_seconds_count"] == 4
    assert rose["e2e_request_latency_seconds_count"] == 1
    assert rose["model_loads_total"] == 0
    assert rose["expert_read_bytes_total"] >= usage["chronos"]["bytes_read"] >= 0


def test_the_openapi_page_names_every_route(server: Running) -> None:
    page = server.http.get("/openapi.json").json()
    assert {CHAT, TEXT, MESSAGES, RESPONSES, "/health", "/metrics"} <= page["paths"].keys()
    content = page["paths"][CHAT]["post"]["requestBody"]["content"]
    fields = content["application/json"]["schema"]
    assert fields["required"] == ["messages"]
    assert fields["properties"]["temperature"]["maximum"] == 100
