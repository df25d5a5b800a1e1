"""One run of one runtime, in the interpreter of its own environment: what bench.runs.peers starts.

    VENV/bin/python bench/lib/peer_runs.py NAME --model PATH --prompts P.json --memory BYTES ...

Prints a JSON line per prompt, so that a run cut short still counts. Every runtime samples at
temperature 1 from the same prompts; a token is timed when the runtime hands it out. The function
of a runtime loads its model and returns `generate(prompt, tokens, tick)`, which calls `tick` at
each token. Nothing of Chronos or of bench is imported here: these environments hold neither.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Tick = Callable[[], None]
Generate = Callable[[list[int], int, Tick], None]


def chronos(args: argparse.Namespace) -> Generate:
    from chronos.common.text.sampling import SamplingParams
    from chronos.run import engine

    budget = args.memory or "all"
    loaded = engine.load(args.model, budget=budget, backend="torch", own_process=True)

    def generate(prompt: list[int], tokens: int, tick: Tick) -> None:
        _each(loaded.generate(prompt, SamplingParams(1.0, seed=1), max_tokens=tokens), tick)

    return generate


def transformers(args: argparse.Namespace) -> Generate:
    """Resident, or with a `memory` disk offload through accelerate."""
    import torch
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {}
    if args.memory:
        limits = {"cpu": args.memory}
        folder = str(Path(args.scratch) / "offload")
        where = {"device_map": "auto", "max_memory": limits, "offload_folder": folder}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, **where)
    return _transformers_loop(model.eval())


def airllm(args: argparse.Namespace) -> Generate:
    import torch
    from airllm import AutoModel

    shards = Path(args.scratch) / "airllm-shards"
    model = AutoModel.from_pretrained(
        args.model, device="cpu", dtype=torch.bfloat16, layer_shards_saving_path=str(shards)
    )
    return _transformers_loop(model)


def _transformers_loop(model: Any) -> Generate:
    import torch
    from transformers import StoppingCriteria

    class Ticking(StoppingCriteria):  # called after each token
        def __init__(self, tick: Tick) -> None:
            self.tick = tick

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.tick()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def generate(prompt: list[int], tokens: int, tick: Tick) -> None:
        torch.manual_seed(1)
        ids = torch.tensor([prompt])
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            use_cache=True,
            eos_token_id=None,
            stopping_criteria=[Ticking(tick)],
        )

    return generate


def llamacpp(args: argparse.Namespace) -> Generate:
    """F16, memory-mapped: the page cache is its expert cache, so it takes no budget."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.n_ctx, params.n_parallel, params.verbosity = 1024, 1, 0
    params.warmup, params.fit_params = False, False
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.cpuparams.n_threads = _threads()
    server = xllamacpp.Server(params)

    def generate(prompt: list[int], tokens: int, tick: Tick) -> None:
        request = {"prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "top_k": 0}
        request |= {"top_p": 1.0, "min_p": 0.0, "seed": 1, "ignore_eos": True}
        done = server.handle_completions(request | {"cache_prompt": False})
        # Streaming hands out text, not tokens; the server's own clock counts tokens.
        if "timings" not in done:
            raise RuntimeError(json.dumps(done)[:300])
        times = done["timings"]
        raise Measured(
            times["predicted_n"] - 1, times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3
        )

    return generate


def neurostream(args: argparse.Namespace) -> Generate:
    import torch
    from neurostream.api import NeuroStream

    memory = args.memory or 2 << 30
    model = NeuroStream.load(args.model, mem_budget="64MB", ram_budget=memory, device="cpu")

    def generate(prompt: list[int], tokens: int, tick: Tick) -> None:
        torch.manual_seed(1)
        for _ in model.generate(prompt, tokens, 1.0, 1.0, stop_on_eos=False):
            tick()

    return generate


def ftllm(args: argparse.Namespace) -> Generate:
    """Asked as its own benchmark asks: its blocking fetch starves its workers on two cores."""
    from ftllm.benchmark import _launch_raw_response
    from ftllm.llm import fastllm_lib
    from ftllm.util import make_normal_llm_model, make_normal_parser

    options = [args.model, "--device", "cpu", "--max_batch", "1", "--moe_device", "disk"]
    options += ["--moe_cpu_cache", f"{args.memory // 1_000_000}m", "--threads", str(_threads())]
    model = make_normal_llm_model(make_normal_parser("bench").parse_args(options))
    sampling = {"do_sample": True, "top_p": 1.0, "top_k": 256}
    sampling |= {"temperature": 1.0, "repeat_penalty": 1.0}

    def generate(prompt: list[int], tokens: int, tick: Tick) -> None:
        handle = _launch_raw_response(model, prompt, tokens, sampling)
        while True:
            if not fastllm_lib.can_fetch_response_llm_model(model.model, handle):
                time.sleep(0.0005)
            elif fastllm_lib.fetch_response_llm_model(model.model, handle) < 0:
                return
            else:
                tick()

    return generate


def nunspark(args: argparse.Namespace) -> Generate:
    from nunspark.engine import StreamingEngine
    from nunspark.generate import stream_generate
    from nunspark.manifest import Manifest

    manifest = Manifest.load(Path(args.model) / "manifest.json")
    engine = StreamingEngine(args.model, manifest, budget_bytes=args.memory, prefetch=True)

    def generate(prompt: list[int], tokens: int, tick: Tick) -> None:
        _each(stream_generate(engine, prompt, tokens, 1.0), tick)

    return generate


def mlxvlm(args: argparse.Namespace) -> Generate:
    import mlx.core as mx
    from mlx_vlm import load, stream_generate

    model, processor = load(args.model, expert_cache_gb=args.memory / 1e9)

    def generate(prompt: list[int], tokens: int, tick: Tick) -> None:
        ids = mx.array([prompt])
        steps = stream_generate(
            model, processor, "", input_ids=ids, max_tokens=tokens, temperature=1.0
        )
        given = 0
        for step in steps:  # the last one comes a second time, with the rest of the text
            if step.generation_tokens > given:
                given = step.generation_tokens
                tick()

    return generate


class Measured(Exception):
    """A runtime's own (tokens after the first, seconds to the first, seconds after it)."""


class Enough(Exception):
    """The time of the run is over."""


def _each(steps: Iterable[Any], tick: Tick) -> None:
    for _ in steps:
        tick()


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _measure(generate: Generate, prompt: list[int], tokens: int, deadline: float) -> dict[str, Any]:
    begin, before = time.perf_counter(), _bytes_read()
    ticks: list[float] = []

    def tick() -> None:
        ticks.append(time.perf_counter())
        if ticks[-1] > deadline:
            raise Enough

    try:
        generate(prompt, tokens, tick)
    except Enough:
        pass
    except Measured as measured:
        count, first, rest = measured.args
        return {"tokens": count, "ttft_s": first, "decode_s": rest, "read": _bytes_read() - before}
    return {
        "tokens": len(ticks) - 1,
        "ttft_s": ticks[0] - begin,
        "decode_s": ticks[-1] - ticks[0],
        "read": _bytes_read() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--memory", type=int, required=True, help="bytes for weights; 0: no limit")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--scratch", required=True)
    args = parser.parse_args()
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what runtimes print of themselves goes beside the figures
    begin = time.perf_counter()
    generate = globals()[args.name](args)
    load_s = time.perf_counter() - begin
    deadline = begin + load_s + args.seconds
    for prompt in json.loads(args.prompts.read_text()):
        if time.perf_counter() < deadline:
            line = _measure(generate, prompt, args.tokens, deadline)
            print(json.dumps({"peer": args.name, "load_s": load_s} | line), file=lines, flush=True)
    os._exit(0)  # some runtimes hang or crash in their own tear-down; the figures are out


if __name__ == "__main__":
    main()
