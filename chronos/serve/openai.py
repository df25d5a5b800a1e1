"""OpenAI's doors for chats and texts: /v1/chat/completions and /v1/completions.

What clients send and read was taken from openai-python 3.57, vLLM 0.32 and lm-eval 0.4.13.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.responses import Response

from chronos.common.text.tokenizer import Tokenizer
from chronos.run.generation import Likely
from chronos.serve import chat as chats
from chronos.serve.answer import Answer, Events, Whole, dumps, event, usage_numbers
from chronos.serve.ask import (
    MOST_LIKELY,
    SAMPLING,
    Ask,
    Service,
    bias_of,
    grammar_of_choice,
    grammar_of_schema,
    sampling_of,
    stops_of,
)
from chronos.serve.fields import Field, read
from chronos.serve.problem import Problem
from chronos.serve.tools import Call, Part

MOST_PROMPTS = 256  # of one request
_COMMON = (
    Field("model", ("string",)),
    Field("max_tokens", ("integer",), 0, 1 << 53),
    Field("stream", ("boolean",)),
    Field("stream_options", ("object",)),
    Field("stop", ("string", "array")),
    Field("n", ("integer",), 1, 8),
    *SAMPLING,
)
CHAT = (
    Field("messages", ("array",), 1, required=True),
    Field("max_completion_tokens", ("integer",), 1, 1 << 53),
    Field("logprobs", ("boolean",)),
    Field("top_logprobs", ("integer",), 0, MOST_LIKELY),
    Field("tools", ("array",), 0, 128),
    Field("tool_choice", ("string", "object"), choices=("none", "auto", "required")),
    Field("parallel_tool_calls", ("boolean",)),
    Field("response_format", ("object",)),
    Field("reasoning_effort", ("string",)),
    Field("chat_template_kwargs", ("object",)),
    *_COMMON,
)
COMPLETION = (
    Field("prompt", ("string", "array"), required=True),
    Field("logprobs", ("integer",), 0, MOST_LIKELY),
    Field("echo", ("boolean",)),
    *_COMMON,
)
_REFUSED_CHAT: dict[str, Sequence[Any]] = {
    "audio": (), "modalities": (["text"],), "functions": ([],), "function_call": ("none",),
    "prediction": (), "web_search_options": (), "chat_template": (), "images": ([],),
    "use_beam_search": (False,),
}  # fmt: skip
_REFUSED_COMPLETION: dict[str, Sequence[Any]] = {
    "suffix": ("",), "best_of": (1,), "use_beam_search": (False,),
}  # fmt: skip


async def chat(service: Service, body: Any) -> Response:
    """POST /v1/chat/completions."""
    values = read(body, CHAT, _REFUSED_CHAT)
    ask = _asked(service, values)
    most = values.get("max_completion_tokens", values.get("max_tokens"))
    if most == 0:
        raise Problem(
            400, "max_tokens must be at least 1", code="invalid_value", param="max_tokens"
        )
    ask.max_tokens = most
    if values.get("logprobs"):
        ask.likely = values.get("top_logprobs", 0)
    choice = _choice(values.get("tool_choice"))
    tools = [] if choice == "none" else chats.tools_of(values.get("tools"))
    variables = chats.variables_of(values.get("chat_template_kwargs", {}))
    if "reasoning_effort" in values:
        variables.setdefault("reasoning_effort", values["reasoning_effort"])
    ask.grammar = grammar_of_choice(choice, tools, values.get("parallel_tool_calls", True))
    schema = _schema(values.get("response_format"))
    if schema is not None and ask.grammar is None:
        ask.grammar = grammar_of_schema(schema, "response_format")
    await ask.render(chats.Chat(chats.messages_of(values["messages"]), tools, variables))
    answer = await ask.begin(service, values.get("stream"))
    head = _head(ask, "chatcmpl", "chat.completion")
    if values.get("stream"):
        head["object"] = "chat.completion.chunk"
        chunks = _chat_chunks(ask, answer, head, _wants_usage(values))
        return Events(chunks, answer, error_event)
    return Whole(_chat_whole(ask, answer, head), answer)


async def completion(service: Service, body: Any) -> Response:
    """POST /v1/completions."""
    values = read(body, COMPLETION, _REFUSED_COMPLETION)
    ask = _asked(service, values)
    ask.max_tokens = values.get("max_tokens", 16)  # OpenAI's default
    ask.likely = values.get("logprobs")
    echo = bool(values.get("echo"))
    ask.score = echo and ask.likely is not None
    if ask.score and values.get("stream"):
        raise Problem(
            400, "echo with logprobs is not streamed", code="unsupported_parameter", param="stream"
        )
    if ask.max_tokens == 0:
        raise Problem(
            400, "max_tokens must be at least 1", code="invalid_value", param="max_tokens"
        )
    ask.prompts = _prompts(values["prompt"], ask.served.tokenizer)
    answer = await ask.begin(service, values.get("stream"))
    head = _head(ask, "cmpl", "text_completion")
    if values.get("stream"):
        chunks = _text_chunks(ask, answer, head, _wants_usage(values), echo)
        return Events(chunks, answer, error_event)
    return Whole(_text_whole(ask, answer, head, echo), answer)


def error_event(problem: Problem) -> str:
    return event(problem.openai())


def _asked(service: Service, values: Mapping[str, Any]) -> Ask:
    """What both doors say alike."""
    served = service.catalogue.find(values.get("model"))
    return Ask(
        served,
        sampling_of(values, served),
        stop=stops_of(values.get("stop")),
        count=values.get("n", 1),
        bias=bias_of(values.get("logit_bias"), served.vocab_size),
    )


def _choice(given: Any) -> str | None:
    """A tool_choice as a word or the name of a tool."""
    if not isinstance(given, dict):
        return None if given is None else str(given)
    function = given.get("function")
    name = function.get("name") if isinstance(function, dict) else given.get("name")
    if not isinstance(name, str) or not name:
        raise Problem(
            400, "tool_choice must name a function", code="invalid_value", param="tool_choice"
        )
    return name


def _schema(given: Mapping[str, Any] | None) -> Any:
    """The JSON Schema of a response_format; None for text."""
    kind = "text" if given is None else given.get("type")
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    asked = given.get("json_schema")
    if kind == "json_schema" and isinstance(asked, dict) and isinstance(asked.get("schema"), dict):
        return asked["schema"]
    raise Problem(
        400,
        "response_format must be text, json_object, or json_schema with a schema",
        code="invalid_value",
        param="response_format",
    )


def _wants_usage(values: Mapping[str, Any]) -> bool:
    return bool(values.get("stream_options", {}).get("include_usage"))


def _prompts(given: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Of a text, token ids, or a list of either."""
    if isinstance(given, str):
        return [tokenizer.encode_prompt(given)]
    if given and all(type(each) is int for each in given):
        return [given]
    prompts = []
    for each in given[: MOST_PROMPTS + 1]:
        if isinstance(each, str):
            prompts.append(tokenizer.encode_prompt(each))
        elif isinstance(each, list) and each and all(type(token) is int for token in each):
            prompts.append(each)
        else:
            prompts = []
            break
    if not 0 < len(prompts) <= MOST_PROMPTS:
        raise Problem(
            400,
            f"prompt must be a text, token ids, or 1 to {MOST_PROMPTS} of these",
            code="invalid_value",
            param="prompt",
        )
    return prompts


