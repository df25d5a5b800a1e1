"""One sequence on one model: prefill, decode, sampling on the device, forecasts into prefetch.

A prompt runs in chunks; within a chunk the model goes layer by layer and streams each needed expert
once for all its tokens. The resident model takes the same chunks, so streaming cannot change a bit
of the logits. A decoded token is evaluated once when resident, and once more per layer when
streamed; forecasts ride along. Draws come from Python's generator, so a seed means the same draws
on every backend. Not covered: several sequences at once.

Shape legend: T tokens, V vocabulary, L layers, K top-k, E experts, J lookahead steps + 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import mlx.core as mx
import numpy as np

from chronos.backends.mlx.model import Model
from chronos.backends.mlx.moe import Routing
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Feed, Source, Step
from chronos.common.experts.prefetch import LOOKAHEAD
from chronos.common.text.sampling import SamplingParams, Work, adjust_logits

PREFILL_CHUNK = 512
_SEQ = 0  # the one sequence's number
# Recorded routing is compacted after this many calls: a small array per layer and token would, over
# a long generation, outgrow the experts' budget.
_COMPACT_EVERY = 32
# (ids int64, weights float32) [T, K] of a layer, in place of what its gate would choose.
Replay = Callable[[int], tuple[np.ndarray, np.ndarray]]


class Runner:
    """Owns the key/value cache of one sequence; after an error in a step it has to be reset.

    `recording` keeps the routing for `routing()`; `replay`, where set, decides the routing instead
    of the gates.
    """

    def __init__(
        self,
        model: Model,
        feed: Feed | None = None,
    ) -> None:
        """feed: where routed experts come from; None: the model's own."""
        self.model, self.feed = model.eval(), feed
        self.recording = False
        self.replay: Replay | None = None
        self._has_lookahead = model.lookahead is not None
        self._record = _RoutingRecord()
        self.reset()

    def reset(self) -> None:
        """Forget the sequence; the experts stay where they are."""
        self._cache = self.model.new_cache()
        if self.feed is not None:
            self.feed.drop(_SEQ)
        self._logits_V = mx.zeros((0,))
        self._random, self._halfway = random.Random(), False
        self._ids: list[int] = []
        self._prompt_tokens = 0

    @property
    def position(self) -> int:
        return self._cache.position

    def prefill(self, tokens: Sequence[int], sampling: SamplingParams, prompt: int = 0) -> int:
        """Process the prompt and sample the first token; a seed's draws start here.

        prompt: tokens of the sequence once its whole prompt is in, where `tokens` are a piece.
        """
        self._random = random.Random(sampling.seed)
        self._cache.prompt = max(prompt, self.position + len(tokens))
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            last = self.position + len(chunk) >= self._cache.prompt
            with self._step(chunk, sampling, last) as step:
                wants = self._has_lookahead and step is not None and step.wants(LOOKAHEAD)
                forecast = partial(self._forecast_prompt, step) if wants else None
                routing = self._forward(chunk, step, forecast)
                mx.eval(self._logits_V)  # the slots of a piece of one token are in use until then
                if step is not None:
                    step.routed(_ids_TLK(routing))
        self._prompt_tokens = len(self._ids)
        token = self._sample(sampling)
        mx.clear_cache()  # buffers of the prompt's activations, which no single token can reuse
        return token

    def decode(self, token: int, sampling: SamplingParams) -> int:
        """Append one token and sample the next."""
        self._cache.prompt = 0
        with self._step([token], sampling) as step:
            wants = self._has_lookahead and step is not None and step.wants(LOOKAHEAD)
            forecast = partial(self._forecast_token, step) if wants else None
            self._forward([token], step, forecast)
            return self._sample(sampling)

    def logits(self) -> np.ndarray:
        return np.array(self._logits_V.astype(mx.float32))

    def routing(self) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """(ids_TLK, weights_TLK) recorded since the last call, in order of the tokens. None: a
        guest's layers do not see their weights."""
        return self._record.take()

    def _step(
        self, tokens: Sequence[int], sampling: SamplingParams, last: bool = True
    ) -> AbstractContextManager[Step | None]:
        if self.feed is None:
            return nullcontext()
        return self.feed.step([Work(_SEQ, tokens, sampling, last)])

    def _forward(
        self,
        tokens: Sequence[int],
        source: Source | None,
        on_lookahead: Callable[[mx.array], None] | None = None,
    ) -> list[Routing]:
        if self._halfway:
            raise UsageError("an error ended this sequence in the middle of a step", "", "reset it")
        self._halfway = True  # until every layer has the tokens
        out = self.model(
            mx.array([tokens]),
            cache=self._cache,
            source=source,
            on_lookahead=on_lookahead,
            replay=self._replayed if self.replay else None,
            last_only=True,
        )
        self._halfway = False
        self._ids += tokens
        self._logits_V = out.logits[0, -1]
        if self.recording:
            self._record.add(out.routing)
        return out.routing

    def _replayed(self, layer: int) -> tuple[mx.array, mx.array]:
        assert self.replay is not None
        ids_TK, weights_TK = self.replay(layer)
        return mx.array(ids_TK.astype(np.uint32)), mx.array(weights_TK)

    def _forecast_token(self, step: Step, probs_TJLE: mx.array) -> None:
        """Read with the next layer's ids: evaluated with them, it costs no wait of its own."""
        mx.async_eval(probs_TJLE)
        step.foresee(LOOKAHEAD, lambda: np.array(probs_TJLE[0]))

    def _forecast_prompt(self, step: Step, probs_TJLE: mx.array) -> None:
        """Sum over the tokens that have an expert among their top-k: the others do not need it."""
        now_TLE = probs_TJLE[:, 0]
        ids_TLK = mx.argsort(-now_TLE, axis=-1)[..., : self.model.config.num_experts_per_tok]
        best_TLK = mx.take_along_axis(now_TLE, ids_TLK, axis=-1)
        use_TLE = mx.put_along_axis(mx.zeros_like(now_TLE), ids_TLK, best_TLK, axis=-1)
        step.foresee(LOOKAHEAD, np.array(use_TLE.sum(0)))

    def _sample(self, sampling: SamplingParams) -> int:
        """The next token, or -1 where the logits hold a NaN or an infinity."""
        uniform = 0.0 if sampling.greedy else self._random.random()
        logits_V = adjust(self._logits_V, self._ids, self._prompt_tokens, sampling)
        token = draw(logits_V, sampling, uniform).astype(mx.int32)
        token = mx.where(mx.isfinite(self._logits_V).all(), token, -1)
        mx.eval(token, self._logits_V)
        return int(token.item())


