"""Official clients, and clients that leave: what they see of a server, and what is left of them."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from chronos.common.text.sampling import PIECE
from chronos.run.batch import Batch
from chronos.testing.tiny import CONFIG
from tests.support.serving import CHAT, HELLO, TEXT, Running

LONG = [7 * i % CONFIG.vocab_size for i in range(4 * PIECE - 200)]


def test_openais_client(server: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=30)
    assert [model.id for model in client.models.list()] == [server.model]
    asked = {"model": server.model, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    plain = client.completions.create(model=server.model, prompt=[1, 2], max_tokens=3, logprobs=1)
    assert len(plain.choices[0].logprobs.tokens) == 3
    response = client.responses.create(model=server.model, input="x", max_output_tokens=5)
    with client.responses.stream(model=server.model, input="x", max_output_tokens=5) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == response.output_text
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**asked | {"model": "../../etc"})
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked | {"temperature": "hot"})
    assert caught.value.param == "temperature"
    client.close()


def test_anthropics_client(server: Running) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", timeout=30)
    asked: dict[str, Any] = {"model": server.model, "messages": HELLO}
    counted = client.messages.count_tokens(**asked).input_tokens
    whole = client.messages.create(**asked, max_tokens=12)
    with client.messages.stream(**asked, max_tokens=12) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == counted
    assert final.usage.output_tokens == 12
    client.close()


@pytest.mark.parametrize("stream", ["true", "false"])
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_who_leaves_is_not_answered_any_more(server: Running, stream: str, when: str) -> None:
    """The connection is cut; nothing runs on, and the next is answered."""
    expected = server.text([1, 2], temperature=0)["choices"]
    prompt, most = (LONG, 2) if when == "prefill" else ([1, 2], 1000)
    body = f'{{"prompt": {prompt}, "max_tokens": {most}, "stream": {stream}}}'.encode()
    head = (
        f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    port = int(server.url.rpartition(":")[2])
    gone = server.http.get("/metrics").text.count('finished_reason="abort"')
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + body)
        server.until(lambda: server.worker.running > 0)
    server.until(lambda: server.worker.running == 0)
    assert server.worker.waiting == 0
    assert server.http.get("/metrics").text.count('finished_reason="abort"') >= gone
    assert server.text([1, 2], temperature=0)["choices"] == expected


def test_twenty_that_leave_in_a_stream_leave_nothing(server: Running) -> None:
    def leave(number: int) -> None:
        body = {"messages": HELLO, "max_tokens": 500, "stream": True, "seed": number}
        with server.http.stream("POST", CHAT, json=body) as response:
            next(response.iter_lines())

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(leave, range(20)))
    server.until(lambda: server.worker.running == server.worker.waiting == 0)
    sequences = server.engine.session._sequences  # type: ignore[attr-defined]
    prefixes = server.worker._prefixes
    assert prefixes is not None and len(sequences) == len(prefixes)
    assert server.chat()["usage"]["completion_tokens"] == 8


def test_a_silent_stream_says_that_it_lives(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chronos.serve.answer.PING_S", 0.001)
    body = {"prompt": LONG, "max_tokens": 1, "stream": True}
    with server.http.stream("POST", TEXT, json=body) as response:
        lines = list(response.iter_lines())
    pings = [line for line in lines if line.startswith(": ping ")]
    assert any(line.startswith(": ping prefill") for line in pings), lines
    assert lines[-2] == "data: [DONE]"


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/messages", "/v1/responses"])
def test_the_first_byte_comes_before_the_model_does_anything(
    server: Running, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Clients that hear nothing send again, and the copies queue behind each other."""
    may, step = threading.Event(), Batch.step

    def waits(self: Batch) -> Any:
        assert may.wait(30)
        return step(self)

    monkeypatch.setattr(Batch, "step", waits)
    asked = {TEXT: {"prompt": [1]}, "/v1/responses": {"input": "x", "max_output_tokens": 2}}
    body = {"messages": HELLO, "max_tokens": 2, "stream": True} | asked.get(path, {})
    with server.http.stream("POST", path, json=body) as response:
        lines = response.iter_lines()
        assert response.status_code == 200 and next(lines) and not may.is_set()
        may.set()
        assert len(list(lines)) > 2


def test_an_error_in_a_stream_is_its_last_event(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any) -> Any:
        raise OSError(5, "a disk that is gone", "/a/path")

    with monkeypatch.context() as patch:
        patch.setattr("chronos.run.batch.Batch.step", fails)
        chat = server.events(CHAT, messages=HELLO)
        message = server.events("/v1/messages", messages=HELLO, max_tokens=3)
        whole = server.post(CHAT, messages=HELLO)
    assert chat[-1]["error"]["type"] == message[-1]["error"]["type"] == "api_error"
    assert whole.status_code == 500 and "/a/path" not in whole.text + str(chat) + str(message)
    assert server.chat()["usage"]["completion_tokens"] == 8