def _head(ask: Ask, prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": ask.served.name,
    }


def _chunks_of(head: dict[str, Any]) -> Callable[[dict[str, Any]], str]:
    """Choices to events; what is the same in all of a stream is written once."""
    begun = dumps(head)[:-1]
    return lambda choice: event(f'{begun},"choices":[{dumps(choice)}]}}')


def usage(answer: Answer, thoughts: int = 0) -> dict[str, Any]:
    results = [answer.results[number] for number in range(len(answer.jobs))]
    # Replies to one prompt read it once each here; it is counted once, as OpenAI does.
    prompts = {id(job.prompt): len(job.prompt) for job in answer.jobs}
    read, made = sum(prompts.values()), sum(len(result.tokens) for result in results)
    return {
        "prompt_tokens": read,
        "completion_tokens": made,
        "total_tokens": read + made,
        "prompt_tokens_details": {"cached_tokens": min(read, answer.cached)},
        "completion_tokens_details": {"reasoning_tokens": thoughts},
        "chronos": usage_numbers(results),
    }


async def _chat_whole(ask: Ask, answer: Answer, head: dict[str, Any]) -> dict[str, Any]:
    texts = ask.texts(answer)
    parts: list[list[Part]] = [[] for _ in texts]
    likely: list[list[Likely]] = [[] for _ in texts]
    async for number, step in answer:
        if step is not None:
            parts[number] += texts[number].take(step)
            likely[number] += [step.likely] if step.likely else []
    choices = []
    for number, text in enumerate(texts):
        said = [*parts[number], *text.end()]
        content, thought = (
            "".join(part.text for part in said if part.kind == kind)
            for kind in ("content", "reasoning")
        )
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if thought:
            message["reasoning_content"] = thought
        if text.calls:
            message["tool_calls"] = [_call(call) for call in text.calls]
            message["content"] = content or None
        choice = {"index": number, "message": message, "logprobs": None}
        if ask.likely is not None:
            choice["logprobs"] = {"content": _logprobs(ask, likely[number])}
        choice["finish_reason"] = text.reason(answer.results[number].finish_reason)
        choices.append(choice)
    thoughts = sum(text.thoughts for text in texts)
    return {**head, "choices": choices, "usage": usage(answer, thoughts)}


