"""Texts to token ids and back, as vLLM's /tokenize, /detokenize and /tokenizer_info have it."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chronos.common.errors import DataError
from chronos.serve import chat as chats
from chronos.serve.ask import Service
from chronos.serve.fields import Field, read
from chronos.serve.problem import Problem

TOKENIZE = (
    Field("model", ("string",)),
    Field("prompt", ("string",)),
    Field("messages", ("array",), 1),
    Field("tools", ("array",), 0, 128),
    Field("add_special_tokens", ("boolean",)),
)
DETOKENIZE = (Field("model", ("string",)), Field("tokens", ("array",), required=True))


async def tokenize(service: Service, body: Any) -> Response:
    """POST /tokenize: of a prompt, or of messages under the chat template."""
    values = read(body, TOKENIZE)
    served = service.catalogue.find(values.get("model"))
    tokenizer = served.tokenizer
    if "messages" in values:
        tools = chats.tools_of(values.get("tools"))
        chat = chats.Chat(chats.messages_of(values["messages"]), tools)
        tokens = await asyncio.to_thread(chats.render, tokenizer, chat)
    elif "prompt" in values:
        special = values.get("add_special_tokens", True)
        encode = tokenizer.encode_prompt if special else tokenizer.encode
        # The name of a control token, alone, is that token: so lm-eval asks for the end token's id.
        named = tokenizer.control_ids.get(values["prompt"])
        tokens = [named] if named is not None else await asyncio.to_thread(encode, values["prompt"])
    else:
        raise Problem(
            400, "prompt or messages is missing", code="missing_parameter", param="prompt"
        )
    return JSONResponse({"count": len(tokens), "max_model_len": served.context, "tokens": tokens})


async def detokenize(service: Service, body: Any) -> Response:
    """POST /detokenize."""
    values = read(body, DETOKENIZE)
    served = service.catalogue.find(values.get("model"))
    tokens = values["tokens"]
    if not all(type(token) is int for token in tokens):
        raise Problem(400, "tokens must be ids", code="invalid_value", param="tokens")
    try:
        return JSONResponse({"prompt": served.tokenizer.decode(tokens)})
    except DataError as error:
        raise Problem(400, error.what, code="invalid_value", param="tokens") from None


async def tokenizer_info(service: Service, request: Request) -> Response:
    """GET /tokenizer_info: what lm-eval reads of the first model to count and cut prompts."""
    served = service.catalogue.first
    names = {token: name for name, token in served.tokenizer.control_ids.items()}
    return JSONResponse(
        {
            "eos_token": names.get(served.tokenizer.eos_id),
            "model_max_length": served.context,
            "vocab_size": served.vocab_size,
        }
    )