def adjust(
    logits_V: mx.array, ids: Sequence[int], prompt_tokens: int, params: SamplingParams
) -> mx.array:
    """`common.sampling.adjust_logits`, by way of the host; the logits as they are without any."""
    if not params.adjusts:
        return logits_V
    host_V = np.array(logits_V.astype(mx.float32))
    return mx.array(adjust_logits(host_V, ids, prompt_tokens, params))


def draw(logits_V: mx.array, params: SamplingParams, uniform: float) -> mx.array:
    """`common.sampling.draw` on the device: the token a uniform number in [0, 1) selects.

    Only a CPU has float64.
    """
    if params.greedy:
        return logits_V.argmax()
    wide = mx.float64 if mx.default_device() == mx.cpu else mx.float32
    p_V = mx.softmax(logits_V.astype(wide) / params.temperature, axis=-1)
    if params.top_k or params.top_p < 1.0:  # sorting costs as much as a small layer
        ids_N = mx.argsort(-p_V)[: params.top_k or len(p_V)]
        p_N = p_V[ids_N]
        p_N = p_N / p_N.sum()
        stays_N = (mx.cumsum(p_N) - p_N < params.top_p) & (p_N >= params.min_p * p_N[0])
        p_V = mx.put_along_axis(mx.zeros_like(p_V), ids_N, p_N * stays_N, axis=0)
    else:
        p_V = p_V * (p_V >= params.min_p * p_V.max())
    mass_V = mx.cumsum(p_V)
    return (mass_V <= uniform * mass_V[-1]).sum()


def _ids_TLK(routing: list[Routing]) -> np.ndarray:
    return np.array(mx.stack([r.ids_TK for r in routing], axis=1), np.int64)


class _RoutingRecord:
    """The routing of many calls, compacted on the way."""

    def __init__(self) -> None:
        self._done: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._calls: list[list[Routing]] = []

    def add(self, routing: list[Routing]) -> None:
        self._calls.append([r._replace(probs_TE=r.ids_TK) for r in routing])  # drops the wide part
        if len(self._calls) >= _COMPACT_EVERY:
            self._compact()

    def take(self) -> list[tuple[np.ndarray, np.ndarray | None]]:
        self._compact()
        done, self._done = self._done, []
        return done

    def _compact(self) -> None:
        if not self._calls:
            return
        layers = list(zip(*self._calls, strict=True))
        ids = mx.stack([mx.concatenate([r.ids_TK for r in layer]) for layer in layers], axis=1)
        weights = mx.stack(
            [mx.concatenate([r.weights_TK for r in layer]) for layer in layers], axis=1
        )
        known = np.array(weights.astype(mx.float32)) if weights.size else None
        self._done.append((np.array(ids, np.int64), known))
        self._calls.clear()
