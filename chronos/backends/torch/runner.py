"""One sequence on one model: prefill, decode, sampling on the device, forecasts into prefetch.

A prompt runs in chunks; within a chunk the model goes layer by layer and streams each needed expert
once for all its tokens. The resident model takes the same chunks, so streaming cannot change a bit
of the logits. A token costs one copy to the host: its id, or -1 where the logits hold a NaN or an
infinity. Draws come from Python's generator, so a seed means the same draws on every backend.
Not covered: several sequences at once.

Shape legend: T tokens, V vocabulary, L layers, K top-k, E experts, J lookahead steps + 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from chronos.backends.torch.fast import graphs
from chronos.backends.torch.model import Model, Output
from chronos.backends.torch.moe import Routing
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Feed, Source, Step
from chronos.common.experts.prefetch import LOOKAHEAD
from chronos.common.text.sampling import SamplingParams, Work, adjust_logits

PREFILL_CHUNK = 512
_SEQ = 0  # the one sequence's number
# Recorded routing is compacted after this many calls: a tensor per layer and token costs 300 bytes,
# which over a long generation would outgrow the experts' budget.
_COMPACT_EVERY = 32
# (ids int64, weights float32) [T, K] of a layer, in place of what its gate would choose.
Replay = Callable[[int], tuple[np.ndarray, np.ndarray]]


class Runner:
    """Owns the key/value cache of one sequence; after an error in a step it has to be reset.

    `recording` keeps the routing for `routing()`; `replay`, where set, decides the routing instead
    of the gates. `steps`, where there are any, run single tokens in fewer launches.
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
        exact = feed is None or feed.exact
        self.steps = graphs.Steps(model) if graphs.usable(model, exact) else None
        self.reset()

    def reset(self) -> None:
        """Forget the sequence; the experts stay where they are."""
        with torch.inference_mode():
            self._cache = self.model.new_cache()
        if self.feed is not None:
            self.feed.drop(_SEQ)
        self._logits_V = torch.empty(0)
        self._random, self._halfway = random.Random(), False
        self._ids: list[int] = []
        self._prompt_tokens = 0

    @property
    def position(self) -> int:
        return self._cache.position

    @torch.inference_mode()
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
                if step is not None:
                    step.routed(_ids_TLK(routing))
        self._prompt_tokens = len(self._ids)
        return self._sample(sampling)

    @torch.inference_mode()
    def decode(self, token: int, sampling: SamplingParams) -> int:
        """Append one token and sample the next."""
        self._cache.prompt = 0
        with self._step([token], sampling) as step:
            wants = self._has_lookahead and step is not None and step.wants(LOOKAHEAD)
            forecast = partial(self._forecast_token, step) if wants else None
            self._forward([token], step, forecast, run=self.steps)
        return self._sample(sampling)

    def logits(self) -> np.ndarray:
        return self._logits_V.float().cpu().numpy().copy()

    def routing(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids_TLK, weights_TLK) recorded since the last call, in order of the tokens."""
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
        on_lookahead: Callable[[Tensor], None] | None = None,
        *,
        run: Callable[..., Output] | None = None,
    ) -> list[Routing]:
        if self._halfway:
            raise UsageError("an error ended this sequence in the middle of a step", "", "reset it")
        self._halfway = True  # until every layer has the tokens
        ids_1T = self._to_device(np.array([tokens]))
        out = (run or self.model)(
            ids_1T,
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

    def _replayed(self, layer: int) -> tuple[Tensor, Tensor]:
        assert self.replay is not None
        ids_TK, weights_TK = self.replay(layer)
        return self._to_device(ids_TK), self._to_device(weights_TK)

    def _to_device(self, values: np.ndarray) -> Tensor:
        """To a GPU from page-locked memory: the host waits for copies from other memory."""
        tensor = torch.from_numpy(values)
        if self.model.device.type == "cuda":
            return tensor.pin_memory().to(self.model.device, non_blocking=True)
        return tensor.to(self.model.device)

    def _forecast_token(self, step: Step, probs_TJLE: Tensor) -> None:
        if probs_TJLE.device.type == "cuda":
            host_JLE = torch.empty(probs_TJLE.shape[1:], pin_memory=True)
            host_JLE.copy_(probs_TJLE[0], non_blocking=True)
            # Read with the next layer's ids: what was queued before them is finished then.
            step.foresee(LOOKAHEAD, host_JLE.numpy)
        else:
            step.foresee(LOOKAHEAD, probs_TJLE[0].cpu().numpy())

    def _forecast_prompt(self, step: Step, probs_TJLE: Tensor) -> None:
        """Sum over the tokens that have an expert among their top-k: the others do not need it."""
        now_TLE = probs_TJLE[:, 0]
        best_TLK, ids_TLK = now_TLE.topk(self.model.config.num_experts_per_tok, dim=-1)
        use_TLE = torch.zeros_like(now_TLE).scatter_(-1, ids_TLK, best_TLK)
        step.foresee(LOOKAHEAD, use_TLE.sum(0).cpu().numpy())

    def _sample(self, sampling: SamplingParams) -> int:
        uniform = 0.0 if sampling.greedy else self._random.random()
        logits_V = adjust(self._logits_V, self._ids, self._prompt_tokens, sampling)
        token = draw(logits_V, sampling, uniform)
        return int(torch.where(self._logits_V.isfinite().all(), token, -1))


def adjust(
    logits_V: Tensor, ids: Sequence[int], prompt_tokens: int, params: SamplingParams
) -> Tensor:
    """`common.sampling.adjust_logits`, by way of the host; the logits as they are without any."""
    if not params.adjusts:
        return logits_V
    host_V = adjust_logits(logits_V.float().cpu().numpy(), ids, prompt_tokens, params)
    return torch.from_numpy(host_V).to(logits_V.device)


def draw(logits_V: Tensor, params: SamplingParams, uniform: float) -> Tensor:
    """`common.sampling.draw` on the device: the token a uniform number in [0, 1) selects.

    Equal logits at the edge of top-k may be cut in another order. MPS has no float64.
    """
    if params.greedy:
        return logits_V.argmax()
    wide = torch.float32 if logits_V.device.type == "mps" else torch.float64
    p_V = (logits_V.to(wide) / params.temperature).softmax(-1)
    if params.top_k or params.top_p < 1.0:  # sorting costs as much as a small layer
        p_N, ids_N = p_V.topk(min(params.top_k or len(p_V), len(p_V)))
        p_N = p_N / p_N.sum()
        stays_N = (p_N.cumsum(0) - p_N < params.top_p) & (p_N >= params.min_p * p_N[0])
        p_V = torch.zeros_like(p_V).scatter_(0, ids_N, p_N * stays_N)
    else:
        p_V = p_V * (p_V >= params.min_p * p_V.max())
    mass_V = p_V.cumsum(0)
    return torch.searchsorted(mass_V, uniform * mass_V[-1:], right=True)[0]


def _ids_TLK(routing: list[Routing]) -> np.ndarray:
    return torch.stack([r.ids_TK for r in routing], dim=1).cpu().numpy()


class _RoutingRecord:
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
