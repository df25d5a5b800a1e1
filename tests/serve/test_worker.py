"""The engine's thread: who waits, who leaves, what is kept, what happens when something fails."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chronos.common.errors import StoreError
from chronos.common.experts.feed import FeedStep
from chronos.common.text.sampling import PIECE, SamplingParams, Work
from chronos.run.engine import Engine, load
from chronos.run.generation import GenerationResult, Step
from chronos.serve import worker as workers
from chronos.serve.problem import Problem
from chronos.serve.worker import Job, Read, Worker
from chronos.testing.tiny import CONFIG

pytestmark = pytest.mark.needs_backend
VOCAB = CONFIG.vocab_size
LONG = [7 * i % VOCAB for i in range(3 * PIECE)]
GREEDY = SamplingParams()


class Gate:
    """Passes of the engine happen one by one, when the test lets them. passes: what each did."""

    def __init__(self) -> None:
        self.passes: list[list[Work]] = []
        self._open, self._free = threading.Semaphore(0), threading.Event()

    def watch(self, engine: Engine) -> Engine:
        run = engine.session.run

        def watched(work: Sequence[Work], **options: Any) -> Any:
            if not self._free.is_set():
                self._open.acquire()
            self.passes.append(list(work))
            return run(work, **options)

        engine.session.run = watched  # type: ignore[method-assign]
        engine.stop_ids = frozenset()
        return engine

    def let(self, passes: int) -> None:
        self._open.release(passes)

    def free(self) -> None:
        self._free.set()
        self._open.release(1000)


class Rig:
    """A worker behind a gate."""

    def __init__(self, folder: Path, backend: str, **options: Any) -> None:
        self.gate = Gate()
        self.folder, self.backend = folder, backend
        self.worker = Worker({"one": self.opened, "two": self.opened}, **options)
        self.worker.start()
        self.worker.loaded.result()

    def opened(self) -> Engine:
        return self.gate.watch(load(self.folder, backend=self.backend, budget="50%"))

    def job(self, prompt: Sequence[int], **fields: Any) -> tuple[Job, queue.Queue[Any]]:
        """Submitted; its events."""
        events: queue.Queue[Any] = queue.Queue()
        fields = {"model": "one", "sampling": GREEDY, "max_tokens": 4} | fields
        job = Job(prompt=prompt, send=events.put, **fields)
        self.worker.submit([job])
        return job, events

    def ask(self, prompt: Sequence[int], **fields: Any) -> tuple[Job, GenerationResult]:
        job, events = self.job(prompt, **fields)
        return job, ended(events)


def ended(events: queue.Queue[Any]) -> GenerationResult:
    while True:
        event = events.get(timeout=30)
        if isinstance(event, Exception):
            raise event
        if isinstance(event, GenerationResult):
            return event


@pytest.fixture
def rig(folder: Path, one_backend: str, request: pytest.FixtureRequest) -> Any:
    rig = Rig(folder, one_backend, **getattr(request, "param", {}))
    yield rig
    rig.gate.free()
    rig.worker.close()


def test_one_that_leaves_in_its_prompt_ends_with_the_piece_under_way(rig: Rig) -> None:
    job, events = rig.job(LONG)
    rig.gate.let(1)
    assert events.get(timeout=30) == Read(PIECE)
    rig.worker.cancel([job])
    rig.gate.free()
    rig.ask([1, 2], max_tokens=1)
    # The piece that had begun when it left, at most, and then the other's prompt.
    assert [len(work.tokens) for passed in rig.gate.passes for work in passed] in (
        [PIECE, 2],
        [PIECE, PIECE, 2],
    )
    assert events.empty() or isinstance(events.get(), Read)


@pytest.mark.parametrize("rig", [{"sequences": 1}], indirect=True)
def test_one_that_leaves_the_line_never_begins(rig: Rig) -> None:
    _, first = rig.job([1, 2, 3])
    gone, events = rig.job([4, 5])
    _, last = rig.job([6])
    rig.worker.cancel([gone])
    rig.gate.free()
    assert len(ended(first).tokens) == len(ended(last).tokens) == 4
    assert events.empty() and not gone.begun
    assert [4, 5] not in [list(work.tokens) for passed in rig.gate.passes for work in passed]


@pytest.mark.parametrize("rig", [{"sequences": 1, "queue": 2}], indirect=True)
def test_no_more_wait_than_the_line_holds(rig: Rig) -> None:
    events = [rig.job([at + 1])[1] for at in range(3)]  # one begins
    with pytest.raises(Problem, match="waiting") as caught:
        rig.job([9])
    assert (caught.value.status, caught.value.code) == (503, "queue_full")
    assert caught.value.retry_after is not None and caught.value.retry_after >= 1
    rig.gate.free()
    assert [len(ended(each).tokens) for each in events] == [4, 4, 4]
    assert len(rig.ask([9])[1].tokens) == 4


@pytest.mark.parametrize("rig", [{"sequences": 4, "kv_bytes": 1 << 20}], indirect=True)
def test_no_more_run_than_their_caches_have_room(rig: Rig) -> None:
    """By what they may become; the first of all tells what a token takes, and one always runs."""
    events = [rig.job([at], max_tokens=3)[1] for at in (1, 2, 3, 4)]
    rig.gate.let(1)
    rig.gate.free()
    assert [len(ended(each).tokens) for each in events] == [3] * 4
    assert [len(passed) for passed in rig.gate.passes][:2] == [1, 4]
    each = rig.worker._token_bytes
    assert rig.worker._measured == 2 and 2 * each >= PIECE * CONFIG.kv_latent_dim
    rig.worker._measured = 1 << 30  # as if of the longest there can be
    rig.worker._kv_bytes = int(11 * each)  # two of 2 + 3 tokens, and not three
    rig.gate.passes.clear()
    events = [rig.job([at, 5], max_tokens=3)[1] for at in (1, 2, 3, 4)]
    assert [len(ended(each).tokens) for each in events] == [3] * 4
    assert max(len(passed) for passed in rig.gate.passes) == 2
    rig.worker._kv_bytes = 1
    assert len(rig.ask([1, 2, 3])[1].tokens) == 4


@pytest.mark.parametrize("rig", [{"sequences": 2}], indirect=True)
def test_a_short_prompt_does_not_wait_for_a_long_one(rig: Rig) -> None:
    """Its prompt is read beside the long one's next piece."""
    rig.job(LONG, max_tokens=1)
    rig.gate.let(1)
    _, events = rig.job([3, 4], max_tokens=1)
    rig.gate.free()
    ended(events)
    short = [at for at, passed in enumerate(rig.gate.passes) if len(passed[-1].tokens) == 2]
    assert short and short[0] <= 2
    assert len(rig.gate.passes[short[0]][0].tokens) == PIECE


