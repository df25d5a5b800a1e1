"""Whether `chronos serve` stays as it is while many come and go: memory, files and threads.

Locust asks a server process on loopback for so many minutes, as `bench/lib/visitors.py` says: all
doors, and every third visitor leaves in the middle. What the process holds is read once a second;
it should be after the last minutes what it was after the first. Nothing may fail: an answer is 200,
or 503 with Retry-After, and what is none of these is counted as lost, with its reason.

    python -m bench.runs.soak [--model demo] [--budget 25%] [--minutes 30] [--clients 4]
        [--locust PATH]     (make clients installs it, in .venv-clients/bin)
"""

from __future__ import annotations

import argparse
import csv
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

VISITORS = Path(__file__).parents[1] / "lib" / "visitors.py"


def held(process: psutil.Process) -> dict[str, int]:
    return {
        "rss_mb": process.memory_info().rss >> 20,
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }


def _rows(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two visits")
    parser.add_argument("--locust", default="locust", metavar="PATH")
    args = parser.parse_args()
    command = [
        *(sys.executable, "-m", "chronos", "serve", args.model, "--port", "0"),
        *("--budget", args.budget, "--backend", args.backend, "--kv-cache", "32MiB"),
    ]
    with (
        tempfile.TemporaryDirectory() as work,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None
        port = int(server.stdout.readline().rpartition(":")[2])
        while not _healthy(port):
            time.sleep(0.1)
        process, samples = psutil.Process(server.pid), []
        visitors = [
            *(args.locust, "-f", VISITORS, "--headless", "--users", args.clients),
            *("--spawn-rate", args.clients, "--run-time", f"{round(60 * args.minutes)}s"),
            *("--stop-timeout", 600, "--host", f"http://127.0.0.1:{port}", "--pause", args.pause),
            *("--csv", f"{work}/seen", "--loglevel", "WARNING", "--only-summary"),
        ]
        with subprocess.Popen([str(part) for part in visitors], stdout=subprocess.DEVNULL) as load:
            while load.poll() is None:
                samples.append(held(process))
                time.sleep(1)
        seen = {
            each["Name"]: int(each["Request Count"])
            for each in _rows(f"{work}/seen_stats.csv")
            if each["Name"] != "Aggregated"
        }
        lost = {
            each.get("Error") or each["Message"]: int(each.get("Occurrences") or each["Count"])
            for kind in ("failures", "exceptions")
            for each in _rows(f"{work}/seen_{kind}.csv")
        }
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
    row |= {"exit": code, "seen": seen, "lost": lost}
    left = sum(count for name, count in seen.items() if name.startswith("left"))
    print(
        f"{sum(seen.values())} requests, {left} of them left: memory {drift:+.1%}, "
        f"files {row['files']}, threads {row['threads']}; {sum(lost.values())} lost {lost or ''}"
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
