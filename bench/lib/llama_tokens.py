"""llama.cpp's greedy texts: reads JSON lists of token ids from stdin, writes what follows each.

Keys and values are kept in float32 and fused attention is off: both round to 16 bits by default.

Runs in a Python of its own, so that its native library meets none of ours:

    python -m venv V && V/bin/pip install xllamacpp
    V/bin/python bench/lib/llama_tokens.py MODEL.gguf --tokens 48 < prompts.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.n_ctx, params.n_parallel = 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    out = os.fdopen(os.dup(1), "w")  # the library logs to standard output
    os.dup2(2, 1)
    server = xllamacpp.Server(params)
    found = []
    for prompt in json.load(sys.stdin):
        greedy = {"temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0}
        request = {"prompt": prompt, "max_tokens": args.tokens, "cache_prompt": False}
        reply = server.handle_completions(request | greedy)
        found.append(reply["choices"][0]["text"])
    json.dump(found, out)
    out.flush()


if __name__ == "__main__":
    main()
