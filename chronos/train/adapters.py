"""Adapters in a stage: opening a model that is frozen, resident or streamed, native or a guest.

Which routed experts get an adapter is known once the stage's batches are: those that their tokens
are routed to often enough. Not covered: what an adapter computes (the backends) and its file's
format (`common.training.lora`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chronos.backends.protocol import Adapter, Backend, Scores
from chronos.common.budget import parse_budget
from chronos.common.data import Batch
from chronos.common.disk.header import read_header
from chronos.common.disk.io import FileIO
from chronos.common.disk.tensors import locate_tensors
from chronos.common.errors import ConfigError
from chronos.common.experts.feed import Feed, FeedOptions, open_feed
from chronos.common.experts.passes import UpAndDown
from chronos.common.layout import is_packed, open_layout
from chronos.common.layout.folder import slots_within
from chronos.common.layout.source import open_source
from chronos.common.model.config import LossWeights, ModelConfig
from chronos.common.model.guest import GuestConfig
from chronos.common.model.weights import Key
from chronos.common.training.lora import EXPERTS, LoraRecipe
from chronos.common.training.objectives import Batches
from chronos.run.opening import experts_of

RESIDENT = "resident"
MERGED = "chronos.merged"  # of a packed model's dense part: digests of the adapters it has taken in
_COUNTED = 8  # updates whose routing says which experts are frequent


@dataclass
class Frozen:
    """A model whose weights stay as they are. model: to be called. bare, feed: what a session
    takes; no feed where the model holds its experts. layers: those with experts. nbytes: of what
    stays as it is, as stored: the `dense` part, and the `experts` that are in memory at once.
    adapter: what it was given."""

    model: Any
    bare: Any
    feed: Feed | None
    fingerprint: str
    layers: tuple[int, ...]
    nbytes: Mapping[str, int]
    adapter: Adapter | None = None

    def session(self, backend: Backend) -> Any:
        """Sequences on it, with the adapters that it has by then."""
        return backend.session(self.bare, self.feed)

    def close(self) -> None:
        if self.feed is not None:
            self.feed.close()

    def attach(self, backend: Backend, recipe: LoraRecipe, seed: int, batches: Batches) -> Adapter:
        """Put adapters beside it, as the recipe says. Raises UsageError."""
        experts: list[Key] = []
        if EXPERTS in recipe.targets:
            experts = self._frequent(backend, batches, recipe.min_picks)
        self.adapter = backend.attach(self.model, recipe, seed=seed, experts=experts)
        return self.adapter

    def score(self, backend: Backend, batch: Batch, temperature: float = 1.0) -> Scores:
        """What the model says of a batch without the adapter that it has by then."""
        with nullcontext() if self.adapter is None else self.adapter.off():
            return backend.score(self.model, batch, temperature)

    def _frequent(self, backend: Backend, batches: Batches, least: int) -> list[Key]:
        picks: dict[Key, int] = {}
        for number in range(_COUNTED):
            for batch in batches.at(number):
                ids_BTLK = backend.score(self.model, batch).ids_BTLK[batch.segments_BT >= 0]
                for place, layer in enumerate(self.layers):
                    used, counts = np.unique(ids_BTLK[:, place], return_counts=True)
                    for expert, count in zip(used.tolist(), counts.tolist(), strict=True):
                        picks[layer, expert] = picks.get((layer, expert), 0) + count
        return [key for key, count in sorted(picks.items()) if count >= least]


def identity(folder: Path) -> str:
    """Which model a folder holds, by its weights. A packed one's experts know what it was packed
    from, and its dense part what was merged into it since."""
    fingerprint = open_source(folder, FileIO()).fingerprint
    dense = folder / "model.safetensors"
    merged = is_packed(folder) and dense.exists()
    return fingerprint + (read_header(dense).metadata.get(MERGED, "") if merged else "")


def open_frozen(
    folder: Path,
    config: ModelConfig | GuestConfig,
    backend: Backend,
    device: str | None,
    recipe: LoraRecipe,
    budget: str,
) -> Frozen:
    """Open a model to train adapters of. budget: what its routed experts may take, as
    `chronos.load` takes it; "" or "resident": all of them, in the model.

    Raises UsageError, ConfigError and BudgetError before anything is allocated.
    """
    fingerprint = identity(folder)
    if budget in ("", RESIDENT):
        if EXPERTS in recipe.targets and isinstance(config, GuestConfig):
            raise ConfigError(
                "routed experts of this model can be adapted only where they are streamed",
                "lora.targets",
                "pack the model and give it a budget: --budget all, or less",
            )
        model = backend.load(folder, device=device, resident=True)
        every = experts_of(folder, config)["expert_bytes"]
        nbytes, layers = _held(folder, every), tuple(range(config.num_hidden_layers))
        return Frozen(model, model, None, fingerprint, layers, nbytes)
    if not is_packed(folder):
        raise ConfigError(
            "experts are streamed from a packed model only",
            str(folder),
            f"chronos pack {folder} -o DST, or leave out --budget",
        )
    layout = open_layout(folder)
    capacity = parse_budget(budget, layout.total_bytes)
    slots_within(layout, capacity, config.num_experts_per_tok)
    order = UpAndDown(layout.moe_layers, (layout.num_layers, layout.num_experts))
    bare = backend.load(folder, device=device, resident=False, layout=layout)
    options = FeedOptions(config.num_experts_per_tok, device=bare.device)
    feed = open_feed(backend.open_arena, layout, capacity, options, policy=order)
    nbytes = _held(folder, min(capacity, layout.total_bytes))
    return Frozen(backend.streamed(bare, feed), bare, feed, fingerprint, layout.moe_layers, nbytes)


def _held(folder: Path, experts: int) -> dict[str, int]:
    whole = sum(entry.nbytes for _, entry in locate_tensors(folder).values())
    return {"dense": whole if is_packed(folder) else whole - experts, "experts": experts}


def loss_weights(config: ModelConfig | GuestConfig, wanted: LossWeights) -> LossWeights:
    """The terms of a frozen model's routing: none of a guest's, whose gates show no probabilities
    of all experts."""
    if isinstance(config, ModelConfig):
        return wanted
    return LossWeights(**dict.fromkeys(vars(wanted), 0.0))
