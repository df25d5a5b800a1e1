"""One optimisation step of the MLX backend: gradients, AdamW, and the state to resume.

NumPy batches in, plain floats out. Random numbers are seeded from (seed, step), so a resumed run
needs no generator state to continue bit for bit. What is minimised is in `losses.py`. Forward and
backward pass are one lazy graph; the update is compiled, since it is the same every step.
Not covered: mixed precision, several devices.

Shape legend: B batch, T tokens, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
    tensors_of,
)
from chronos.backends.mlx.model import Model
from chronos.backends.mlx.streamed import Streamed
from chronos.backends.protocol import Scores
from chronos.common.data import Batch
from chronos.common.disk.header import TensorEntry
from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.training.objectives import Objective, Part, Terms, count, report
from chronos.common.training.recipe import OptimizerRecipe

_MOMENTS = ("exp_avg", "exp_avg_sq")
_Flat = dict[str, mx.array]  # parameters, gradients or moments by their path in the model


class TrainStep:
    """Holds the optimizer of one model; `step` consumes the micro-batches of one update."""

    def __init__(self, model: Any, recipe: OptimizerRecipe, adapter: Adapter | None = None) -> None:
        """model: one that holds its experts, or a `Streamed` one. adapter: what is trained in place
        of the model's own parameters, where it has one."""
        self.model, self.recipe, self.adapter = model, recipe, adapter
        self._module: Model = model.bare if isinstance(model, Streamed) else model
        _check(self._module, adapter)
        self.updates = 0
        self._moments = [self._zeros(), self._zeros()]
        self._gradients = nn.value_and_grad(self._module, partial(losses, model))
        self._update = mx.compile(partial(_adamw, recipe))

    def step(
        self, batches: Sequence[Batch], objective: Objective, rate: float, number: int
    ) -> Terms:
        """One update over the micro-batches; skipped (`skipped` = 1) if not finite."""
        model = self._mode(True)
        counts = count(batches, objective, model.config.lookahead_steps)
        picks_LE = None
        if len(batches) > 1 and objective.weights.get("balance"):
            self._seed(number)  # twice, so that both passes draw the same masks
            picks_LE = self._picks(batches)
        self._seed(number)
        gradients: Any = None  # by module, as MLX nests them
        parts = []
        for batch in batches:
            found, new = self._gradients(batch, objective, counts, picks_LE)
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            mx.eval(found, gradients)
            parts.append(_part(Losses(*found)))
        terms = report(parts, counts, objective)
        flat = dict(tree_flatten(gradients))
        norm = math.sqrt(float(mx.stack([mx.square(g).sum() for g in flat.values()]).sum()))
        finite = math.isfinite(terms["loss"]) and math.isfinite(norm)
        if finite:
            self._apply(flat, norm, rate)
        return terms | {"grad_norm": norm, "skipped": float(not finite)}

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

    def _seed(self, number: int) -> None:
        mx.random.seed(self.recipe.seed * 1_000_003 + number)

    def _picks(self, batches: Sequence[Batch]) -> mx.array:
        """Those of all batches, evaluated one after the other."""
        total_LE = mx.array(0.0)
        for batch in batches:
            total_LE = total_LE + count_picks(self.model, batch)
            mx.eval(total_LE)
        return total_LE

    def _apply(self, gradients: _Flat, norm: float, rate: float) -> None:
        """AdamW as torch has it: decoupled decay, bias correction, the gradient clipped by norm."""
        recipe = self.recipe
        self.updates += 1
        numbers = (
            rate,
            min(1.0, recipe.clip / (norm + 1e-6)),
            1 - recipe.beta1**self.updates,
            math.sqrt(1 - recipe.beta2**self.updates),
        )
        weights = dict(tree_flatten(self._tree()))
        weights, *self._moments = self._update(
            weights, gradients, *self._moments, *map(mx.array, numbers)
        )
        self._module.update(tree_unflatten(list(weights.items())))
        mx.eval(weights, self._moments)

    def state(self) -> Iterator[Named]:
        """What is trained and the optimizer's moments, all in float32: all that a resume needs."""
        yield to_bytes("optimizer.step", mx.array(float(self.updates)), mx.float32)
        for name, place in self._places(self._tree(), self._moments).items():
            if self.updates or not name.startswith(_MOMENTS):
                yield to_bytes(name, tensor_at(place), mx.float32)

    def load_state(self, tensors: Iterable[tuple[TensorEntry, memoryview]]) -> None:
        """Take over what `state` wrote. Raises ShapeMismatch if the model is another one."""
        weights = blank(self._tree(), lambda path: mx.float32)
        moments = [self._zeros(), self._zeros()]
        places = self._places(weights, moments)
        updates = 0
        missing = {name for name in places if not name.startswith(_MOMENTS)}
        for entry, data in tensors:
            if entry.name == "optimizer.step":
                updates = int(np.frombuffer(data, np.float32)[0])
                continue
            place = places.get(entry.name)
            if place is None or tuple(tensor_at(place).shape) != entry.shape:
                raise ShapeMismatch(f"checkpoint tensor {entry.name} does not fit this model")
            overwrite(place, data, entry.dtype)
            missing.discard(entry.name)
        if missing:
            raise ShapeMismatch(f"the checkpoint lacks {sorted(missing)[0]}")
        self._module.update(weights)
        self._moments, self.updates = moments, updates

    def _zeros(self) -> _Flat:
        return {p: mx.zeros(a.shape) for p, a in tree_flatten(self._tree())}

    def _tree(self) -> dict[str, Any]:
        """What is trained, by module."""
        tree: dict[str, Any] = self._module.trainable_parameters()
        return tree

    def _places(self, weights: dict[str, Any], moments: Sequence[_Flat]) -> dict[str, Place]:
        """Where each tensor of the state lives, by its name in a checkpoint."""
        places = dict(self._named(weights))
        for moment, flat in zip(_MOMENTS, moments, strict=True):
            tree = tree_unflatten(list(flat.items()))
            places |= {f"{moment}.{name}": place for name, place in self._named(tree)}
        return places

    def _named(self, tree: dict[str, Any]) -> Iterator[tuple[str, Place]]:
        names = {} if self.adapter is None else self.adapter.names
        for name, place in named(tree):
            yield names.get(name, name), place


