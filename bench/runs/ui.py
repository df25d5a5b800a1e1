"""What `chronos ui` costs: seconds until it can be opened, and decode speed while a page watches.

A server of the shipped model answers on a quarter of its experts, as a job of a UI, in turns
without a page and with one that shows the I/O monitor twice a second in a Chromium. Ceiling: a
page that costs nothing, a ratio of 1. The browser works on the same machine, so its drawing counts;
`ui_cpu` is what the UI's own process took of a core meanwhile. Caches are warm.

    python -m bench.runs.ui [--rounds 5] [--tokens 200] [--chromium PATH]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from chronos.ui.jobs import Job, Jobs
from chronos.ui.root import Root
from chronos.ui.talk import EXPERTS, address


@contextmanager
def showing(root: Path) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """The UI's process, where it is, and the seconds until it said so."""
    command = [sys.executable, "-m", "chronos", "ui", "--port", "0", "--root", str(root), "-q"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        took = time.perf_counter() - began
        try:
            yield process, line.split()[-1], took
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def answer(where: str, tokens: int) -> float:
    """Tokens a second of a reply's decoding, as the server counts them."""
    body: dict[str, Any] = {"prompt": "import os\n\n\ndef ", "max_tokens": tokens, "temperature": 0}
    connection = http.client.HTTPConnection(where)
    head = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), head)
    usage = json.loads(connection.getresponse().read())["usage"]
    connection.close()
    return 1e3 * (usage["completion_tokens"] - 1) / float(usage["chronos"]["decode_ms"])


def served(jobs: Jobs) -> Job:
    """A server of the shipped model that is ready."""
    stats = jobs.root.run("chat") / EXPERTS
    args = ["serve", "demo", "--budget", "25%", "--port", "0", "--stats", str(stats)]
    jobs.start("chat", "serve", args)
    while address(job := jobs.job("chat")) is None or not stats.exists():
        time.sleep(0.05)
    return job


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--chromium", default=shutil.which("chromium-headless-shell"))
    options = parser.parse_args()
    alone: list[float] = []
    watched: list[float] = []
    with tempfile.TemporaryDirectory() as folder, showing(Path(folder)) as (process, url, took):
        jobs = Jobs(Root(Path(folder)))
        job = served(jobs)
        where = address(job)
        assert where is not None
        while jobs.job("chat").alive and _loading(where):
            time.sleep(0.1)
        answer(where, options.tokens)  # uncounted
        ours, used = psutil.Process(process.pid), 0.0
        seconds = 0.0
        with sync_playwright() as running:
            browser = running.chromium.launch(
                executable_path=options.chromium, args=["--no-sandbox"]
            )
            for _ in range(options.rounds):
                alone.append(answer(where, options.tokens))
                page = browser.new_page()
                page.goto(url)
                page.wait_for_timeout(2000)  # until it has gone to the tab that was seen last
                page.get_by_role("tab", name="I/O monitor").click()
                page.locator("#io-state").get_by_text("hits").first.wait_for()
                before, start = sum(ours.cpu_times()[:2]), time.perf_counter()
                watched.append(answer(where, options.tokens))
                used += sum(ours.cpu_times()[:2]) - before
                seconds += time.perf_counter() - start
                page.close()
            browser.close()
        os.killpg(job.group, signal.SIGTERM)
    ratio = statistics.median(watched) / statistics.median(alone)
    print(f"open after {took:.1f} s; {statistics.median(alone):.1f} tokens/s alone, "
          f"{statistics.median(watched):.1f} watched")  # fmt: skip
    found = {"start_s": took, "alone_tps": alone, "watched_tps": watched, "ratio": ratio}
    print(json.dumps(found | {"ui_cpu": used / seconds}))


def _loading(where: str) -> bool:
    connection = http.client.HTTPConnection(where)
    connection.request("GET", "/health")
    loading = connection.getresponse().status != 200
    connection.close()
    return loading


if __name__ == "__main__":
    main()