async def _chat_chunks(
    ask: Ask, answer: Answer, head: dict[str, Any], wants_usage: bool
) -> AsyncIterator[str]:
    texts, told = ask.texts(answer), [0] * len(answer.jobs)
    chunk_of = _chunks_of(head)

    def chunk(number: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        return chunk_of({"index": number, "delta": delta, "finish_reason": reason, **more})

    def said(number: int, parts: list[Part], likely: Likely = ()) -> list[str]:
        """Chunks of what is new of a reply."""
        deltas: list[dict[str, Any]] = [
            {"content" if part.kind == "content" else "reasoning_content": part.text}
            for part in parts
        ]
        text = texts[number]
        for at, call in enumerate(text.calls[told[number] :], start=told[number]):
            deltas.append({"tool_calls": [{"index": at, **_call(call)}]})
        told[number] = len(text.calls)
        more: dict[str, Any] = {}
        if likely:
            more["logprobs"] = {"content": _logprobs(ask, [likely])}
            deltas = deltas or [{"content": ""}]
        chunks = []
        for delta in deltas:
            chunks.append(chunk(number, delta, **more))
            more = {}
        return chunks

    for number in range(len(texts)):
        yield chunk(number, {"role": "assistant", "content": ""})
    async for number, step in answer:
        if step is None:
            yield f": ping {answer.state()}\n\n"
            continue
        for each in said(number, texts[number].take(step), step.likely):
            yield each
    for number, text in enumerate(texts):
        for each in said(number, text.end()):
            yield each
        yield chunk(number, {}, text.reason(answer.results[number].finish_reason))
    if wants_usage:
        thoughts = sum(text.thoughts for text in texts)
        yield event({**head, "choices": [], "usage": usage(answer, thoughts)})
    yield event("[DONE]")


async def _text_whole(ask: Ask, answer: Answer, head: dict[str, Any], echo: bool) -> dict[str, Any]:
    texts = ["" for _ in answer.jobs]
    likely: list[list[Likely]] = [[] for _ in answer.jobs]
    async for number, step in answer:
        if step is not None:
            texts[number] += step.text
            likely[number] += [step.likely] if step.likely else []
    choices = []
    for number, text in enumerate(texts):
        start = ask.served.tokenizer.decode(answer.jobs[number].prompt) if echo else ""
        choice = {"index": number, "text": start + text, "logprobs": None}
        if ask.score:
            scored = answer.results[number].scored
            told = _text_logprobs(ask, [*scored, *likely[number]], 0)
            choice["logprobs"] = _behind(ask, answer.jobs[number].prompt[0], told)
        elif ask.likely is not None:
            choice["logprobs"] = _text_logprobs(ask, likely[number], len(start))
        choice["finish_reason"] = _reason(answer.results[number].finish_reason)
        choices.append(choice)
    return {**head, "choices": choices, "usage": usage(answer)}


async def _text_chunks(
    ask: Ask, answer: Answer, head: dict[str, Any], wants_usage: bool, echo: bool
) -> AsyncIterator[str]:
    offsets = [0] * len(answer.jobs)  # of the next token's text, for `logprobs`
    chunk_of = _chunks_of(head)

    def chunk(number: int, text: str, likely: Likely = (), reason: str | None = None) -> str:
        choice: dict[str, Any] = {"index": number, "text": text, "finish_reason": reason}
        choice["logprobs"] = None
        if likely:
            choice["logprobs"] = told = _text_logprobs(ask, [likely], offsets[number])
            offsets[number] += len(told["tokens"][0])
        return chunk_of(choice)

    for number, job in enumerate(answer.jobs):
        start = ask.served.tokenizer.decode(job.prompt) if echo else ""
        yield chunk(number, start)
        offsets[number] = len(start)
    async for number, step in answer:
        if step is None:
            yield f": ping {answer.state()}\n\n"
        elif step.text or step.likely:
            yield chunk(number, step.text, step.likely)
    for number in range(len(answer.jobs)):
        yield chunk(number, "", reason=_reason(answer.results[number].finish_reason))
    if wants_usage:
        yield event({**head, "choices": [], "usage": usage(answer)})
    yield event("[DONE]")


def _reason(reason: str) -> str:
    return "length" if reason in ("length", "context") else "stop"


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _token(ask: Ask, token: int, logprob: float) -> dict[str, Any]:
    raw = ask.served.tokenizer.token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


def _logprobs(ask: Ask, rows: Sequence[Likely]) -> list[dict[str, Any]]:
    """As chats have them: the token's own, then the likeliest, best first."""
    found = []
    for (token, logprob), *best in rows:
        top = [_token(ask, *pair) for pair in best]
        found.append({**_token(ask, token, logprob), "top_logprobs": top})
    return found


def _text_logprobs(ask: Ask, rows: Sequence[Likely], start: int) -> dict[str, Any]:
    """As texts have them: parallel lists, with the likeliest by their text."""
    tokens, logprobs, tops, offsets = [], [], [], []
    for (token, logprob), *best in rows:
        text = _token(ask, token, logprob)["token"]
        top: dict[str, float] = {}
        for other, p in best:
            top.setdefault(_token(ask, other, p)["token"], p)  # several ids may have one text
        offsets.append(start)
        start += len(text)
        tokens.append(text)
        logprobs.append(logprob)
        tops.append(top)
    return {
        "tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets
    }  # fmt: skip


def _behind(ask: Ask, first: int, told: dict[str, Any]) -> dict[str, Any]:
    """The lists of a text whose first token follows nothing, and so has no probability."""
    text = _token(ask, first, 0.0)["token"]
    return {
        "tokens": [text, *told["tokens"]],
        "token_logprobs": [None, *told["token_logprobs"]],
        "top_logprobs": [None, *told["top_logprobs"]],
        "text_offset": [0, *(len(text) + at for at in told["text_offset"])],
    }
