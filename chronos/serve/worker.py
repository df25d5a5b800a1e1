"""The thread that has the engine: it loads models, runs passes and hands out what they make.

Jobs wait in line, join the running ones between two passes and leave at the next pass after they
were given up. All frameworks are used on this thread alone, as MLX demands. Knows no HTTP and no
event loop: what a job makes goes to its `send`.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chronos.common.text.sampling import SamplingParams
from chronos.run.batch import Guide
from chronos.run.generation import GenerationResult, Step
from chronos.serve.prefix_files import PrefixFiles, fingerprint
from chronos.serve.prefixes import Prefixes
from chronos.serve.problem import Problem

if TYPE_CHECKING:
    from chronos.common.experts.stats import StoreStats
    from chronos.run.batch import Batch
    from chronos.run.engine import Engine

_log = logging.getLogger("chronos")
# More sequences than this share few reads more, and each takes a cache.
MOST_SEQUENCES = 4
# A pass that takes longer counts as a model that hangs: the slowest disks read a layer in seconds.
STALL_S = 120.0
_FIRST_GUESS_S = 5.0  # how long a reply takes, before one has ended


@dataclass(frozen=True)
class Read:
    """So many tokens of a job's prompt have been read."""

    tokens: int


Event = Step | GenerationResult | Read | Exception


@dataclass(eq=False)
class Job:
    """One reply to make. send: is given steps, how far the prompt is, and at last a result or an
    error; on the worker's thread. cached: tokens of the prompt that were there already.
    begun, first: when it joined, when its first token came (time.monotonic), 0 before. gone:
    nobody wants it any more. read: of the prompt. places: where its prompt is worth keeping."""

    model: str
    prompt: Sequence[int]
    sampling: SamplingParams
    max_tokens: int
    send: Callable[[Event], None]
    stop: Sequence[str] = ()
    guide: Guide | None = None
    bias: npt.NDArray[np.float32] | None = None
    likely: int | None = None
    score: bool = False
    cached: int = 0
    asked: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    first: float = 0.0
    gone: bool = False
    read: int = 0
    places: set[int] = field(default_factory=set)


