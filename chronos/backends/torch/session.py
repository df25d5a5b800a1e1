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

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

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
from chronos.backends.torch.checkpoint import Named, from_bytes, to_bytes
from chronos.backends.torch.fast import graphs
from chronos.backends.torch.model import Cache, Model, Output
from chronos.backends.torch.moe import Routing
from chronos.backends.torch.sampling import adjust, draw
from chronos.common.disk.header import TensorEntry
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Feed, FeedStep, Source
from chronos.common.experts.prefetch import LOOKAHEAD
from chronos.common.text.sampling import Work, check_work

if TYPE_CHECKING:
    from chronos.backends.protocol import RouteOverride


class Session(Sequences):
    """The sequences of one model, by number; one is there from its first work on.

    `steps`, where there are any, run a single token of a sequence alone in fewer launches.
    """

    def __init__(self, model: Model, feed: Feed | None = None) -> None:
        """feed: where routed experts come from; None: the model's own."""
        super().__init__(feed, model.new_cache, _row)
        self.model = model.eval()
        self._has_lookahead = model.lookahead is not None
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
            tell(step, parts, outs, _ids_TLK)
        answers = [
            out if isinstance(out, int | Exception) else self._answer(part, out, record)
            for part, out in zip(parts, outs, strict=True)
        ]
        ended(parts, outs)
        return answers

    def every_logits(self, seq: int) -> np.ndarray:
        """float32 [T, V] of the last pass's tokens, a copy; UsageError where its work did not say
        `every`."""
        row = self._known(seq)
        if row.every_TV is None:
            raise UsageError(f"the logits of sequence {seq}'s last pass were not kept")
        return row.every_TV.float().cpu().numpy().copy()

    def logits(self, seq: int) -> np.ndarray:
        """float32 [V] of the last position; a copy."""
        logits_V: np.ndarray = self._known(seq).logits_V.float().cpu().numpy()
        return logits_V.copy()

    @torch.inference_mode()
    def keep(self, seq: int, tokens: int) -> int:
        return super().keep(seq, tokens)

    @torch.inference_mode()
    def fork(self, seq: int, new: int) -> None:
        super().fork(seq, new)

    def save(self, seq: int) -> list[Named] | None:
        """What the caches of a sequence hold, as (name, dtype, shape, bytes), valid until its next
        pass; None where they hold what only their library knows."""
        arrays = self._arrays(seq)
        if arrays is None:
            return None
        return [to_bytes(name, x, x.dtype) for name, x in arrays.items()]

    @torch.inference_mode()
    def restore(
        self, new: int, ids: Sequence[int], tensors: Iterable[tuple[TensorEntry, memoryview]]
    ) -> None:
        """Make sequence `new` of whole pieces of a prompt and what `save` gave behind them. Raises
        ShapeMismatch for what does not fit; there is no such sequence then."""
        found = {entry.name: from_bytes(data, entry.dtype, entry.shape) for entry, data in tensors}
        device = self.model.device
        self._restore(new, ids, {name: x.to(device, copy=True) for name, x in found.items()})

    def _pass(
        self, parts: Sequence[Part], step: FeedStep | None, override: RouteOverride | None
    ) -> list[Output | Exception | int]:
        """What the model makes of each part; AGAIN where that is not over."""
        forwards = [partial(self._forward, part, override, len(parts) == 1) for part in parts]
        if len(parts) > 1 or any(part.work.seq in self._resting for part in parts):
            return self._together(step, parts, forwards)
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
        cache, steps = row.cache, self.steps if alone and not part.prompt else None
        cache.prompt = max(part.work.prompt, cache.position + len(tokens)) if part.prompt else 0
        out: Output = (steps or self.model)(
            self._to_device(np.array([tokens])),
            cache=cache,
            source=source,
            on_lookahead=forecast,
            replay=partial(self._overridden, override, part.work.seq) if override else None,
            last_only=not part.work.every,
        )
        return out

    def _answer(self, part: Part, out: Output, record: bool) -> int | None:
        row, work = part.row, part.work
        row.logits_V, row.every_TV = out.logits[0, -1], out.logits[0] if work.every else None
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

    def _sample(self, row: Row, work: Work) -> int:
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


def _row(cache: Cache) -> Row:
    return Row(cache, torch.empty(0), RoutingRecord(_joined))


def _ids_TLK(routing: list[Routing]) -> np.ndarray:
    return torch.stack([r.ids_TK for r in routing], dim=1).cpu().numpy()


def _joined(calls: list[list[Routing]]) -> Recorded:
    layers = list(zip(*calls, strict=True))
    ids = torch.stack([torch.cat([r.ids_TK for r in layer]) for layer in layers], dim=1)
    weights = torch.stack([torch.cat([r.weights_TK for r in layer]) for layer in layers], dim=1)
    return ids.cpu().numpy(), weights.float().cpu().numpy()
