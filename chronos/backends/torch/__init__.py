"""The PyTorch backend: CPU, CUDA and MPS. Satisfies `chronos.backends.protocol.Backend`."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chronos.backends.protocol import Observed, Scores
from chronos.backends.torch.checkpoint import Named, fill, load_model, save_model, to_bytes
from chronos.backends.torch.model import Model

# Here and not in `session`: a first import later would bind the module's name over the function's.
from chronos.backends.torch.session import Session
from chronos.common.errors import MissingBackendError, UsageError
from chronos.common.model.guest import GuestConfig, read_config

if TYPE_CHECKING:
    from chronos.backends.torch.arena import Arena
    from chronos.backends.torch.lora import Adapter
    from chronos.backends.torch.parallel import Processes
    from chronos.backends.torch.streamed import Streamed
    from chronos.backends.torch.train import TrainStep
    from chronos.common.data import Batch
    from chronos.common.disk.header import TensorEntry
    from chronos.common.experts.feed import Feed, FeedOptions
    from chronos.common.layout import Layout
    from chronos.common.model.config import ModelConfig
    from chronos.common.model.weights import Key
    from chronos.common.training.lora import LoraRecipe
    from chronos.common.training.recipe import OptimizerRecipe

name = "torch"


def devices() -> Iterable[str]:
    """Usable device names, best first; MPS is used only by name."""
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [*found, "cpu", *(["mps"] if torch.backends.mps.is_available() else [])]


def set_threads(count: int | None) -> int | None:
    """Threads of products on a CPU, from now on and for the process; None leaves their number."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def pick_device(device: str | None) -> torch.device:
    """The named device, else CUDA where there is one, else the CPU. `torchrun` says which of
    several GPUs a process has."""
    if device is None:
        own = os.environ.get("LOCAL_RANK")
        gpu = "cuda" if own is None else f"cuda:{own}"
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}", "--device", "try cpu, cuda or mps") from None
    usable = {d.split(":")[0] for d in devices()}
    if wanted.type not in usable:
        raise MissingBackendError(
            f"device {device!r} cannot be used", f"torch sees {sorted(usable)}", "chronos doctor"
        )
    return wanted


def build(
    config: ModelConfig,
    *,
    seed: int,
    device: str | None = None,
    weights: Iterable[tuple[TensorEntry, memoryview]] | None = None,
) -> Model:
    """A model with its routed experts, in float32, to be trained. weights: its first ones, by name;
    None: random ones. Where they lack the LookaheadRouter, so does the model."""
    model = Model(config)
    model = model.initialize(seed) if weights is None else fill(model, weights)
    return model.to(pick_device(device))


def load(
    folder: Path,
    *,
    device: str | None = None,
    resident: bool = True,
    dense: Iterable[tuple[TensorEntry, memoryview]] | None = None,
    layout: Layout | None = None,
) -> Model:
    """The model of a folder, ready to run; without `resident` its routed experts stay on disk.

    dense: the tensors of its dense part, where they are being read already. layout: its packed
    experts, where they are opened already.
    """
    where = pick_device(device)
    if where.type == "cuda" and hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
        # It makes a plan for every new length of a cache: 3.3 ms a layer and token on an H200.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if isinstance(read_config(folder), GuestConfig):
        return _guests().load_guest(folder, where, resident, dense, layout)
    return load_model(folder, where, resident, dense, layout)


def _guests() -> Any:
    """The module for models that Transformers builds; two seconds of import that others spare."""
    try:
        from chronos.backends.torch.guest import model as guest
    except ImportError as error:
        raise MissingBackendError(
            f"this model needs Transformers 5.20 or later ({error})",
            "",
            "pip install 'chronos-moe[guests]'",
        ) from error
    return guest


def save(model: Any, folder: Path) -> None:
    """Write an unpacked model folder."""
    save_model(model, folder)


def tensors(model: Any) -> Iterator[Named]:
    """(name, dtype, shape, bytes) of every parameter, in float32, under its name on disk."""
    for key, value in model.named_parameters():
        yield to_bytes(key, value, torch.float32)


@torch.no_grad()
def forward(
    model: Any,
    ids_BT: np.ndarray,
    *,
    segments_BT: np.ndarray | None = None,
    cache: Any = None,
    source: Any = None,
) -> Observed:
    """One pass in NumPy terms, for evaluation and tests; `cache` comes from `model.new_cache`."""
    device = model.eval().device
    segments = None if segments_BT is None else torch.from_numpy(segments_BT).to(device)
    ids = torch.from_numpy(ids_BT).long().to(device)
    out = model(
        ids,
        cache=cache,
        segments_BT=segments,
        source=source,
        want_lookahead=model.lookahead is not None,
    )
    return Observed(
        out.logits.float().cpu().numpy(),
        np.stack([r.ids_TK.cpu().numpy() for r in out.routing]),
        np.stack([r.weights_TK.float().cpu().numpy() for r in out.routing]),
        np.stack([r.probs_TE.float().cpu().numpy() for r in out.routing]),
        None if out.lookahead is None else out.lookahead.float().cpu().numpy(),
    )


def open_arena(layout: Layout, slots: int, options: FeedOptions) -> Arena:
    """Memory for experts; see `Arena`."""
    from chronos.backends.torch.arena import Arena

    return Arena(layout, slots, options)


def session(model: Any, feed: Feed | None = None) -> Session:
    """Sequences on a model, with their experts from `feed` (None: the model's own)."""
    return Session(model, feed)


def train_step(model: Any, recipe: OptimizerRecipe, adapter: Adapter | None = None) -> TrainStep:
    """Losses, gradients and optimizer of one model, or of an adapter beside it."""
    from chronos.backends.torch.train import TrainStep

    return TrainStep(model, recipe, adapter)


def check_recipe(recipe: OptimizerRecipe) -> None:
    """Raises UsageError or MissingBackendError for what cannot be trained with here."""
    from chronos.backends.torch import optimizers

    optimizers.check(recipe)


def processes() -> Processes:
    """This process among those that share its updates."""
    from chronos.backends.torch.parallel import Processes

    return Processes()


def score(model: Any, batch: Batch, temperature: float = 1.0, *, replay: bool = False) -> Scores:
    """What references and old policies think of a batch. replay: with the experts in its array
    `picks` [B, T, L, K]."""
    from chronos.backends.torch import train

    return train.score(model, batch, temperature, replay=replay)


def anchor(model: Any) -> None:
    """Keep a frozen copy of every gate, which losses compare the routers with."""
    from chronos.backends.torch import train

    train.anchor(model)


def streamed(model: Any, feed: Feed) -> Streamed:
    """A model without its experts, to be called as one that has them."""
    from chronos.backends.torch.streamed import Streamed

    return Streamed(model, feed)


def attach(
    model: Any, recipe: LoraRecipe, *, seed: int = 0, experts: Collection[Key] = ()
) -> Adapter:
    """Freeze a model and put adapters beside it. experts: the routed ones that get one."""
    from chronos.backends.torch import lora

    return lora.attach(model, recipe, seed=seed, experts=experts)
