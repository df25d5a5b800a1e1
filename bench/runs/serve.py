"""Time to first token and tokens per second of `chronos serve`, by the number of clients.

A server process on loopback is asked by so many clients at once, each with a prompt of its own and
streamed; the ceiling is `Engine.generate_many` on the same prompts in this process. Rounds of the
two and of each number of clients alternate; medians are printed, and the whole as JSON. What the
server costs a token is the difference between the two for one client, behind the first token. A
second part asks with a prompt that was asked before, cold and warm.

    python -m bench.runs.serve [--model demo] [--budget 25%] [--clients 1,2,4] [--tokens 64]
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from chronos.common.text.sampling import PIECE
from chronos.run import engine


@contextmanager
def server(args: argparse.Namespace) -> Iterator[int]:
    """The port of a server of the model, once it is loaded."""
    command = [
        *(sys.executable, "-m", "chronos", "serve", args.model, "--port", "0"),
        *("--budget", args.budget, "--backend", args.backend, "--queue", "64"),
        *("--max-sequences", str(max(args.clients))),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        while ask(port, "GET", "/health")[0] != 200:
            time.sleep(0.05)
        try:
            yield port
        finally:
            process.terminate()


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, list[float], bytes]:
    """The status, when each event of the answer came (seconds since it was asked), the last one.

    Bytes are only stamped while they come and read afterwards: what a client does with a token
    takes time from the engine where they share a machine, and is not the server's.
    """
    data = json.dumps(body).encode() if body else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    begin, pieces = time.perf_counter(), []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head.encode() + b"\r\n" + data)
        while piece := connection.recv(1 << 16):
            pieces.append((time.perf_counter() - begin, piece))
    came, held, last = [], b"", b"{}"
    for at, piece in pieces:
        *lines, held = (held + piece).split(b"\n")
        told = [line for line in lines if line.startswith(b"data: {")]
        came += [at] * len(told)
        last = told[-1].removeprefix(b"data: ") if told else last
    return int(pieces[0][1].split()[1]), came, last


def text(port: int, prompt: list[int], tokens: int) -> tuple[list[float], int]:
    """When the pieces of a text came, and how many tokens it has."""
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0}
    body["stream_options"] = {"include_usage": True}
    status, came, last = ask(port, "POST", "/v1/completions", body)
    if status != 200:
        raise RuntimeError(f"the server answered {status}")
    # An event opens the stream, one says why it ended, one what it used.
    return came[1:-2], json.loads(last)["usage"]["completion_tokens"]


def prompts_for(count: int, round_: int, length: int, vocab: int) -> list[list[int]]:
    """Of their own in each round: nothing of them is in a cache."""
    return [
        [(7919 * (round_ * 64 + at) + 31 * i) % (vocab - 300) + 290 for i in range(length)]
        for at in range(count)
    ]


def measure(args: argparse.Namespace, opened: engine.Engine, port: int) -> dict[str, Any]:
    vocab, rows = opened.config.vocab_size, []
    found: dict[int, dict[str, list[float]]] = {
        count: {
            name: [] for name in ("ttft_s", "tps", "gap_s", "ceiling_tps", "token_s", "alone_s")
        }
        for count in args.clients
    }
    for round_ in range(args.rounds + 1):  # the first one warms
        for count in args.clients:
            prompts = prompts_for(count, round_, args.prompt, vocab)
            begin = time.perf_counter()
            results = opened.generate_many(
                prompts, max_tokens=args.tokens, max_sequences=max(args.clients)
            )
            made = sum(len(result.tokens) for result in results)
            ceiling = made / (time.perf_counter() - begin)
            begin = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                told = list(pool.map(lambda p: text(port, p, args.tokens), prompts))
            seconds = time.perf_counter() - begin
            if round_:
                into = found[count]
                into["ceiling_tps"].append(ceiling)
                into["tps"].append(sum(made for _, made in told) / seconds)
                into["token_s"] += [
                    (came[-1] - came[0]) / (made - 1) for came, made in told if made > 1
                ]
                stats = [result.stats for result in results if result.stats["decode_tokens"]]
                into["alone_s"] += [each["decode_s"] / each["decode_tokens"] for each in stats]
                came = [times for times, _ in told if times]
                into["ttft_s"] += [each[0] for each in came]
                into["gap_s"] += [
                    b - a for each in came for a, b in zip(each, each[1:], strict=False)
                ]
    for count, into in found.items():
        gaps = sorted(into["gap_s"])
        row = {
            "clients": count,
            "ttft_s": statistics.median(into["ttft_s"]),
            "tokens_per_s": statistics.median(into["tps"]),
            "generate_many_tokens_per_s": statistics.median(into["ceiling_tps"]),
            "token_ms": 1e3 * statistics.median(into["token_s"]),
            "generate_many_token_ms": 1e3 * statistics.median(into["alone_s"]),
            "gap_p99_over_p50": gaps[int(0.99 * (len(gaps) - 1))] / statistics.median(gaps),
        }
        rows.append(row)
        print(
            f"{count} clients: first token after {1e3 * row['ttft_s']:.0f} ms, "
            f"{row['tokens_per_s']:.1f} tokens/s "
            f"({row['tokens_per_s'] / row['generate_many_tokens_per_s']:.3f} of generate_many), "
            f"{row['token_ms']:.2f} ms a token behind the first "
            f"({row['token_ms'] / row['generate_many_token_ms'] - 1:+.1%}), "
            f"gaps p99 / p50 {row['gap_p99_over_p50']:.2f}",
            flush=True,
        )
    cold, warm = [], []
    length = min(args.long, opened.context - 16) // PIECE * PIECE + 8
    for round_ in range(args.rounds):
        [prompt] = prompts_for(1, 1000 + round_, length, vocab)
        cold.append(text(port, prompt, 1)[0][0])
        warm.append(text(port, prompt, 1)[0][0])
    cold_s, warm_s = statistics.median(cold), statistics.median(warm)
    print(f"{length} tokens: first token after {cold_s:.3f} s cold, {warm_s:.3f} s warm")
    return {"rows": rows, "prefix": {"tokens": length, "cold_s": cold_s, "warm_s": warm_s}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--clients", default="1,2,4")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--long", type=int, default=2048, help="tokens of the cold and warm prompt")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.clients = [int(count) for count in args.clients.split(",")]
    options = {"budget": args.budget, "backend": args.backend}
    with server(args) as port, engine.load(args.model, **options) as opened:
        found = measure(args, opened, port)
    print(json.dumps({"bench": "serve", "model": args.model, "budget": args.budget} | found))


if __name__ == "__main__":
    main()