def test_a_read_that_fails_ends_one_and_not_the_next(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.gate.free()
    expected = rig.ask([1, 2, 3])[1].tokens

    def fails(*_: Any) -> Any:
        raise StoreError("a disk that is gone")

    with monkeypatch.context() as patch:
        patch.setattr(FeedStep, "acquire", fails)
        with pytest.raises(StoreError, match="gone"):
            rig.ask([1, 2, 3])
    assert rig.ask([1, 2, 3])[1].tokens == expected


def test_a_pass_that_raises_ends_those_in_it_and_not_the_thread(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.gate.free()
    expected = rig.ask([1, 2, 3])[1].tokens
    with monkeypatch.context() as patch:
        patch.setattr("chronos.run.batch.Batch.step", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rig.ask([1, 2, 3])
    assert rig.ask([1, 2, 3])[1].tokens == expected
    assert rig.worker.health() == "ok" and rig.worker.running == 0


def test_a_model_that_hangs_is_not_healthy(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.gate.free()
    rig.ask([1])
    rig.gate.__init__()  # type: ignore[misc]
    _, events = rig.job([1, 2])
    assert rig.worker.health() == "ok"
    monkeypatch.setattr(workers, "STALL_S", -1.0)
    while not rig.worker.running:
        pass
    assert rig.worker.health() == "stalled"
    rig.gate.free()
    ended(events)
    assert rig.worker.health() == "ok"


def nbytes_of_a_prefix(rig: Rig) -> int:
    rig.ask([1] * (PIECE + 1), max_tokens=1)
    return rig.worker.prefix_bytes


@pytest.mark.parametrize("rig", [{"prefix_bytes": 1 << 24}], indirect=True)
def test_kept_beginnings_stay_within_their_bytes(rig: Rig) -> None:
    """The least recently used go first; what is used stays."""
    rig.gate.free()
    each = nbytes_of_a_prefix(rig)
    assert each > PIECE * CONFIG.kv_latent_dim
    prefixes = rig.worker._prefixes
    assert prefixes is not None
    prefixes._most = 3 * each
    for at in range(2, 9):
        rig.ask([at] * (PIECE + 1), max_tokens=1)
        assert rig.worker.prefix_bytes <= 3 * each
        job, _ = rig.ask([1] * (PIECE + 2), max_tokens=1)
        assert job.cached == PIECE
    assert rig.ask([2] * (PIECE + 1), max_tokens=1)[0].cached == 0
    prefixes._most = each - 1
    before = len(prefixes)
    rig.ask([30] * (PIECE + 1), max_tokens=1)
    assert rig.worker.prefix_bytes == each * before  # too large for all of it: nothing is given up


@pytest.mark.parametrize("rig", [{"prefix_bytes": 1 << 24}], indirect=True)
def test_what_two_prompts_begin_with_is_kept_for_the_third(rig: Rig) -> None:
    rig.gate.free()
    cached = []
    for last in (1, 2, 3):
        prompt = [*LONG[: PIECE + 100], *([last] * 2 * PIECE)]
        cached.append(rig.ask(prompt, max_tokens=1)[0].cached)
    assert cached == [0, 0, PIECE]


@pytest.mark.parametrize("rig", [{"unload_s": 0.05}], indirect=True)
def test_an_idle_model_is_unloaded_and_comes_back(rig: Rig) -> None:
    rig.gate.free()
    expected = rig.ask([1, 2, 3])[1].tokens
    while rig.worker.model:
        pass
    assert rig.worker.stats() is None and rig.worker.health() == "ok"
    assert rig.ask([1, 2, 3])[1].tokens == expected
    assert rig.worker.loads == 2


def test_of_several_models_one_is_loaded_at_a_time(rig: Rig) -> None:
    rig.gate.free()
    assert rig.worker.model == "one"
    expected = rig.ask([1, 2, 3])[1].tokens
    asked = [rig.job([1, 2, 3], model=model)[1] for model in ("two", "two", "one")]
    assert [ended(events).tokens for events in asked] == [expected] * 3
    assert rig.worker.loads == 3 and rig.worker.model == "one"


def test_a_model_that_cannot_be_loaded_fails_who_wants_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.gate.free()

    def gone() -> Engine:
        raise StoreError("the folder is gone")

    monkeypatch.setitem(rig.worker._open, "two", gone)
    with pytest.raises(StoreError, match="folder"):
        rig.ask([1], model="two")
    assert len(rig.ask([1])[1].tokens) == 4


def test_what_is_under_way_is_told_when_the_worker_ends(rig: Rig) -> None:
    _, running = rig.job(LONG)
    rig.worker.drain()
    with pytest.raises(Problem) as caught:
        rig.job([1])
    assert caught.value.code == "shutting_down"
    closing = threading.Thread(target=rig.worker.close)
    closing.start()
    rig.gate.let(1)
    closing.join()
    with pytest.raises(Problem, match="shutting down"):
        ended(running)


def test_a_first_model_that_cannot_be_loaded_is_told(folder: Path) -> None:
    def gone() -> Engine:
        raise StoreError("the folder is gone")

    worker = Worker({"one": gone})
    worker.start()
    with pytest.raises(StoreError, match="gone"):
        worker.loaded.result(timeout=30)
    worker.close()
    assert worker.health() in ("failed", "shutting_down")


def test_steps_carry_the_likeliest_of_the_models_own_logits(rig: Rig) -> None:
    rig.gate.free()
    events = rig.job([5, 6], likely=3)[1]
    steps: list[Step] = []
    while not isinstance(event := events.get(timeout=30), GenerationResult):
        steps += [event] if isinstance(event, Step) else []
    for step in steps:
        own, *best = step.likely
        assert own == best[0] and own[0] == step.token  # greedy
        assert [p for _, p in best] == sorted((p for _, p in best), reverse=True)
        assert len(best) == 3 and own[1] < 0
