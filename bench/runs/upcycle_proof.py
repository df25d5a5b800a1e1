"""What the upcycled SmolLM2 proves, step by step; ends in one JSON line.

    python -m bench.runs.upcycle bench/scratch/smol --gguf WHEEL
    python -m venv V && V/bin/pip install xllamacpp
    python -m bench.runs.upcycle_proof bench/scratch/smol --llama V/bin/python --tokens 60

1. The dense model is right: llama.cpp, from the same GGUF with its blocks widened to float32,
   writes the same text as Transformers' Llama.
2. The MoE with copied experts computes the dense logits.
3. The MoE with noise, packed and streamed at 25 %, writes the tokens of Transformers' resident run.
Bound of 2: 1e-4 of the spread of the logits (float32; a sum over two copies rounds otherwise).
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chronos
from bench.lib.smollm import write_llama, write_wide_gguf
from chronos.common.layout import is_packed, pack

QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a lighthouse.",
    "Give me three tips for sleeping well.",
)
BOUND = 1e-4
_BUDGET = "25%"


def read(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [
        tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in chats
    ]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """New tokens, the end token excluded."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens[-1] == model.generation_config.eos_token_id else tokens


def against_llama_cpp(work: Path, python: Path, count: int) -> dict[str, Any]:
    """Transformers' text and llama.cpp's, both from float32 weights of the GGUF."""
    source, wide = next(work.glob("*.Q4_1.gguf")), work / "wide.gguf"
    if not wide.exists():
        write_wide_gguf(source, wide)
        write_llama(source, work / "dense32", "float32")
    ids = prompts(work / "dense32")
    done = subprocess.run(
        [python, "bench/lib/llama_tokens.py", wide, "--tokens", str(count)],
        input=json.dumps(ids), capture_output=True, text=True, check=True,
    )  # fmt: skip
    theirs = json.loads(done.stdout)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(work / "dense32"),
        read(work / "dense32", torch.float32),
    )
    ours = [tokenizer.decode(greedy(model, prompt, count)) for prompt in ids]
    return {"same": [a == b for a, b in zip(ours, theirs, strict=True)], "texts": ours}


@torch.no_grad()
def against_dense(work: Path) -> dict[str, float]:
    """Largest difference of any logit of the prompts, and the spread of the dense logits."""
    ids = prompts(work / "dense")
    dense = read(work / "dense", torch.float32)
    wanted = [dense(torch.tensor([prompt])).logits for prompt in ids]
    del dense
    found: dict[str, float] = {"spread": float(torch.cat(wanted, 1).std())}
    for name in ("copied", "moe"):
        gc.collect()
        model = read(work / name, torch.float32)
        logits = [model(torch.tensor([prompt])).logits for prompt in ids]
        gaps = [float((a - b).abs().max()) for a, b in zip(logits, wanted, strict=True)]
        found[name] = max(gaps)
        del model
    return found


def streamed(work: Path, count: int) -> dict[str, Any]:
    """Tokens and figures of the packed model at a quarter, beside Transformers' resident run."""
    packed = work / "packed"
    if not is_packed(packed):
        pack(work / "moe", packed)
    ids = prompts(work / "moe")
    with chronos.load(packed, backend="torch", budget=_BUDGET) as engine:
        results = []
        for prompt in ids:
            generation = engine.generate(prompt, max_tokens=count)
            for _ in generation:
                pass
            results.append(generation.result)
    gc.collect()
    model = read(work / "moe", "auto")
    wanted = [greedy(model, prompt, count) for prompt in ids]
    return {
        "same": [r.tokens == w for r, w in zip(results, wanted, strict=True)],
        "texts": [r.text for r in results],
        "stats": [r.stats for r in results],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama", type=Path, help="a Python with xllamacpp; left out: no step 1")
    parser.add_argument("--tokens", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    if args.llama:
        report["llama_cpp"] = against_llama_cpp(args.work, args.llama, args.tokens)
        print("1. llama.cpp's text:", report["llama_cpp"]["same"])
    report["dense"] = gaps = against_dense(args.work)
    print(
        f"2. logits: copied experts differ by {gaps['copied'] / gaps['spread']:.1e} of the spread"
    )
    report["streamed"] = streamed(args.work, args.tokens)
    print(f"3. at {_BUDGET}, Transformers' tokens:", report["streamed"]["same"])
    for question, text in zip(QUESTIONS, report["streamed"]["texts"], strict=True):
        print(f"\n> {question}\n{text}")
    report["passed"] = (
        all(report.get("llama_cpp", {}).get("same", [True]))
        and gaps["copied"] <= BOUND * gaps["spread"]
        and all(report["streamed"]["same"])
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
