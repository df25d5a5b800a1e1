"""Why some tokens of `chronos serve` come late: the slowest gaps of streams, and what each met.

The server runs in this process with a note of each pass: how long it took, how long the engine's
thread ran in it, prompts that were read beside tokens, misses, waits for reads, collected garbage.
Clients in a process of their own note when events come, on the same clock. A gap of a stream is
laid over the passes that ended in it, and over the way from the end of a pass to the client. Means
of all gaps and of the slowest hundredth are printed side by side: what differs is the cause.

    python -m bench.runs.gaps [--model demo] [--budget 25%] [--clients 4]
"""

from __future__ import annotations

import argparse
import bisect
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn

from bench.runs.serve import prompts_for, text
from chronos.run import engine
from chronos.serve.app import application
from chronos.serve.ask import Service
from chronos.serve.guard import Rules
from chronos.serve.metrics import Metrics
from chronos.serve.served import Catalogue, Served
from chronos.serve.server import bind, settings
from chronos.serve.worker import Worker

CAUSES = ("passes_ms", "cpu_ms", "stall_ms", "gc_ms", "way_ms", "misses", "prompts", "running")


class Noted(Worker):
    """A worker that notes its passes: (end, row of CAUSES but for the way)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.passes: list[tuple[float, dict[str, float]]] = []
        self._collecting, self._gc_s = 0.0, 0.0
        gc.callbacks.append(self._collected)

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "stop":
            self._gc_s += now - self._collecting
        self._collecting = now

    def _pass(self) -> None:
        before, gc_s = self.stats(), self._gc_s
        prompts = sum(not job.first for job in self._running.values())
        running = len(self._running)
        begin, cpu = time.perf_counter(), time.thread_time()
        super()._pass()
        end, cpu = time.perf_counter(), time.thread_time() - cpu
        row = {
            "passes_ms": 1e3 * (end - begin),
            "cpu_ms": 1e3 * cpu,
            "gc_ms": 1e3 * (self._gc_s - gc_s),
            "prompts": float(prompts),
            "running": float(running),
        }
        after = self.stats()
        if before is not None and after is not None:
            did = after.minus(before)
            row |= {"stall_ms": 1e3 * did.stall_s, "misses": float(did.misses + did.late)}
        self.passes.append((end, row))


def clients(args: argparse.Namespace) -> None:
    """In a process of its own: print when the pieces of each stream came, on the clock of all."""
    streams = []
    for round_ in range(args.rounds):
        prompts = prompts_for(args.clients, round_, args.prompt, args.vocab)

        def ask(prompt: list[int]) -> list[float]:
            begin = time.perf_counter()
            return [begin + at for at in text(args.port, prompt, args.tokens)[0]]

        with ThreadPoolExecutor(args.clients) as pool:
            streams += list(pool.map(ask, prompts))
    print(json.dumps(streams))


def explain(
    streams: list[list[float]], passes: list[tuple[float, dict[str, float]]]
) -> list[dict[str, float]]:
    """One row a gap: its length, and the sums of what the passes that ended in it did."""
    ends, rows = [end for end, _ in passes], []
    for came in streams:
        for before, after in zip(came, came[1:], strict=False):
            first, last = bisect.bisect(ends, before), bisect.bisect(ends, after)
            inside = [row for _, row in passes[first:last]]
            row = {name: sum(each.get(name, 0.0) for each in inside) for name in CAUSES}
            row["way_ms"] = 1e3 * (after - ends[last - 1]) if last else 0.0
            row["running"] = max((each["running"] for each in inside), default=0.0)
            rows.append({"gap_ms": 1e3 * (after - before)} | row)
    return sorted(rows, key=lambda row: row["gap_ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.port:
        clients(args)
        return
    card = Served.open(args.model)
    options = {"budget": args.budget, "backend": args.backend}
    worker = Noted({card.name: lambda: engine.load(card.folder, **options)}, queue=64)
    service = Service(Catalogue([card]), worker, Metrics(worker))
    config = settings(application(service, Rules()))
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, args=([sock],))
        worker.start()
        thread.start()
        worker.loaded.result()
        again = [sys.executable, "-m", "bench.runs.gaps", "--port", str(sock.getsockname()[1])]
        for name in ("clients", "prompt", "tokens", "rounds"):
            again += [f"--{name}", str(getattr(args, name))]
        again += ["--vocab", str(card.vocab_size)]
        told = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True)
        worker.close()
        server.should_exit = True
        thread.join()
    streams = json.loads(told.stdout)[2 * args.clients :]  # the first rounds warm
    rows = explain(streams, worker.passes)
    slow = rows[-max(1, len(rows) // 100) :]
    middle = statistics.median(row["gap_ms"] for row in rows)
    p99 = rows[int(0.99 * (len(rows) - 1))]["gap_ms"]
    print(f"{len(rows)} gaps: p50 {middle:.2f} ms, p99 {p99:.2f} ms, p99 / p50 {p99 / middle:.2f}")
    print(f"{'mean of':12}{'all':>10}{'slowest 1%':>12}")
    found = {}
    for name in ("gap_ms", *CAUSES):
        found[name] = [statistics.mean(row[name] for row in each) for each in (rows, slow)]
        print(f"{name:12}{found[name][0]:10.2f}{found[name][1]:12.2f}")
    print(json.dumps({"bench": "gaps", "p50_ms": middle, "p99_ms": p99} | found))


if __name__ == "__main__":
    main()
