"""One optimisation step of the MLX backend: gradients, and the state to resume.

NumPy batches in, plain floats out. Random numbers are seeded from (seed, step, micro-batch), so a
resumed run needs no generator state to continue bit for bit. What is minimised is in `losses.py`.
Forward and backward pass are one lazy graph.
Not covered: mixed precision, a model in parts on several devices.

Shape legend: B batch, T tokens, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from chronos.backends.mlx.checkpoint import (
    Named,
    Place,
    blank,
    from_bytes,
    named,
    overwrite,
    tensor_at,
    to_bytes,
)
from chronos.backends.mlx.lora import Adapter
from chronos.backends.mlx.losses import (
    Losses,
    at_labels,
    count_picks,
    label_log_probs,
    losses,
    picks_of,
    replay_of,
    states,
    tensors_of,
)
from chronos.backends.mlx.model import Model
from chronos.backends.mlx.optimizers import Optimizer
from chronos.backends.mlx.parallel import Processes
from chronos.backends.mlx.streamed import Climb, Streamed
from chronos.backends.protocol import Scores
from chronos.common.data import Batch
from chronos.common.disk.header import TensorEntry
from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.training.objectives import (
    Counts,
    Objective,
    Part,
    Terms,
    count,
    flattened,
    own_share,
    report,
    restored,
)
from chronos.common.training.optimizers import STATES
from chronos.common.training.recipe import OptimizerRecipe
from chronos.common.training.schedule import mask_seed

_Flat = dict[str, mx.array]  # parameters, gradients or moments by their path in the model


class TrainStep:
    """Holds the optimizer of one model; `step` consumes the micro-batches of one update."""

    def __init__(self, model: Any, recipe: OptimizerRecipe, adapter: Adapter | None = None) -> None:
        """model: one that holds its experts, or a `Streamed` one. adapter: what is trained in place
        of the model's own parameters, where it has one."""
        self.model, self.recipe, self.adapter = model, recipe, adapter
        self._module: Model = model.bare if isinstance(model, Streamed) else model
        _check(self._module, adapter)
        self._module.gradient_checkpointing = recipe.gradient_checkpointing
        self._processes = Processes()
        self.optimizer = Optimizer(dict(tree_flatten(self._tree())), recipe)
        self._gradients = nn.value_and_grad(self._module, partial(losses, model))

    def step(
        self, batches: Sequence[Batch], objective: Objective, rate: float, number: int
    ) -> Terms:
        """One update over the micro-batches, of which several processes have a share each; skipped
        (`skipped` = 1) if not finite."""
        model, processes = self._mode(True), self._processes
        own = own_share(batches, processes.rank, processes.count)
        counts = count(batches, objective, model.config.lookahead_steps)
        balanced = len(batches) > 1 and bool(objective.weights.get("balance"))
        if len(own) > 1 and self._climbs():
            flat, parts = self._climb([batch for _, batch in own], objective, counts, balanced)
        else:
            picks_LE = None
            if balanced:
                (picks_LE,) = processes.total([self._picks(own, number)])
            gradients: Any = None  # by module, as MLX nests them
            parts = []
            for part, batch in own:
                self._seed(number, part)
                found, new = self._gradients(batch, objective, counts, picks_LE)
                gradients = new if gradients is None else tree_map(mx.add, gradients, new)
                mx.eval(found, gradients)
                parts.append(_part(Losses(*found)))
            flat = dict(tree_flatten(gradients))
        if processes.count > 1:
            flat = dict(zip(flat, processes.total(list(flat.values())), strict=True))
            (vector,) = processes.total([mx.array(flattened(parts).astype(np.float32))])
            parts = [restored(np.array(vector, np.float64), parts[0])]
        terms = report(parts, counts, objective)
        norm = math.sqrt(float(mx.stack([mx.square(g).sum() for g in flat.values()]).sum()))
        finite = math.isfinite(terms["loss"]) and math.isfinite(norm)
        if finite:
            self._apply(flat, norm, rate)
        return terms | {"grad_norm": norm, "skipped": float(not finite)}

    def _climbs(self) -> bool:
        """Whether micro-batches go through the model layer by layer. Masks are drawn in another
        order then, and committed lookahead gives layers more than the one below; so adapters with
        either go through it with one after the other."""
        if not isinstance(self.model, Streamed) or self.adapter is None:
            return False
        committed = "lookahead" in getattr(self.model.config, "routing_sources", ())
        return not committed and not self.adapter.recipe.dropout

    def _climb(
        self, batches: Sequence[Batch], objective: Objective, counts: Counts, balanced: bool
    ) -> tuple[_Flat, list[Part]]:
        """The gradients of an update whose experts are read once up and once down. balanced:
        whether the picks of all its micro-batches are asked for."""
        model, climb = self.model, Climb(self.model, len(batches))
        outs = climb.up([partial(states, model, batch, objective) for batch in batches])
        picks_LE = None
        if balanced:
            segments = [mx.array(batch.segments_BT) for batch in batches]
            own_LE = sum(map(picks_of, outs, segments), mx.array(0.0))
            (picks_LE,) = self._processes.total([own_LE])
        parts = []
        for place, batch in enumerate(batches):
            found = climb.top(place, partial(losses, model, batch, objective, counts, picks_LE))
            parts.append(_part(Losses(*found)))
        return climb.down(), parts

    def evaluate(self, batches: Sequence[Batch], objective: Objective) -> Terms:
        """Terms of all batches together, without dropout, masks or gradients."""
        model = self._mode(False)
        counts = count(batches, objective, model.config.lookahead_steps)
        parts = [_part(losses(model, batch, objective, counts, None)) for batch in batches]
        return report(parts, counts, objective)

    def _mode(self, training: bool) -> Any:
        """The model, with or without dropout and masks."""
        model = self.model
        if training:
            model.train()
        else:
            model.eval()
        if self.adapter is not None:
            self.adapter.train(training)
        return model

    def _seed(self, number: int, part: int) -> None:
        """So that a micro-batch draws the same masks whatever was computed before it."""
        mx.random.seed(mask_seed(self.recipe.seed, number, part))

    def _picks(self, own: Sequence[tuple[int, Batch]], number: int) -> mx.array:
        """Those of all batches, evaluated one after the other."""
        total_LE = mx.array(0.0)
        for part, batch in own:
            self._seed(number, part)
            total_LE = total_LE + count_picks(self.model, batch)
            mx.eval(total_LE)
        return total_LE

    def _apply(self, gradients: _Flat, norm: float, rate: float) -> None:
        weights = dict(tree_flatten(self._tree()))
        scale = min(1.0, self.recipe.clip / (norm + 1e-6))
        weights = self.optimizer.update(weights, gradients, scale, rate)
        self._module.update(tree_unflatten(list(weights.items())))

    def state(self) -> Iterator[Named]:
        """What is trained and what the optimizer keeps, in float32: all that a resume needs."""
        yield to_bytes("optimizer.step", mx.array(float(self.optimizer.updates)), mx.float32)
        for name, place in self._named(self._tree()):
            yield to_bytes(name, tensor_at(place), mx.float32)
        for kind, name, value in self.optimizer.state():
            yield to_bytes(f"{kind}.{self._names.get(name, name)}", value, mx.float32)

    def load_state(self, tensors: Iterable[tuple[TensorEntry, memoryview]]) -> None:
        """Take over what `state` wrote. Raises ShapeMismatch if the model or the optimizer is
        another one."""
        weights = blank(self._tree(), lambda path: mx.float32)
        places = dict(self._named(weights))
        paths = {name: path for path, name in self._names.items()}
        missing, updates = set(places), 0
        for entry, data in tensors:
            if entry.name == "optimizer.step":
                updates = int(np.frombuffer(data, np.float32)[0])
                continue
            kind, _, name = entry.name.partition(".")
            if kind in STATES:
                value = from_bytes(data, entry.dtype, entry.shape)
                fits = self.optimizer.put(kind, paths.get(name, name), value)
            else:
                place = places.get(entry.name)
                fits = place is not None and tuple(tensor_at(place).shape) == entry.shape
                missing.discard(entry.name)
                if place is not None and fits:
                    overwrite(place, data, entry.dtype)
            if not fits:
                raise ShapeMismatch(f"checkpoint tensor {entry.name} does not fit this model")
        if missing:
            raise ShapeMismatch(f"the checkpoint lacks {sorted(missing)[0]}")
        if not self.optimizer.resume(updates):
            raise ShapeMismatch("the checkpoint lacks what the optimizer keeps")
        self._module.update(weights)

    def _tree(self) -> dict[str, Any]:
        """What is trained, by module."""
        tree: dict[str, Any] = self._module.trainable_parameters()
        return tree

    def _named(self, tree: dict[str, Any]) -> Iterator[tuple[str, Place]]:
        for name, place in named(tree):
            yield self._names.get(name, name), place

    @property
    def _names(self) -> Mapping[str, str]:
        """Of an adapter's arrays in a checkpoint, by their paths in the model."""
        return {} if self.adapter is None else self.adapter.names