def _check(model: Any, adapter: Adapter | None) -> None:
    if adapter is None and not (isinstance(model, Model) and model.resident):
        raise UsageError(
            "only a native model with all its experts in memory is trained as a whole",
            "",
            "train an adapter of it: --lora 16",
        )


def score(model: Model, batch: Batch, temperature: float = 1.0) -> Scores:
    """What a model without dropout and masks says of a batch."""
    arrays = tensors_of(batch)
    out = model.eval()(arrays["ids"], segments_BT=arrays["segments"], want_logits=False)
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


def _adamw(
    recipe: OptimizerRecipe,
    weights: _Flat,
    gradients: _Flat,
    first: _Flat,
    second: _Flat,
    rate: mx.array,
    scale: mx.array,
    correction: mx.array,
    root_correction: mx.array,
) -> tuple[_Flat, _Flat, _Flat]:
    """New weights and moments (1711.05101, algorithm 2); norms and the embedding do not decay."""
    weights, first, second = dict(weights), dict(first), dict(second)
    for name, g in gradients.items():
        g = g * scale
        m = first[name] = recipe.beta1 * first[name] + (1 - recipe.beta1) * g
        v = second[name] = recipe.beta2 * second[name] + (1 - recipe.beta2) * mx.square(g)
        plain = g.ndim < 2 or "embed_tokens" in name
        w = weights[name] if plain else weights[name] * (1 - rate * recipe.weight_decay)
        weights[name] = w - rate / correction * m / (mx.sqrt(v) / root_correction + 1e-8)
    return weights, first, second


def _part(found: Losses) -> Part:
    """On the host."""
    mx.eval(found)
    terms = {name: float(value) for name, value in found.terms.items()}
    return Part(terms, np.array(found.picks_LE), np.array(found.probs_LE))