class Worker:
    """`submit` and `cancel` from any thread. loaded: done when the first model is, or its error."""

    def __init__(
        self,
        open_model: Mapping[str, Callable[[], Engine]],
        *,
        queue: int = 8,
        sequences: int | None = None,
        prefix_bytes: int = 0,
        prefix_files: PrefixFiles | None = None,
        kv_bytes: int | None = None,
        unload_s: float | None = None,
    ) -> None:
        """open_model: by name; the first one is loaded at once, and one at a time. queue: jobs that
        may wait. sequences: jobs that run at a time; None: as many as fill the experts' slots, up
        to MOST_SEQUENCES. prefix_bytes: of beginnings of prompts that are kept; prefix_files:
        where on disk, written while nobody waits. kv_bytes: of the caches
        of jobs that run, at their longest; one always runs. unload_s: give the
        model up when it had nothing to do for so long; the next job loads it."""
        self._open, self._queue = dict(open_model), queue
        self._sequences, self._unload_s = sequences, unload_s
        self._prefix_bytes, self._prefix_files = prefix_bytes, prefix_files
        self._kv_bytes = kv_bytes
        self._measured, self._token_bytes = 0, 0.0  # at so many tokens, bytes of each
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._closing = self._draining = False
        self._slots = sequences or MOST_SEQUENCES
        self._job_s, self._moved = _FIRST_GUESS_S, time.monotonic()
        self.loaded: Future[None] = Future()
        self.loads = 0  # models opened since the start
        self.generated = 0  # tokens of all replies
        self.model = ""  # the one that is loaded
        self._engine: Engine | None = None
        self._batch: Batch | None = None
        self._prefixes: Prefixes | None = None
        self._numbers: Iterator[int] = itertools.count()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def prefix_bytes(self) -> int:
        return 0 if self._prefixes is None else self._prefixes.nbytes

    def ahead(self, job: Job) -> int:
        """How many jobs are before it in line."""
        with self._changed:
            return self._waiting.index(job) if job in self._waiting else 0

    def stats(self) -> StoreStats | None:
        """What the loaded model's experts did; None where none are streamed."""
        engine = self._engine
        return None if engine is None or engine.feed is None else engine.feed.stats()

    def layer_stats(self) -> list[dict[str, Any]]:
        """The same by layer, as `Feed.layer_stats`; empty where none are streamed."""
        engine = self._engine
        return [] if engine is None or engine.feed is None else engine.feed.layer_stats()

    def health(self) -> str:
        """ok, loading, failed, stalled (no pass has ended for STALL_S) or shutting_down."""
        if self._draining or self._closing:
            return "shutting_down"
        if not self.loaded.done():
            return "loading"
        if self.loaded.exception() is not None or not self._thread.is_alive():
            return "failed"
        return "stalled" if self._running and time.monotonic() - self._moved > STALL_S else "ok"

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put jobs in line, all or none. Raises Problem where there is no room, while the model is
        loaded for the first time and while the server ends."""
        with self._changed:
            state = self.health()
            if state != "ok" and state != "stalled":
                wait = {"loading": 2, "shutting_down": 10}.get(state, 30)
                raise Problem(503, f"the server is {state}", code=state, retry_after=wait)
            free = max(0, self._slots - len(self._running))
            if len(self._waiting) >= self._queue + free:
                raise Problem(
                    503,
                    f"{len(self._waiting)} requests are waiting already",
                    code="queue_full",
                    retry_after=self._wait_s(),
                )
            if not self._running and not self._waiting:
                self._moved = time.monotonic()
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give jobs up, wherever they are: one that waits never begins, one that runs ends with the
        pass that is under way."""
        with self._changed:
            for job in jobs:
                job.gone = True
            self._waiting = deque(job for job in self._waiting if not job.gone)

    def drain(self) -> None:
        """Take no more jobs; those that are here go on."""
        with self._changed:
            self._draining = True

    def close(self) -> None:
        """End what is under way with an error, and the thread. Waits for the pass to end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _wait_s(self) -> int:
        """Seconds until there should be room in line."""
        return max(1, min(60, round(self._job_s * (1 + len(self._waiting)) / self._slots)))

    def _run(self) -> None:
        try:
            self._load(next(iter(self._open)))
        except BaseException as error:
            self.loaded.set_exception(error)
            return
        self.loaded.set_result(None)
        try:
            while self._next():
                self._pass()
        finally:
            ended = Problem(503, "the server is shutting down", code="shutting_down")
            for job in (*self._running.values(), *self._waiting):
                job.send(ended)
            self._running.clear()
            self._waiting.clear()
            self._unload()

    def _next(self) -> bool:
        """Wait for something to do, and take in what can begin; False once the thread is to end."""
        while True:
            with self._changed:
                idle = not (self._closing or self._waiting or self._running)
                limit = self._unload_s if self.model else None
                prefixes = self._prefixes if idle else None
                writes = prefixes is not None and prefixes.unwritten > 0
                unload = idle and not writes and not self._changed.wait(limit)
                if self._closing:
                    return False
                joining, wanted = self._joining()
            if writes and prefixes is not None:
                prefixes.write()
                continue
            if unload and not joining and not wanted:
                _log.info("%s had nothing to do and is unloaded", self.model)
                self._unload()
                continue
            for seq, job in list(self._running.items()):
                if job.gone:
                    self._leave(seq)
            if wanted:
                self._change(wanted)
                continue
            for job in joining:
                self._join(job)
            if self._running:
                return True

    def _joining(self) -> tuple[list[Job], str]:
        """Jobs to begin now, or the model to load for the first in line once nothing runs."""
        joining: list[Job] = []
        while self._waiting and len(self._running) + len(joining) < self._slots:
            if self._waiting[0].model != self.model:
                idle = not self._running and not joining
                return joining, self._waiting[0].model if idle else ""
            if not self._fits([*self._running.values(), *joining], self._waiting[0]):
                break
            joining.append(self._waiting.popleft())
        return joining, ""

    def _fits(self, others: Sequence[Job], job: Job) -> bool:
        """Whether the caches of all can grow as long as they may become."""
        if self._kv_bytes is None or not others:
            return True
        if not self._measured:  # the first of all tells what a token takes
            return False
        tokens = sum(len(each.prompt) + each.max_tokens for each in (*others, job))
        return tokens * self._token_bytes <= self._kv_bytes

    def _measure(self) -> None:
        """What a token takes in a cache, by the longest one so far: some grow by doubling."""
        assert self._engine is not None
        session = self._engine.session
        for seq in self._running:
            if (tokens := session.position(seq)) > self._measured:
                self._measured, self._token_bytes = tokens, session.nbytes(seq) / tokens

    def _change(self, model: str) -> None:
        """Load another model; those who wait for one that cannot be loaded are told."""
        self._unload()
        try:
            self._load(model)
        except Exception as error:
            _log.exception("%s could not be loaded", model)
            with self._changed:
                failed = [job for job in self._waiting if job.model == model]
                self._waiting = deque(job for job in self._waiting if job.model != model)
            for job in failed:
                job.send(error)

    def _load(self, model: str) -> None:
        engine = self._engine = self._open[model]()
        self.loads += 1
        self._measured = 0
        self._slots = self._sequences or MOST_SEQUENCES
        if self._sequences is None and engine.feed is not None:
            each = max(1, engine.config.num_experts_per_tok)
            self._slots = max(1, min(MOST_SEQUENCES, engine.feed.slots // each))
        self._batch = engine.batch(self._slots)
        most = self._prefix_bytes if _keeps_bits(engine) else 0
        files = self._prefix_files
        if files is not None and (engine.feed is None or engine.feed.exact):
            files.open(fingerprint(engine))
        else:  # bits that depend on what was in memory are no one else's
            files = None
        self._prefixes = Prefixes(engine.session, most, self._numbers, files)
        self.model, self._moved = model, time.monotonic()

    def _unload(self) -> None:
        if self._engine is None:
            return
        if self._batch is not None and self._prefixes is not None:
            self._batch.close()
            while self._prefixes.unwritten:
                self._prefixes.write()
            self._prefixes.clear()
        self._engine.close()
        self._engine = self._batch = self._prefixes = None
        self.model = ""

    def _join(self, job: Job) -> None:
        engine, batch, prefixes = self._engine, self._batch, self._prefixes
        assert engine is not None and batch is not None and prefixes is not None
        if job.gone:
            return
        seq = next(self._numbers)
        try:
            engine.check(job.prompt, job.max_tokens, job.stop)
            if not job.score:  # which needs all of the prompt
                job.places = prefixes.places(job.prompt)
                job.cached = prefixes.take(job.prompt, seq)
            batch.add(
                seq,
                job.prompt,
                engine.defaults.fill(job.sampling),
                max_tokens=job.max_tokens,
                stop=job.stop,
                start=job.cached,
                guide=job.guide,
                bias=job.bias,
                likely=job.likely,
                score=job.score,
            )
        except Exception as error:
            engine.session.drop(seq)
            job.send(error)
            return
        job.begun = time.monotonic()
        self._running[seq] = job

    def _pass(self) -> None:
        """One pass of the model, and what it made to whom it belongs."""
        assert self._engine is not None and self._batch is not None
        try:
            steps = self._batch.step()
        except Exception as error:  # what was under way can only be dropped
            _log.exception("a pass failed")
            self._batch.close()
            for job in self._running.values():
                job.send(error)
            self._running.clear()
            return
        self._moved = time.monotonic()
        if self._kv_bytes is not None:
            self._measure()
        for seq, step in steps:
            job = self._running[seq]
            job.first = job.first or self._moved
            self.generated += step.token is not None
            job.send(step)
        for seq, job in list(self._running.items()):
            if (result := self._batch.results.pop(seq, None)) is not None:
                self._ended(seq, result)
            elif not job.first:
                self._keep(seq, job)

    def _keep(self, seq: int, job: Job) -> None:
        """Of a prompt on its way."""
        assert self._engine is not None and self._prefixes is not None
        position = self._engine.session.position(seq)
        if position == job.read:  # some layers further on only
            return
        job.read = position
        job.send(Read(position))
        if position in job.places:
            self._prefixes.keep(seq, job.prompt, position)

    def _ended(self, seq: int, result: GenerationResult | Exception) -> None:
        job = self._running.pop(seq)
        if isinstance(result, Exception):
            _log.error("a reply failed: %s", result)
        else:
            self._job_s += 0.2 * (self._moved - job.begun - self._job_s)
        job.send(result)

    def _leave(self, seq: int) -> None:
        assert self._batch is not None
        self._batch.cancel(seq)
        self._running.pop(seq)
        self._batch.results.pop(seq, None)


def _keeps_bits(engine: Engine) -> bool:
    """Whether the beginning of a prompt is the same whatever follows. Where positions are scaled by
    how long a prompt is, it is not."""
    return getattr(engine.config, "rope_type", "") not in ("dynamic", "longrope")
