"""What a trial's model is judged by: held-out loss, reads of experts, how its router uses them.

Shape legend: T tokens, L layers, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from chronos.backends.protocol import Backend
from chronos.common.budget import parse_budget, parse_size
from chronos.common.data import Batch
from chronos.common.disk.io import ALIGN, round_up
from chronos.common.errors import BudgetError
from chronos.common.experts.known import KnownAhead, known_ahead
from chronos.common.experts.residency import NOBODY
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import count_parameters
from chronos.common.traces.simulate import simulate, simulate_policy
from chronos.common.traces.trace import RoutingTrace
from chronos.common.training import memory
from chronos.common.training.recipe import Recipe
from chronos.measure.evaluate import record
from chronos.train.loop import Task
from chronos.tune.settings import TuneSettings

_WARMUP = 0.25  # of the recorded tokens: they fill the cache and are not counted


@dataclass(frozen=True)
class Measured:
    """A trial after some of its updates. loss: cross-entropy of what is held out, in nats a token,
    without the weight of any term. expert_bytes_per_token: read at the study's budget. effective,
    use: of the layer that is worst in it, as TuneSettings has them.
    """

    step: int
    loss: float
    expert_bytes_per_token: float
    effective: float
    use: float

    def constraints(self, settings: TuneSettings) -> dict[str, float]:
        """What a router must not become: above 0 where it has. A collapsed one reads little."""
        return {
            "effective_experts": settings.min_effective - self.effective,
            "largest_share": self.use - settings.max_use,
        }


def measure(
    task: Task, backend: Backend, settings: TuneSettings, step: int, valid: Mapping[str, Any]
) -> Measured:
    """Judge the model as it is. valid: the terms of its evaluation (`valid_ce` ...)."""
    config: ModelConfig = task.model.config
    pieces = (ids_T for batch in task.valid for ids_T in _pieces(batch))
    session = backend.session(task.model, None)
    trace = record(session, config, pieces, max_tokens=settings.route_tokens)
    return Measured(
        step,
        float(valid["valid_ce"]),
        expert_bytes_per_token(trace, config, settings.budget),
        float(valid["valid_router/effective_experts_min"]) / config.num_experts,
        float(valid["valid_router/largest_share"]) * config.num_experts_per_tok,
    )


def _pieces(batch: Batch) -> Iterator[list[int]]:
    """The documents' parts of a batch's rows."""
    for ids_T, segments_T in zip(batch.ids_BT, batch.segments_BT, strict=True):
        for number in range(int(segments_T.max()) + 1):
            yield ids_T[segments_T == number].tolist()


def expert_bytes_per_token(trace: RoutingTrace, config: ModelConfig, budget: str) -> float:
    """Bytes of experts that a store of this budget reads a token on recorded routing, from the time
    on at which it is warm.

    Victims are those of the store's own policy: what a model announces is kept until it is used;
    for other models its default ranks as decayed frequency does. What is read ahead in vain is not
    in it. Raises BudgetError.
    """
    nbytes = _record_bytes(config)
    slots, least = _room(config, budget)
    if slots < least:
        raise BudgetError(f"a budget of {budget} holds {slots} experts; a token needs {least}")
    known = None if known_ahead(config) is None else _Announced(config, trace)
    if known is None:
        return nbytes * simulate(trace, slots, "lfu", warmup=_WARMUP).reads_per_token
    return nbytes * simulate_policy(trace, slots, known, warmup=_WARMUP).reads_per_token


def _record_bytes(config: ModelConfig) -> int:
    return round_up(config.expert_parameters * config.dtype_bytes, ALIGN)


def _room(config: ModelConfig, budget: str) -> tuple[int, int]:
    """Experts that a budget holds, and how many a token needs at least."""
    nbytes = _record_bytes(config)
    slots = parse_budget(budget, nbytes * config.num_routed_experts) // nbytes
    return slots, config.least_slots


class _Announced(KnownAhead):
    """Told, as a model tells it, what each layer needs for the token after the one it serves."""

    def __init__(self, config: ModelConfig, trace: RoutingTrace) -> None:
        super().__init__(config)
        self._ids_TLK, self._token, self._tokens = trace.ids_TLK, 0, trace.num_tokens
        self._starts = {int(at) + 1 for at in np.flatnonzero(np.diff(trace.seq_T))}

    def observe(
        self, layer: int, experts: Collection[int], by: Mapping[int, Collection[int]] = NOBODY
    ) -> None:
        super().observe(layer, experts, by)
        after = self._token + 1
        if after < self._tokens and after not in self._starts:
            self.announce(0, layer, self.streamed(layer, self._ids_TLK[after, layer].tolist()))

    def end_token(self) -> None:
        super().end_token()
        self._token += 1
        if self._token in self._starts:
            self.drop(0)


def before(recipe: Recipe[Any], own: Recipe[Any], settings: TuneSettings) -> dict[str, float]:
    """What is known of a trial before anything is allocated: above 0 where it must not be trained.
    own: the study's recipe."""
    most = settings.max_parameters * count_parameters(own.model)
    slots, least = _room(recipe.model, settings.budget)
    found = {
        "parameters": count_parameters(recipe.model) / most - 1,
        "budget": least / max(slots, 1) - 1,
    }
    if settings.max_memory:
        stage, config = recipe.stage, recipe.model
        rows, seq_len = stage.batch_size, stage.seq_len
        takes = memory.of_update(
            config, recipe.optimizer, rows, seq_len, rows * seq_len,
            lookahead=config.lookahead_steps > 0,
        )["total"]  # fmt: skip
        found["memory"] = takes / parse_size(settings.max_memory, "tune.max_memory") - 1
    return found
