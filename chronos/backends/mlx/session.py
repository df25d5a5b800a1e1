"""Sequences on one model: prompts in pieces, single tokens, sampling on the device.

A pass does something for one or more sequences. Each has its own cache, draws and position and is
computed as it would be alone; only reads of experts are shared (`together`). A prompt goes through
the model in pieces; within one, each needed expert is streamed once for all its tokens. The
resident model takes the same pieces, so streaming cannot change a bit of the logits. A token costs
one copy to the host: its id, or -1 where there is none. Draws come from
Python's generator, so a seed means the same draws on every backend. A decoded token is evaluated
once when resident, and once more per layer when streamed; forecasts ride along.

Shape legend: T tokens, V vocabulary, L layers, K top-k, E experts, J lookahead steps + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from chronos.backends.mlx.checkpoint import Named, from_bytes, to_bytes
from chronos.backends.mlx.model import Cache, Model, Output
from chronos.backends.mlx.moe import Routing
from chronos.backends.mlx.sampling import adjust, draw
from chronos.backends.sequences import (
    Part,
    Recorded,
    RoutingRecord,
    Row,
    Sequences,
    ended,
    outcome,
    tell,
)
from chronos.common.disk.header import TensorEntry
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Feed, FeedStep, Source
from chronos.common.experts.prefetch import LOOKAHEAD
from chronos.common.text.sampling import Work, check_work

if TYPE_CHECKING:
    from chronos.backends.protocol import RouteOverride


class Session(Sequences):
    """The sequences of one model, by number; one is there from its first work on."""

    def __init__(self, model: Model, feed: Feed | None = None) -> None:
        """feed: where routed experts come from; None: the model's own."""
        super().__init__(feed, model.new_cache, _row)
        self.model = model.eval()
        self._has_lookahead = model.lookahead is not None

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
            # Here, because the last layer's experts are in use until the answer is evaluated.
            answers = [
                out if isinstance(out, int | Exception) else self._answer(part, out, record)
                for part, out in zip(parts, outs, strict=True)
            ]
            tell(step, parts, outs, _ids_TLK)
        ended(parts, outs)
        if any(part.prompt and part.work.last for part in parts):
            mx.clear_cache()  # buffers of prompts' activations, which no single token can reuse
        return answers

    def every_logits(self, seq: int) -> np.ndarray:
        """float32 [T, V] of the last pass's tokens, a copy; UsageError where its work did not say
        `every`."""
        row = self._known(seq)
        if row.every_TV is None:
            raise UsageError(f"the logits of sequence {seq}'s last pass were not kept")
        return np.array(row.every_TV.astype(mx.float32))

    def logits(self, seq: int) -> np.ndarray:
        """float32 [V] of the last position; a copy."""
        return np.array(self._known(seq).logits_V.astype(mx.float32))

    def save(self, seq: int) -> list[Named] | None:
        """What the caches of a sequence hold, as (name, dtype, shape, bytes), valid until its next
        pass; None where they hold what only their library knows."""
        arrays = self._arrays(seq)
        if arrays is None:
            return None
        return [to_bytes(name, x, x.dtype) for name, x in arrays.items()]

    def restore(
        self, new: int, ids: Sequence[int], tensors: Iterable[tuple[TensorEntry, memoryview]]
    ) -> None:
        """Make sequence `new` of whole pieces of a prompt and what `save` gave behind them. Raises
        ShapeMismatch for what does not fit; there is no such sequence then."""
        found = {entry.name: from_bytes(data, entry.dtype, entry.shape) for entry, data in tensors}
        self._restore(new, ids, found)

    def _pass(
        self, parts: Sequence[Part], step: FeedStep | None, override: RouteOverride | None
    ) -> list[Output | Exception | int]:
        """What the model makes of each part; AGAIN where that is not over."""
        forwards = [partial(self._forward, part, override, len(parts) == 1) for part in parts]
        several = len(parts) > 1 or any(part.work.seq in self._resting for part in parts)
        if several and step is not None and self.feed is not None:
            return self._together(step, parts, forwards, self.feed.room)
        return [outcome(forward, step) for forward in forwards]

    def _forward(
        self, part: Part, override: RouteOverride | None, alone: bool, source: Source | None
    ) -> Output:
        row, tokens = part.row, part.work.tokens
        row.check_sound()
        row.halfway = True
        forecast = None
        if self._has_lookahead and source is not None and source.wants(LOOKAHEAD):
            hand = self._forecast_prompt if part.prompt else self._forecast_token
            forecast = partial(hand, source)
        cache = row.cache
        cache.prompt = max(part.work.prompt, cache.position + len(tokens)) if part.prompt else 0
        out: Output = self.model(
            mx.array([tokens]),
            cache=cache,
            source=source,
            on_lookahead=forecast,
            replay=partial(self._overridden, override, part.work.seq) if override else None,
            last_only=not part.work.every,
        )
        if not (alone and part.work.last):  # what it holds is not its own behind this pass
            mx.eval(out.logits)
        return out

    def _answer(self, part: Part, out: Output, record: bool) -> int | None:
        row, work = part.row, part.work
        row.logits_V, row.every_TV = out.logits[0, -1], out.logits[0] if work.every else None
        row.take(part)
        if record:
            row.record.add(out.routing)
        return self._sample(row, work) if work.last else None

    def _overridden(
        self, override: RouteOverride, seq: int, layer: int
    ) -> tuple[mx.array, mx.array]:
        ids_TK, weights_TK = override(seq, layer)
        return mx.array(ids_TK.astype(np.uint32)), mx.array(weights_TK)

    def _forecast_token(self, source: Source, probs_TJLE: mx.array) -> None:
        """Read with the next layer's ids: evaluated with them, it costs no wait of its own."""
        mx.async_eval(probs_TJLE)
        source.foresee(LOOKAHEAD, lambda: np.array(probs_TJLE[0]))

    def _forecast_prompt(self, source: Source, probs_TJLE: mx.array) -> None:
        """Sum over the tokens that have an expert among their top-k: the others do not need it."""
        now_TLE = probs_TJLE[:, 0]
        ids_TLK = mx.argsort(-now_TLE, axis=-1)[..., : self.model.config.num_experts_per_tok]
        best_TLK = mx.take_along_axis(now_TLE, ids_TLK, axis=-1)
        use_TLE = mx.put_along_axis(mx.zeros_like(now_TLE), ids_TLK, best_TLK, axis=-1)
        source.foresee(LOOKAHEAD, np.array(use_TLE.sum(0)))

    def _sample(self, row: Row, work: Work) -> int:
        sampling = work.sampling
        uniform = 0.0 if sampling.greedy else row.random.random()
        logits_V = adjust(row.logits_V, row.ids, row.prompt_tokens, sampling)
        if work.bias is not None:
            logits_V = logits_V + mx.array(work.bias)
        if work.mask is not None:
            mask_V = mx.array(np.ascontiguousarray(work.mask))
            logits_V = mx.where(mask_V, logits_V, -mx.inf)
        token, sound = draw(logits_V, sampling, uniform), mx.isfinite(row.logits_V).all()
        if logits_V is not row.logits_V:  # they may allow no token
            sound = sound & (logits_V.max() > -mx.inf)
        token = mx.where(sound, token.astype(mx.int32), -1)
        mx.eval(token, row.logits_V)
        return int(token)


def _row(cache: Cache) -> Row:
    return Row(cache, mx.zeros((0,)), RoutingRecord(_joined))


def _ids_TLK(routing: list[Routing]) -> np.ndarray:
    return np.array(mx.stack([r.ids_TK for r in routing], axis=1), np.int64)


def _joined(calls: list[list[Routing]]) -> Recorded:
    layers = list(zip(*calls, strict=True))
    ids = mx.stack([mx.concatenate([r.ids_TK for r in layer]) for layer in layers], axis=1)
    weights = mx.stack([mx.concatenate([r.weights_TK for r in layer]) for layer in layers], axis=1)
    known = np.array(weights.astype(mx.float32)) if weights.size else None
    return np.array(ids, np.int64), known
