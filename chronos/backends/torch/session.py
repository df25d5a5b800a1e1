"""Sequences on one model: prompts in pieces, single tokens, sampling on the device.

A pass does something for one or more sequences. Each has its own cache, draws and position and is
computed as it would be alone; only reads of experts are shared (`together`). A prompt goes through
the model in pieces; within one, each needed expert is streamed once for all its tokens. The
resident model takes the same pieces, so streaming cannot change a bit of the logits. A token costs
one copy to the host: its id, or -1 where there is none. Draws come from
Python's generator, so a seed means the same draws on every backend.

Shape legend: T tokens, V vocabulary, L layers, K top-k, E experts, J lookahead steps + 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from chronos.backends.torch.fast import graphs
from chronos.backends.torch.model import Cache, Model, Output
from chronos.backends.torch.moe import Routing
from chronos.backends.torch.sampling import adjust, draw
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Feed, FeedStep, Source
from chronos.common.experts.prefetch import LOOKAHEAD
from chronos.common.experts.together import together
from chronos.common.text.sampling import PIECE, Work, check_work

if TYPE_CHECKING:
    from chronos.backends.protocol import RouteOverride

# Recorded routing is compacted after this many calls: a tensor per layer and token costs 300 bytes,
# which over a long generation would outgrow the experts' budget.
_COMPACT_EVERY = 32


class Session:
    """The sequences of one model, by number; one is there from its first work on.

    `steps`, where there are any, run a single token of a sequence alone in fewer launches.
    """

    def __init__(self, model: Model, feed: Feed | None = None) -> None:
        """feed: where routed experts come from; None: the model's own."""
        self.model, self.feed = model.eval(), feed
        self._has_lookahead = model.lookahead is not None
        self._sequences: dict[int, _Sequence] = {}
        captured = graphs.usable(model, feed is None or feed.exact)
        self.steps = graphs.Steps(model) if captured else model.step

    @torch.inference_mode()
    def run(
        self,
        work: Sequence[Work],
        *,
        record: bool = False,
        route_override: RouteOverride | None = None,
    ) -> list[int | None | Exception]:
        """One pass: of each work the token drawn, -1 where the logits are not finite or allow none,
        None where its prompt goes on, or the error that ended the sequence, which can only be
        dropped then.

        record: keep the routing for `routing`. Raises UsageError for work that makes no sense.
        """
        check_work(work, self.model.config.vocab_size)
        parts = [self._part(each) for each in work]
        with nullcontext() if self.feed is None else self.feed.step(work) as step:
            outs = self._pass(parts, step, route_override)
            _tell(step, parts, outs)
        answers = [
            out if isinstance(out, Exception) else self._answer(part, out, record)
            for part, out in zip(parts, outs, strict=True)
        ]
        _ended(parts, outs)
        return answers

    def position(self, seq: int) -> int:
        """Tokens the sequence has, 0 for one that is not there."""
        return self._sequences[seq].cache.position if seq in self._sequences else 0

    def logits(self, seq: int) -> np.ndarray:
        """float32 [V] of the last position; a copy."""
        return self._known(seq).logits_V.float().cpu().numpy().copy()

    def routing(self, seq: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids_TLK, weights_TLK) recorded since the last call, in order of the tokens."""
        return self._known(seq).record.take()

    @torch.inference_mode()
    def keep(self, seq: int, tokens: int) -> int:
        """Forget what came after the first `tokens`; returns how many are there, a multiple of
        PIECE: whole pieces of its prompt, or 0 where the cache cannot go back (`fork` before)."""
        row = self._known(seq)
        kept = min(tokens, row.whole) // PIECE * PIECE
        fresh = _Sequence(row.cache)
        all_there = kept == row.cache.position
        if row.halfway or not (all_there or (kept and row.cache.cut(kept))):
            kept, fresh.cache = 0, self.model.new_cache()
        fresh.ids, fresh.whole = row.ids[:kept], kept
        if self.feed is not None:
            self.feed.drop(seq)
        self._sequences[seq] = fresh
        return kept

    @torch.inference_mode()
    def fork(self, seq: int, new: int) -> None:
        """Make sequence `new` of one that is there: the same tokens, draws and caches, its own from
        here on."""
        if new in self._sequences:
            raise UsageError(f"there is a sequence {new} already", "", "drop it")
        self._sequences[new] = self._known(seq).forked()
        if self.feed is not None:
            self.feed.fork(seq, new)

    def drop(self, seq: int) -> None:
        """Forget a sequence, if it is there; the experts stay where they are."""
        if self._sequences.pop(seq, None) is not None and self.feed is not None:
            self.feed.drop(seq)

    def _known(self, seq: int) -> _Sequence:
        if seq not in self._sequences:
            raise UsageError(f"there is no sequence {seq}")
        return self._sequences[seq]

    def _part(self, work: Work) -> _Part:
        row = self._sequences.get(work.seq)
        if row is None:
            row = self._sequences[work.seq] = _Sequence(self.model.new_cache())
        single = row.decoding and len(work.tokens) == 1 and not work.prompt
        return _Part(work, row, prompt=not single)

    def _pass(
        self, parts: Sequence[_Part], step: FeedStep | None, override: RouteOverride | None
    ) -> list[Output | Exception]:
        """What the model makes of each part."""
        forwards = [partial(self._forward, part, override, len(parts) == 1) for part in parts]
        if len(parts) > 1 and step is not None and self.feed is not None:
            return together(step, forwards)
        return [_outcome(forward, step) for forward in forwards]

    def _forward(
        self, part: _Part, override: RouteOverride | None, alone: bool, source: Source | None
    ) -> Output:
        row, tokens = part.row, part.work.tokens
        if row.halfway:
            raise UsageError("an error ended this sequence in the middle of a step", "", "drop it")
        row.halfway = True
        forecast = None
        if self._has_lookahead and source is not None and source.wants(LOOKAHEAD):
            hand = self._forecast_prompt if part.prompt else self._forecast_token
            forecast = partial(hand, source)
        cache, steps = row.cache, self.steps if alone and not part.prompt else None
        cache.prompt = max(part.work.prompt, cache.position + len(tokens)) if part.prompt else 0
        out: Output = (steps or self.model)(
            self._to_device(np.array([tokens])),
            cache=cache,
            source=source,
            on_lookahead=forecast,
            replay=partial(self._overridden, override, part.work.seq) if override else None,
            last_only=True,
        )
        return out

    def _answer(self, part: _Part, out: Output, record: bool) -> int | None:
        row, work = part.row, part.work
        row.logits_V = out.logits[0, -1]
        row.take(part)
        if record:
            row.record.add(out.routing)
        return self._sample(row, work) if work.last else None

    def _overridden(self, override: RouteOverride, seq: int, layer: int) -> tuple[Tensor, Tensor]:
        ids_TK, weights_TK = override(seq, layer)
        return self._to_device(ids_TK), self._to_device(weights_TK)

    def _to_device(self, values: np.ndarray) -> Tensor:
        """To a GPU from page-locked memory: the host waits for copies from other memory."""
        tensor = torch.from_numpy(values)
        if self.model.device.type == "cuda":
            return tensor.pin_memory().to(self.model.device, non_blocking=True)
        return tensor.to(self.model.device)

    def _forecast_token(self, source: Source, probs_TJLE: Tensor) -> None:
        if probs_TJLE.device.type == "cuda":
            host_JLE = torch.empty(probs_TJLE.shape[1:], pin_memory=True)
            host_JLE.copy_(probs_TJLE[0], non_blocking=True)
            # Read with the next layer's ids: what was queued before them is finished then.
            source.foresee(LOOKAHEAD, host_JLE.numpy)
        else:
            source.foresee(LOOKAHEAD, probs_TJLE[0].cpu().numpy())

    def _forecast_prompt(self, source: Source, probs_TJLE: Tensor) -> None:
        """Sum over the tokens that have an expert among their top-k: the others do not need it."""
        now_TLE = probs_TJLE[:, 0]
        best_TLK, ids_TLK = now_TLE.topk(self.model.config.num_experts_per_tok, dim=-1)
        use_TLE = torch.zeros_like(now_TLE).scatter_(-1, ids_TLK, best_TLK)
        source.foresee(LOOKAHEAD, use_TLE.sum(0).cpu().numpy())

    def _sample(self, row: _Sequence, work: Work) -> int:
        sampling = work.sampling
        uniform = 0.0 if sampling.greedy else row.random.random()
        logits_V = adjust(row.logits_V, row.ids, row.prompt_tokens, sampling)
        if work.bias is not None:
            logits_V = logits_V + self._to_device(work.bias)
        if work.mask is not None:
            mask_V = self._to_device(np.ascontiguousarray(work.mask))
            logits_V = logits_V.where(mask_V, -torch.inf)
        token, sound = draw(logits_V, sampling, uniform), row.logits_V.isfinite().all()
        if logits_V is not row.logits_V:  # they may allow no token
            sound = sound & (logits_V.max() > -torch.inf)
        return int(torch.where(sound, token, -1))


@dataclass
class _Sequence:
    """What one sequence keeps between two passes."""

    cache: Cache
    ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    random: random.Random = field(default_factory=random.Random)
    logits_V: Tensor = field(default_factory=lambda: torch.empty(0))
    decoding: bool = False  # its prompt is over
    whole: int = 0  # tokens of the prompt's pieces from the first on that were whole
    halfway: bool = False  # a pass has begun and not ended: its tokens are in some caches only
    record: RoutingRecord = field(default_factory=lambda: RoutingRecord())

    def take(self, part: _Part) -> None:
        """The cache has the tokens of a pass."""
        tokens, sampling = part.work.tokens, part.work.sampling
        if part.prompt and len(tokens) == PIECE and self.whole == len(self.ids):
            self.whole += PIECE
        self.ids += tokens
        self.decoding = part.work.last
        if part.prompt and part.work.last:  # a seed's draws start here
            self.prompt_tokens, self.random = len(self.ids), random.Random(sampling.seed)

    def forked(self) -> _Sequence:
        if self.halfway:
            raise UsageError("an error ended this sequence in the middle of a step", "", "drop it")
        return _Sequence(
            cache=self.cache.copied(),
            ids=[*self.ids],
            prompt_tokens=self.prompt_tokens,
            random=deepcopy(self.random),
            logits_V=self.logits_V,
            decoding=self.decoding,
            whole=self.whole,
        )


@dataclass
class _Part:
    """What a pass does for one sequence. prompt: its tokens are of a prompt."""

    work: Work
    row: _Sequence
    prompt: bool


def _tell(
    step: FeedStep | None, parts: Sequence[_Part], outs: Sequence[Output | Exception]
) -> None:
    """Tell a step what went through, and what a prompt was routed to."""
    for part, out in zip(parts, outs, strict=True):
        if step is not None and isinstance(out, Output):
            step.done(part.work, _ids_TLK(out.routing) if part.prompt else None)


def _ended(parts: Sequence[_Part], outs: Sequence[Output | Exception]) -> None:
    """The pass has ended for all: nothing can be raised any more that would repeat its tokens."""
    for part, out in zip(parts, outs, strict=True):
        part.row.halfway = isinstance(out, Exception)


def _outcome(
    forward: Callable[[Source | None], Output], source: Source | None
) -> Output | Exception:
    """What `together` makes of one forward."""
    try:
        return forward(source)
    except Exception as error:
        return error


def _ids_TLK(routing: list[Routing]) -> np.ndarray:
    return torch.stack([r.ids_TK for r in routing], dim=1).cpu().numpy()


class RoutingRecord:
    """The routing of many calls, compacted on the way."""

    def __init__(self) -> None:
        self._done: list[tuple[np.ndarray, np.ndarray]] = []
        self._calls: list[list[Routing]] = []

    def add(self, routing: list[Routing]) -> None:
        self._calls.append([r._replace(probs_TE=r.ids_TK) for r in routing])  # drops the wide part
        if len(self._calls) >= _COMPACT_EVERY:
            self._compact()

    def take(self) -> list[tuple[np.ndarray, np.ndarray]]:
        self._compact()
        done, self._done = self._done, []
        return done

    def _compact(self) -> None:
        if not self._calls:
            return
        layers = list(zip(*self._calls, strict=True))
        ids = torch.stack([torch.cat([r.ids_TK for r in layer]) for layer in layers], dim=1)
        weights = torch.stack([torch.cat([r.weights_TK for r in layer]) for layer in layers], dim=1)
        self._done.append((ids.cpu().numpy(), weights.float().cpu().numpy()))
        self._calls.clear()
