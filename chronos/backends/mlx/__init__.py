"""The MLX backend: Apple GPUs and CPUs. Satisfies `chronos.backends.protocol.Backend`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from chronos.backends.mlx.checkpoint import (
    Named,
    fill,
    load_model,
    named,
    save_model,
    tensor_at,
    to_bytes,
)
from chronos.backends.mlx.model import Model

# Here and not in `session`: a first import later would bind the module's name over the function's.
from chronos.backends.mlx.session import Session
from chronos.backends.protocol import Observed, Scores
from chronos.common.errors import MissingBackendError, UsageError
from chronos.common.model.guest import GuestConfig, read_config

if TYPE_CHECKING:
    from chronos.backends.mlx.arena import Arena
    from chronos.backends.mlx.lora import Adapter
    from chronos.backends.mlx.parallel import Processes
    from chronos.backends.mlx.streamed import Streamed
    from chronos.backends.mlx.train import TrainStep
    from chronos.common.data import Batch
    from chronos.common.disk.header import TensorEntry
    from chronos.common.experts.feed import Feed, FeedOptions
    from chronos.common.layout import Layout
    from chronos.common.model.config import ModelConfig
    from chronos.common.model.weights import Key
    from chronos.common.training.lora import LoraRecipe
    from chronos.common.training.recipe import OptimizerRecipe

name = "mlx"


def devices() -> Iterable[str]:
    """Usable device names, best first."""
    return [*(["gpu"] if mx.metal.is_available() else []), "cpu"]


def set_threads(count: int | None) -> int | None:
    """None: MLX has no number of threads to set, on a CPU it takes what its library takes."""
    return None


def pick_device(device: str | None) -> mx.Device:
    """The named device, else the GPU where there is one, else the CPU; it becomes MLX's default.
    Raises for what is not there."""
    usable = list(devices())
    if device is None:
        device = usable[0]
    if device not in ("cpu", "gpu"):
        raise UsageError(f"unknown device {device!r}", "--device", "try cpu or gpu")
    if device not in usable:
        raise MissingBackendError(
            f"device {device!r} cannot be used", f"MLX sees {usable}", "see chronos doctor"
        )
    mx.set_default_device(mx.Device(getattr(mx, device)))
    return mx.default_device()


def build(
    config: ModelConfig,
    *,
    seed: int,
    device: str | None = None,
    weights: Iterable[tuple[TensorEntry, memoryview]] | None = None,
) -> Model:
    """A model with its routed experts, in float32, to be trained. weights: its first ones, by name;
    None: random ones. Where they lack the LookaheadRouter, so does the model."""
    pick_device(device)
    model = Model(config)
    return model.initialize(seed) if weights is None else fill(model, weights)


def load(
    folder: Path,
    *,
    device: str | None = None,
    resident: bool = True,
    dense: Iterable[tuple[TensorEntry, memoryview]] | None = None,
    layout: Layout | None = None,
) -> Any:
    """The model of a folder, native or a guest; without `resident` its experts stay on disk.

    dense: the tensors of its dense part, where they are being read already. layout: its packed
    experts, where they are opened already.
    """
    where = pick_device(device)
    if isinstance(read_config(folder), GuestConfig):
        from chronos.backends.mlx.guest.model import load_guest

        return load_guest(folder, where, resident, dense, layout)
    return load_model(folder, where, resident, dense, layout)


def save(model: Any, folder: Path) -> None:
    """Write an unpacked model folder."""
    save_model(model, folder)


def tensors(model: Any) -> Iterator[Named]:
    """(name, dtype, shape, bytes) of every parameter, in float32, under its name on disk."""
    for key, place in named(model.parameters()):
        yield to_bytes(key, tensor_at(place), mx.float32)


def forward(
    model: Any,
    ids_BT: np.ndarray,
    *,
    segments_BT: np.ndarray | None = None,
    cache: Any = None,
    source: Any = None,
) -> Observed:
    """One pass in NumPy terms, for evaluation and tests; `cache` comes from `model.new_cache`."""
    out = model.eval()(
        mx.array(ids_BT),
        cache=cache,
        segments_BT=None if segments_BT is None else mx.array(segments_BT),
        source=source,
        want_lookahead=model.lookahead is not None,
    )
    return Observed(
        _numpy(out.logits),
        np.stack([np.array(r.ids_TK, np.int64) for r in out.routing]),
        np.stack([_numpy(r.weights_TK) for r in out.routing]),
        np.stack([_numpy(r.probs_TE) for r in out.routing]),
        None if out.lookahead is None else _numpy(out.lookahead),
    )


def open_arena(layout: Layout, slots: int, options: FeedOptions) -> Arena:
    """Memory for experts; see `Arena`."""
    from chronos.backends.mlx.arena import Arena

    return Arena(layout, slots, options)


def session(model: Any, feed: Feed | None = None) -> Session:
    """Sequences on a model, with their experts from `feed` (None: the model's own)."""
    return Session(model, feed)


def train_step(model: Any, recipe: OptimizerRecipe, adapter: Adapter | None = None) -> TrainStep:
    """Losses, gradients and optimizer of one model, or of an adapter beside it."""
    from chronos.backends.mlx.train import TrainStep

    return TrainStep(model, recipe, adapter)


def check_recipe(recipe: OptimizerRecipe) -> None:
    """Raises UsageError or MissingBackendError for what cannot be trained with here."""
    from chronos.backends.mlx import optimizers

    optimizers.check(recipe)


def processes() -> Processes:
    """This process among those that share its updates."""
    from chronos.backends.mlx.parallel import Processes

    return Processes()


def score(model: Any, batch: Batch, temperature: float = 1.0, *, replay: bool = False) -> Scores:
    """What references and old policies think of a batch. replay: with the experts in its array
    `picks` [B, T, L, K]."""
    from chronos.backends.mlx import train

    return train.score(model, batch, temperature, replay=replay)


def anchor(model: Any) -> None:
    """Keep a frozen copy of every gate, which losses compare the routers with."""
    from chronos.backends.mlx import train

    train.anchor(model)


def streamed(model: Any, feed: Feed) -> Streamed:
    """A model without its experts, to be called as one that has them."""
    from chronos.backends.mlx.streamed import Streamed

    return Streamed(model, feed)


def attach(
    model: Any, recipe: LoraRecipe, *, seed: int = 0, experts: Collection[Key] = ()
) -> Adapter:
    """Freeze a model and put adapters beside it. experts: the routed ones that get one."""
    from chronos.backends.mlx import lora

    return lora.attach(model, recipe, seed=seed, experts=experts)


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
