"""What `chronos ui` costs: seconds until it can be opened, and decode speed while a page is live.

A server of the shipped model answers on a quarter of its experts, as a job of a UI, in turns

- alone, with nobody at the UI;
- asked: a client without a screen asks the UI twice a second for what the I/O monitor shows, with
  the same words as the page, and throws it away. Ceiling: a ratio of 1;
- watched: a Chromium shows that page. It draws by software here, on the server's own cores.

The first is the UI's part, the difference to the second the browser's. `ui_cpu` and `browser_cpu`
are what their processes take of a core. Caches are warm.

    python -m bench.runs.ui [--rounds 5] [--seconds 6] [--chromium PATH | --no-browser]
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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from chronos.ui.face import EVERY_S
from chronos.ui.jobs import Job, Jobs
from chronos.ui.root import Root
from chronos.ui.talk import EXPERTS, address

HEAD = {"content-type": "application/json"}
TOKENS = 100  # of a reply


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
    connection.request("POST", "/v1/completions", json.dumps(body), HEAD)
    said = json.loads(connection.getresponse().read())
    connection.close()
    if "usage" not in said:
        raise RuntimeError(f"the server answered {said}")
    usage = said["usage"]
    return float(1e3 * (usage["completion_tokens"] - 1) / usage["chronos"]["decode_ms"])


@contextmanager
def asking(where: str) -> Iterator[None]:
    """Ask as the page does (assets/ui.js), until the block ends."""
    over = threading.Event()

    def ask() -> None:
        connection, seen = http.client.HTTPConnection(where), list[str]()
        while not over.wait(EVERY_S):
            body = json.dumps({"given": ["en", None, "start"], "seen": seen})
            connection.request("POST", "/live/experts", body, HEAD)
            response = connection.getresponse()
            said = response.read()
            if response.status == 200:
                seen = json.loads(said)["seen"]
            elif response.status != 204:
                raise RuntimeError(f"the UI answered {response.status}: {said[:200]!r}")
        connection.close()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def served(jobs: Jobs) -> Job:
    """A server of the shipped model that is ready."""
    stats = jobs.root.run("chat") / EXPERTS
    args = ["serve", "demo", "--budget", "25%", "--port", "0", "--stats", str(stats)]
    jobs.start("chat", "serve", args)
    while address(job := jobs.job("chat")) is None or not stats.exists():
        time.sleep(0.05)
    return job


class Turns:
    """Replies for some seconds a turn, and what processes took of a core meanwhile."""

    def __init__(self, where: str, seconds: float, ours: psutil.Process) -> None:
        self._where, self._seconds, self._ours = where, seconds, ours
        self.speeds: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def take(self, name: str, browser: Callable[[], list[psutil.Process]] = list) -> None:
        groups = {f"{name}_ui": [self._ours], f"{name}_browser": browser()}
        before = {key: _used(group) for key, group in groups.items()}
        start, found = time.perf_counter(), []
        while time.perf_counter() - start < self._seconds:
            found.append(answer(self._where, TOKENS))
        took = time.perf_counter() - start
        self.speeds.setdefault(name, []).append(statistics.median(found))
        for key, group in groups.items():
            if group:
                share = (_used(group) - before[key]) / took
                self.cpu.setdefault(key, []).append(share)
        said = ", ".join(f"{k} {v[-1]:.3f}" for k, v in self.cpu.items() if k.startswith(name))
        print(f"{name}: {self.speeds[name][-1]:.1f} tokens/s; {said}", file=sys.stderr)

    def found(self) -> dict[str, Any]:
        alone = self.speeds["alone"]
        ratios = {
            f"{name}_ratio": statistics.median(
                speed / one for speed, one in zip(speeds, alone, strict=True)
            )
            for name, speeds in self.speeds.items()
            if name != "alone"
        }
        cpu = {f"{key}_cpu": statistics.median(shares) for key, shares in self.cpu.items()}
        return ratios | cpu | {"tokens_per_s": self.speeds}


def _used(processes: list[psutil.Process]) -> float:
    return sum(sum(each.cpu_times()[:2]) for each in processes)


@contextmanager
def watching(url: str, chromium: str | None) -> Iterator[Callable[[], Any]]:
    """A Chromium; each call opens a page that shows the I/O monitor live."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def shown() -> Any:
            page = browser.new_page()
            page.goto(url)
            page.get_by_role("tab", name="I/O monitor").click()
            page.locator("#io-state").get_by_text("hits").first.wait_for()
            page.wait_for_timeout(2000)  # the page itself is drawn
            return page

        yield shown
        browser.close()


def _chromiums() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [each for each in found if "chrom" in each.name()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn")
    parser.add_argument("--chromium", default=shutil.which("chromium-headless-shell"))
    parser.add_argument("--no-browser", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, showing(Path(folder)) as (process, url, took):
        print(f"open after {took:.1f} s", file=sys.stderr)
        jobs = Jobs(Root(Path(folder)))
        job = served(jobs)
        where = address(job)
        assert where is not None
        while jobs.job("chat").alive and _loading(where):
            time.sleep(0.1)
        answer(where, TOKENS)  # uncounted
        turns = Turns(where, options.seconds, psutil.Process(process.pid))
        try:
            if options.no_browser:
                for _ in range(options.rounds):
                    _pair(turns, url)
            else:
                with watching(url, options.chromium) as shown:
                    for _ in range(options.rounds):
                        _pair(turns, url)
                        page = shown()
                        turns.take("watched", _chromiums)
                        page.close()
        finally:
            os.killpg(job.group, signal.SIGTERM)
    print(json.dumps({"start_s": took} | turns.found()))


def _pair(turns: Turns, url: str) -> None:
    turns.take("alone")
    with asking(url.removeprefix("http://")):
        turns.take("asked")


def _loading(where: str) -> bool:
    connection = http.client.HTTPConnection(where)
    connection.request("GET", "/health")
    loading = connection.getresponse().status != 200
    connection.close()
    return loading


if __name__ == "__main__":
    main()
