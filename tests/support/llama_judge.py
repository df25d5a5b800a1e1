"""llama.cpp's word on GGUF files: reads {file: {"prompts": ...}}, writes what it says of each.

A prompt is a list of ids, a text, or the messages of a chat. Said of it: the log-probability of
every id behind it, and the ids of a greedy reply without banned ones. Runs in a process of its
own, so that its native library meets none of ours. Keys and values are kept in float32 and fused
attention is off: both round to 16 bits by default.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import xllamacpp


def server(path: str, context: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    return xllamacpp.Server(params)


def judge(model: Any, prompt: Any, ids: int, banned: list[int]) -> dict[str, Any]:
    greedy = {"temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0, "cache_prompt": False}
    greedy["logit_bias"] = [[token, False] for token in banned]
    if isinstance(prompt, list) and isinstance(prompt[0], dict):
        request = {"messages": prompt, "logprobs": True, "top_logprobs": ids}
        ask = model.handle_chat_completions
    else:
        request, ask = {"prompt": prompt, "logprobs": ids}, model.handle_completions
    reply = ask(request | greedy | {"max_tokens": 24})
    said = reply["choices"][0]["logprobs"]["content"]
    first = {entry["id"]: entry["logprob"] for entry in said[0]["top_logprobs"]}
    tokens = [step["id"] for step in said]
    return {"first": first, "tokens": tokens, "prompt": reply["usage"]["prompt_tokens"]}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")  # the library logs to standard output
    os.dup2(2, 1)
    found = {}
    for path, asked in json.load(sys.stdin).items():
        model = server(path, 256)
        found[path] = [
            judge(model, prompt, asked["ids"], asked["banned"]) for prompt in asked["prompts"]
        ]
        del model
    json.dump(found, out)
    out.flush()
    os._exit(0)  # its threads are not waited for


if __name__ == "__main__":
    main()
