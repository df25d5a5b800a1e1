"""Whether `chronos serve` stays as it is while many come and go: memory, files and threads.

A server process on loopback is asked for so many minutes by clients at once, through all doors,
streamed and whole, short prompts and long; every third leaves in the middle, wherever the reply is
then. What its process holds is read once a second; it should be after the last minutes what it was
after the first. Nothing may fail: an answer is 200, or 503 with Retry-After.

    python -m bench.runs.soak [--model demo] [--budget 25%] [--minutes 30] [--clients 4]
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import psutil

_DOORS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")


def body_of(path: str, draw: random.Random) -> dict[str, Any]:
    """A request to a door; some begin alike, so that kept beginnings are used and given up."""
    words = draw.choice((3, 40, 700))
    text = f"{draw.choice('abcdef')} " * words + str(draw.random())
    body: dict[str, Any] = {"temperature": draw.choice((0, 1)), "stream": draw.random() < 0.5}
    length = "max_output_tokens" if path.endswith("responses") else "max_tokens"
    body[length] = draw.randint(1, 60)
    if path.endswith("responses"):
        return body | {"input": text}
    if path == "/v1/completions":
        return body | {"prompt": text}
    return body | {"messages": [{"role": "user", "content": text}]}


def visit(port: int, draw: random.Random, seen: collections.Counter[str]) -> None:
    """Ask once, and read all of the answer or leave before its end."""
    path, leaves = draw.choice(_DOORS), draw.random() < 1 / 3
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", path, json.dumps(body_of(path, draw)), headers)
        if leaves:
            time.sleep(draw.choice((0.0, 0.02, 0.3)))
            seen["left"] += 1
            return
        response = connection.getresponse()
        raw = response.read()
        seen[str(response.status)] += 1
        if response.status in (503, 529):
            time.sleep(int(response.headers["retry-after"]))
        elif response.status != 200 or b'"error":{' in raw or b"event: error" in raw:
            seen["wrong"] += 1
    except OSError:
        seen["lost"] += 1
    finally:
        connection.close()


def held(process: psutil.Process) -> dict[str, int]:
    return {
        "rss_mb": process.memory_info().rss >> 20,
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }


def gauge(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return float(text.split(f"\nchronos:{name} ")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    command = [
        *(sys.executable, "-m", "chronos", "serve", args.model, "--port", "0"),
        *("--budget", args.budget, "--backend", args.backend, "--kv-cache", "32MiB"),
    ]
    seen: collections.Counter[str] = collections.Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().rpartition(":")[2])
        while not _healthy(port):
            time.sleep(0.1)
        process, samples = psutil.Process(server.pid), []
        begin = time.monotonic()
        end = begin + 60 * args.minutes

        def user(number: int) -> None:
            draw = random.Random(number)
            while time.monotonic() < end:
                visit(port, draw, seen)

        users = [threading.Thread(target=user, args=(at,)) for at in range(args.clients)]
        for each in users:
            each.start()
        while time.monotonic() < end:
            samples.append(held(process))
            time.sleep(1)
        for each in users:
            each.join()
        time.sleep(2)
        running = gauge(port, "num_requests_running") + gauge(port, "num_requests_waiting")
        last = held(process)
        server.terminate()
        code = server.wait(60)
    # The first fifth warms: buffers, compiled steps, kept beginnings up to their limit.
    part = max(1, len(samples) // 5)
    early, late = samples[part : 2 * part], samples[-part:]
    row: dict[str, Any] = {"bench": "soak", "minutes": args.minutes, "clients": args.clients}
    for name in ("rss_mb", "files", "threads"):
        row[name] = [statistics.median(s[name] for s in each) for each in (early, late)]
    drift = row["rss_mb"][1] / row["rss_mb"][0] - 1
    row |= {"rss_drift": round(drift, 4), "idle": last, "left_running": running}
    row |= {"exit": code, "seen": dict(seen)}
    print(
        f"{sum(seen.values())} requests, {seen['left']} of them left: memory {drift:+.1%}, "
        f"files {row['files']}, threads {row['threads']}; "
        f"{seen['wrong']} wrong, {seen['lost']} lost"
    )
    print(json.dumps(row))


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    status = connection.getresponse().status
    connection.close()
    return status == 200


if __name__ == "__main__":
    main()