def _check(model: Any, adapter: Adapter | None) -> None:
    if adapter is None and not (isinstance(model, Model) and model.resident):
        raise UsageError(
            "only a native model with all its experts in memory is trained as a whole",
            "",
            "train an adapter of it: --lora 16",
        )


def score(model: Model, batch: Batch, temperature: float = 1.0, *, replay: bool = False) -> Scores:
    """What a model without dropout and masks says of a batch. replay: with the experts that the
    batch names."""
    arrays = tensors_of(batch)
    out = model.eval()(
        arrays["ids"],
        segments_BT=arrays["segments"],
        replay=replay_of(arrays) if replay else None,
        want_logits=False,
    )
    measure = partial(label_log_probs, temperature=temperature)
    (lp_BT,) = at_labels(model, out.hidden, arrays, measure)
    shape = (*batch.ids_BT.shape, len(out.routing), -1)
    ids, probs = (
        np.array(mx.stack(x, 1).reshape(shape))
        for x in ([r.ids_TK for r in out.routing], [r.probs_TE for r in out.routing])
    )
    return Scores(np.array(lp_BT), ids, probs)


def anchor(model: Model) -> None:
    """Keep a frozen copy of every gate, which losses compare the routers with from now on."""
    for block in model.model.layers:
        block.mlp._anchor = [mx.array(weight) for weight in block.mlp.gates()]


def _part(found: Losses) -> Part:
    """On the host."""
    mx.eval(found)
    terms = {name: float(value) for name, value in found.terms.items()}
    return Part(terms, np.array(found.picks_LE), np.array(found.probs_LE))
