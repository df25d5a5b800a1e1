"""Generation on one model: stop rules, limits and numbers. Text or token ids in, both out.

`load` opens a model folder on a backend; `Engine.generate` streams steps and ends in a result,
`generate_many` answers several prompts at once. The engine imports no framework: it is given a
session and a feed, or asks `chronos.backends` for them in `load`. One call generates at a time:
starting the next one ends the one before, if it is the same thread's, and is refused if not. Not
covered: keeping caches between prompts.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import operator
import threading
import weakref
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from chronos import backends
from chronos.backends.startup import ReadAhead, fast_import, wait_asleep
from chronos.common.disk.io import FileIO
from chronos.common.disk.reader import READERS
from chronos.common.disk.tensors import read_checkpoint
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Feed, FeedOptions, open_feed
from chronos.common.model.guest import Geometry
from chronos.common.text.generation_config import ReplyDefaults
from chronos.common.text.sampling import SamplingParams
from chronos.common.text.tokenizer import Tokenizer
from chronos.common.tuning import threads_for
from chronos.run import profile as profiles
from chronos.run.batch import Batch
from chronos.run.generation import Generation, GenerationResult, Step
from chronos.run.meter import Machine, measure_machine
from chronos.run.opening import (
    RESIDENT,
    check_choice,
    dense_names,
    experts_of,
    plan_for,
    replies_of,
)

if TYPE_CHECKING:
    from chronos.backends.protocol import Session
    from chronos.common.layout import Layout

__all__ = ["RESIDENT", "Engine", "Generation", "GenerationResult", "Step", "load"]
_log = logging.getLogger("chronos")
GREEDY = SamplingParams()
Prompt = str | Iterable[int]
_NO_DEFAULTS = ReplyDefaults()


class Engine:
    """One model, ready to generate; a context that closes it. For one thread at a time.

    tokenizer: text to ids and back, or None. context: tokens of a prompt and its reply. backend,
    device: where it computes, by name. threads: of products on a CPU when it was loaded, None where
    that is not known. stop_ids: end a reply. defaults: what the model's folder
    asks of every reply. config, layout: the model's geometry and its packed experts (None where it
    is not packed). session, feed: what runs it and what holds its experts, for measuring; `feed` is
    None where the model holds its own. moe_layers: those with experts, None for all. folder: where
    `load` found it.
    """

    def __init__(
        self,
        session: Session,
        config: Geometry,
        *,
        feed: Feed | None = None,
        layout: Layout | None = None,
        folder: Path | None = None,
        tokenizer: Tokenizer | None = None,
        stop_ids: frozenset[int] = frozenset(),
        defaults: ReplyDefaults = _NO_DEFAULTS,
        expert_bytes: int = 0,
        moe_layers: tuple[int, ...] | None = None,
        context: int | None = None,
        backend: str = "",
        device: str = "",
        threads: int | None = None,
    ) -> None:
        """feed: the session's; the engine closes it. stop_ids: end a reply, beside the tokenizer's
        own. defaults: what the model asks of every reply. expert_bytes, moe_layers: where there is
        no layout. context: tokens of prompt and reply; None: as the config says."""
        self.session, self.config, self.feed, self.layout = session, config, feed, layout
        self.folder = folder
        self.tokenizer, self.backend, self.device = tokenizer, backend, device
        self.threads = threads
        self.context = context or config.max_position_embeddings
        self.stop_ids = stop_ids | (tokenizer.stop_ids if tokenizer else frozenset())
        self.defaults = defaults
        self.moe_layers = moe_layers if layout is None else layout.moe_layers
        self._expert_bytes = expert_bytes
        self._machine: Machine | None = None
        # Weak: one that nobody holds any more ends by itself.
        self._running: weakref.ref[Generation] | None = None
        self._turn = threading.Lock()  # to begin
        self._numbers = itertools.count()  # of sequences

    @property
    def expert_bytes_total(self) -> int:
        """Bytes of all routed experts as stored."""
        return self._expert_bytes if self.layout is None else self.layout.total_bytes

    @property
    def budget_bytes(self) -> int:
        """Bytes the routed experts may take in fast memory."""
        return self.feed.stats().capacity_bytes if self.feed else self.expert_bytes_total

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams = GREEDY,
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        cancel: threading.Event | None = None,
        record: bool = False,
    ) -> Generation:
        """Stream up to `max_tokens` tokens after `prompt`: a text, or token ids (NumPy's too).
        record: `limit` will be asked for.

        Raises UsageError at once for a prompt that is empty, foreign or longer than the context,
        and while a generation of another thread has not ended.
        A read that fails for good raises while iterating; the engine stays usable. A prompt may
        fill the context: one token is still sampled from it, then finish_reason is "context".
        """
        ids = self._ids(prompt)
        self.check(ids, max_tokens, stop)
        sampling = self.defaults.fill(sampling)
        with self._turn:
            batch, seq = self.batch(slots=1), next(self._numbers)
            batch.add(seq, ids, sampling, max_tokens=max_tokens, stop=stop, record=record)
            generation = Generation(_steps(batch, seq, cancel))
            self._running = weakref.ref(generation)
        return generation

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        max_sequences: int = 8,
        routing: bool = False,
    ) -> list[GenerationResult]:
        """Answer prompts, texts or token ids, side by side: what an expert is read for once serves
        all that need it. Each answer is, token for token, what `generate` gives for its prompt.

        sampling: for all, or one a prompt. max_sequences: answered at a time; each has a cache.
        routing: results say which experts were used.
        Raises what `generate` raises; a read that fails for good ends all.
        """
        if isinstance(prompts, str):
            raise UsageError(
                "generate_many takes a list of prompts, not one text", "", "use generate(text)"
            )
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts) or max_sequences < 1:
            raise UsageError(
                f"{len(prompts)} prompts, {len(each)} sampling, max_sequences {max_sequences}",
                "",
                "give one SamplingParams or one a prompt, and max_sequences of at least 1",
            )
        ids = [self._ids(prompt) for prompt in prompts]
        for prompt in ids:
            self.check(prompt, max_tokens, stop)
        with self._turn:
            batch = self.batch(max_sequences)
            numbers = [next(self._numbers) for _ in ids]
            for seq, tokens, params in zip(numbers, ids, each, strict=True):
                params = self.defaults.fill(params)
                batch.add(seq, tokens, params, max_tokens=max_tokens, stop=stop, routing=routing)
            generation = Generation(_all_steps(batch, len(numbers)))
            self._running = weakref.ref(generation)
        for _ in generation:
            pass
        return [_result(batch, seq) for seq in numbers]

    def close(self) -> None:
        """End the running generation, stop the readers, free the slots. Safe to call twice."""
        if (running := self._last()) is not None:
            running.close()
        if self.feed is not None:
            self.feed.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def limit(
        self, result: GenerationResult, resident_token_s: float | None = None
    ) -> dict[str, Any] | None:
        """The least time a token could have taken here and the shares of it, as JSON; None where
        nothing was streamed or decoded, where all experts have room, and where some needs were
        answered without their expert. Takes up to a second for 256 tokens.

        result: of `generate(record=True)`. resident_token_s: seconds a token takes with all experts
        in the model, where that was measured.
        """
        if self.feed is None or self.layout is None or self.budget_bytes >= self.expert_bytes_total:
            return None
        if result.meter is None:
            raise UsageError(
                "the routing was not recorded", "", "ask for it: generate(record=True)"
            )
        if self._machine is None:
            self._machine = measure_machine(self.layout, self.config, self.feed, self.device)
        machine = dataclasses.replace(self._machine, resident_token_s=resident_token_s)
        return result.meter.limit(self.config, machine)

    def prefetch_stats(self) -> dict[str, Any]:
        """What each source of forecasts came to since the model was opened, as JSON."""
        return {} if self.feed is None else self.feed.prefetch_stats()

    def check(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str]) -> None:
        """Raises UsageError for what no reply can be made to."""
        if not prompt:
            raise UsageError("the prompt is empty", "", "give at least one token")
        if len(prompt) > self.context:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.context}",
                "",
                "shorten the prompt, or allow more: --context N, load(context=N)",
            )
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise UsageError(
                f"the prompt has token ids from {min(prompt)} to {max(prompt)}, "
                f"the vocabulary ids from 0 to {self.config.vocab_size - 1}",
                "",
                "encode the prompt with the model's own tokenizer",
            )
        if max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}", "", "ask for at least one token")
        if not all(stop):
            raise UsageError("a stop string is empty")
        if stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer, and this model has none")

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError("this model has no tokenizer.json, so it takes no text")
            return self.tokenizer.encode_prompt(prompt)
        try:
            if isinstance(prompt, bytes):
                raise TypeError
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise UsageError(
                f"a prompt is a text or a row of token ids, not {_kind(prompt)}",
                "",
                "give a str, a list of int, or a one-dimensional array of integers",
            ) from None

    def _last(self) -> Generation | None:
        return None if self._running is None else self._running()

    def batch(self, slots: int) -> Batch:
        """Replies side by side, so many at a time, passes at the caller's pace: what a server
        stands on. Ends the generation before; UsageError where another thread has it.
        """
        if (running := self._last()) is not None:
            if running.held_elsewhere:
                raise UsageError(
                    "the engine is answering in another thread",
                    "",
                    "wait for its result or close it; generate_many answers several side by side",
                )
            running.close()
        return Batch(
            self.session,
            self.feed,
            context=self.context,
            tokenizer=self.tokenizer,
            stop_ids=self.stop_ids,
            slots=slots,
            layers=0 if self.layout is None else len(self.layout.moe_layers),
            facts=self.prefetch_stats,
        )


def _steps(
    batch: Batch, seq: int, cancel: threading.Event | None
) -> Generator[Step, None, GenerationResult]:
    """The steps of the only sequence of a batch, then its result."""
    try:
        while seq not in batch.results:
            cancelled = cancel is not None and cancel.is_set()
            for _, step in batch.cancel(seq) if cancelled else batch.step():
                yield step
        return _result(batch, seq)
    finally:
        batch.close()


def _all_steps(batch: Batch, count: int) -> Generator[Step, None, None]:
    """The steps of all sequences of a batch; the first error of one ends all."""
    try:
        while len(batch.results) < count:
            for _, step in batch.step():
                yield step
            for result in batch.results.values():
                if isinstance(result, Exception):
                    raise result
    finally:
        batch.close()


def _kind(value: object) -> str:
    """What somebody gave instead of a prompt, in a few words."""
    if (shape := getattr(value, "shape", None)) is not None:
        return f"an array of {getattr(value, 'dtype', 'numbers')} {tuple(shape)}"
    name = type(value).__name__
    items = value if isinstance(value, list | tuple) else ()
    wrong = next((type(item).__name__ for item in items if not isinstance(item, int)), "")
    return f"a {name} with {wrong}" if wrong else name


def _result(batch: Batch, seq: int) -> GenerationResult:
    result = batch.results[seq]
    if isinstance(result, Exception):
        raise result
    return result


def load(
    model: str | Path,
    *,
    backend: str | None = None,
    device: str | None = None,
    budget: str | int = "all",
    warm: str | int = 0,
    miss: str = "exact",
    prefetch: str = "auto",
    predictor: str | Path = "auto",
    allow_missing: bool = False,
    context: int | None = None,
    threads: int | None = None,
    readers: int | None = None,
    direct: bool | None = None,
    profile: str = "auto",
    io: FileIO | None = None,
    own_process: bool = False,
) -> Engine:
    """Open a model folder, or "demo".

    budget: what routed experts may take, as "25%", "2GiB", bytes or "all"; "resident" loads them
    into the model itself, as "all" does where the folder is not packed. warm: a second tier in host
    memory behind a device's. predictor: what ranks experts to keep and to read ahead, as
    `choose_policy` takes it. miss: "exact" waits for an expert, "fallback" lets the shared ones
    stand in, which allow_missing needs. context: tokens of prompt and reply in place of what the
    config allows; more is warned of. threads: of products on a CPU, for the
    whole process (PyTorch; MLX has no such number). readers, direct: threads that read experts, and
    whether past the page cache. profile: "auto" takes what `chronos tune machine` found on this
    machine for what nobody asked for, "off" does not. io: how the experts' files are read.
    own_process: nothing but Chronos runs here, so start-up may leave out parts of the framework.
    Raises UsageError, ConfigError, CorruptFileError and BudgetError (naming the minimum) before a
    framework is imported; then MissingBackendError.
    """
    check_choice("profile", profile, ("auto", "off"))
    if profile == "auto" and profiles.find(model) is not None:
        given = {"warm": warm, "prefetch": prefetch, "predictor": predictor, "threads": threads,
                 "readers": readers, "direct": direct}  # fmt: skip
        found = profiles.chosen(model, backends.select(backend), device, budget, given)
        warm, prefetch = found.get("warm", warm), found.get("prefetch", prefetch)
        predictor, threads = found.get("predictor", predictor), found.get("threads", threads)
        readers, direct = found.get("readers", readers), found.get("direct", direct)
    wait_asleep()  # before anything of ours runs that it would take for a neighbour
    threads_wanted = threads_for(threads)
    plan = plan_for(
        model, budget=budget, warm=warm, miss=miss, prefetch=prefetch, predictor=predictor,
        allow_missing=allow_missing, context=context,
    )  # fmt: skip
    folder, config, layout = plan.folder, plan.config, plan.layout
    known = experts_of(folder, config) if layout is None else {}
    name = backends.select(backend)
    with ReadAhead(read_checkpoint(folder, dense_names(folder, config))) as dense:
        with fast_import(name, own_process=own_process):
            module = backends.load(name)
        threads_taken = module.set_threads(threads_wanted)
        if threads_taken is None and threads_wanted is not None:
            _log.warning("threads=%d has no effect: %s takes its own number", threads_wanted, name)
        core = module.load(
            folder, device=device, resident=layout is None, dense=dense, layout=layout
        )
    known |= {"backend": name, "device": str(core.device), "context": context, "folder": folder}
    known |= {"threads": threads_taken, **replies_of(folder, config)}
    if layout is None:
        return Engine(module.session(core, None), config, **known)
    options = FeedOptions(
        config.num_experts_per_tok, plan.warm_bytes, core.device, miss,
        readers=readers or READERS, direct=direct is not False,
    )  # fmt: skip
    feed = open_feed(
        module.open_arena, layout, plan.capacity_bytes, options,
        policy=plan.policy, prefetch=plan.forecasts, io=io,
    )  # fmt: skip
    try:
        if plan.preloads:
            feed.preload(sorted(layout.records))  # filled in the background
        return Engine(module.session(core, feed), config, feed=feed, layout=layout, **known)
    except BaseException:
        feed.close()
        raise
