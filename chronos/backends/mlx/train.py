"""One optimisation step of the MLX backend: losses, gradients, AdamW, and the state to resume.

NumPy batches in, plain floats out. Random numbers are seeded from (seed, step), so a resumed run
needs no generator state to continue bit for bit. The formulas are those of `common.losses`. Forward
and backward pass are one lazy graph; the update is compiled, since it is the same every step.
Not covered: mixed precision, several devices.

Shape legend: B batch, T tokens, V vocabulary, L layers, E experts, K top-k, J lookahead steps + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

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
from chronos.backends.mlx.model import Model, Output
from chronos.common.data import Batch
from chronos.common.disk.header import TensorEntry
from chronos.common.errors import ShapeMismatch
from chronos.common.model.config import LossWeights
from chronos.common.training.recipe import TrainRecipe

_MOMENTS = ("exp_avg", "exp_avg_sq")
_Flat = dict[str, mx.array]  # parameters, gradients or moments by their path in the model
_Losses = tuple[mx.array, dict[str, mx.array], mx.array]  # loss, terms, picks_LE


class TrainStep:
    """Holds the optimizer of one model; `step` consumes the micro-batches of one update."""

    def __init__(self, model: Model, recipe: TrainRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.updates = 0
        self._moments = [self._zeros(), self._zeros()]
        self._gradients = nn.value_and_grad(model, self._losses)
        self._update = mx.compile(partial(_adamw, recipe))

    def step(self, batches: Sequence[Batch], learning_rate: float, step: int) -> dict[str, float]:
        """One update over the micro-batches; skipped (`skipped` = 1) if not finite."""
        self.model.train()
        mx.random.seed(self.recipe.seed * 1_000_003 + step)
        picks_LE: mx.array | None = None
        gradients: dict | None = None
        totals: dict[str, float] = {}
        for batch in batches:
            (_, terms, picks_LE), new = self._gradients(batch, picks_LE)
            new = tree_map(lambda g: g / len(batches), new)
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            mx.eval(terms, picks_LE, gradients)
            _add(totals, terms, len(batches))
        flat = dict(tree_flatten(gradients))
        norm = math.sqrt(sum(mx.square(g).sum() for g in flat.values()).item())
        totals["grad_norm"] = norm
        totals["skipped"] = float(not (math.isfinite(totals["loss"]) and math.isfinite(norm)))
        if not totals["skipped"]:
            self._apply(flat, norm, learning_rate)
        assert picks_LE is not None
        return totals | _health(picks_LE)

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Mean terms over the batches, without dropout, masks or gradients."""
        self.model.eval()
        picks_LE: mx.array | None = None
        totals: dict[str, float] = {}
        for batch in batches:
            _, terms, picks_LE = self._losses(batch, picks_LE)
            mx.eval(terms, picks_LE)
            _add(totals, terms, len(batches))
        assert picks_LE is not None
        return totals | _health(picks_LE)

    def _apply(self, gradients: _Flat, norm: float, learning_rate: float) -> None:
        """AdamW as torch has it: decoupled decay, bias correction, the gradient clipped by norm."""
        recipe = self.recipe
        self.updates += 1
        numbers = (
            learning_rate,
            min(1.0, recipe.clip / (norm + 1e-6)),
            1 - recipe.beta1**self.updates,
            math.sqrt(1 - recipe.beta2**self.updates),
        )
        weights = dict(tree_flatten(self.model.parameters()))
        weights, *self._moments = self._update(
            weights, gradients, *self._moments, *map(mx.array, numbers)
        )
        self.model.update(tree_unflatten(list(weights.items())))
        mx.eval(weights, self._moments)

    def _losses(self, batch: Batch, picks_LE: mx.array | None) -> _Losses:
        weights = self.model.config.loss_weights
        ids_BT, labels_BT, segments_BT = map(
            mx.array, (batch.ids_BT, batch.labels_BT, batch.segments_BT)
        )
        out = self.model(
            ids_BT,
            segments_BT=segments_BT,
            want_lookahead=self.model.lookahead is not None,
            lookahead_into_trunk=self.recipe.lookahead_into_trunk,
        )
        terms, picks_LE = routing_terms(out, segments_BT, weights, picks_LE)
        losses_BT = nn.losses.cross_entropy(out.logits, mx.maximum(labels_BT, 0))
        terms["ce"] = _mean(losses_BT, labels_BT != -100)
        mix = {name: getattr(weights, name) for name in terms if hasattr(weights, name)}
        terms["loss"] = terms["ce"] + sum(w * terms[name] for name, w in mix.items() if w)
        return terms["loss"], terms, picks_LE

    def state(self) -> Iterator[Named]:
        """Weights and optimizer moments, all in float32: all that a resume needs."""
        yield to_bytes("optimizer.step", mx.array(float(self.updates)), mx.float32)
        for name, place in _places(self.model.parameters(), self._moments).items():
            if self.updates or not name.startswith(_MOMENTS):
                yield to_bytes(name, tensor_at(place), mx.float32)

    def load_state(self, tensors: Iterable[tuple[TensorEntry, memoryview]]) -> None:
        """Take over what `state` wrote. Raises ShapeMismatch if the model is another one."""
        weights = blank(self.model.parameters(), lambda path: mx.float32)
        moments = [self._zeros(), self._zeros()]
        places = _places(weights, moments)
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
        self.model.update(weights)
        self._moments, self.updates = moments, updates

    def _zeros(self) -> _Flat:
        return {p: mx.zeros(a.shape) for p, a in tree_flatten(self.model.parameters())}


def routing_terms(
    out: Output, segments_BT: mx.array, weights: LossWeights, picks_LE: mx.array | None
) -> tuple[dict[str, mx.array], mx.array]:
    """Balance, temporal, locality and lookahead terms of spec section 3, pads left out.

    picks_LE counts the picks of earlier micro-batches of the same update, so that the fractions f
    of the balance term (2101.03961, eq. 4) are those of the global batch; the sum is returned.
    """
    shape = segments_BT.shape
    probs_LBTE = mx.unflatten(mx.stack([r.probs_TE for r in out.routing]), 1, shape)
    ids_LBTK = mx.unflatten(mx.stack([r.ids_TK for r in out.routing]), 1, shape)
    E, K = probs_LBTE.shape[-1], ids_LBTK.shape[-1]
    real_BT = segments_BT >= 0
    picked_LBTE = mx.put_along_axis(mx.zeros(probs_LBTE.shape), ids_LBTK, mx.array(1.0), axis=-1)
    now_LE = (picked_LBTE * real_BT[..., None]).sum((1, 2))
    picks_LE = now_LE if picks_LE is None else picks_LE + now_LE
    share_LE = picks_LE / mx.maximum(picks_LE.sum(-1, keepdims=True), 1)
    mean_LE = (probs_LBTE * real_BT[..., None]).sum((1, 2)) / mx.maximum(real_BT.sum(), 1)
    terms = {"balance": E * (share_LE * mean_LE).sum()}
    both_BT = (segments_BT[:, 1:] == segments_BT[:, :-1]) & real_BT[:, 1:]
    now, before = probs_LBTE[:, :, 1:], probs_LBTE[:, :, :-1]
    terms["temporal"] = _mean(mx.square(now - before).sum(-1), both_BT)
    if weights.locality:
        kept = mx.take_along_axis(now, ids_LBTK[:, :, :-1], axis=-1).sum(-1)
        terms["locality"] = _mean(-_log(kept), both_BT)
    entropy = -(probs_LBTE * _log(probs_LBTE)).sum(-1)
    terms["entropy"] = mx.stop_gradient(_mean(entropy, real_BT))
    if out.lookahead is not None:
        terms |= _lookahead_terms(out.lookahead, probs_LBTE, ids_LBTK, segments_BT, K)
    return terms, picks_LE


def _lookahead_terms(
    logits_BTJLE: mx.array,
    probs_LBTE: mx.array,
    ids_LBTK: mx.array,
    segments_BT: mx.array,
    top_k: int,
) -> dict[str, mx.array]:
    """Cross-entropy of Q against the detached routing j tokens later, the top-k hit term and the
    share of the routed experts among Q's top-k. The first layer is routed before Q exists."""
    logits = logits_BTJLE.astype(mx.float32)
    logq = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    targets_LBTE = mx.stop_gradient(probs_LBTE)
    real_BT, T = segments_BT >= 0, segments_BT.shape[1]
    ce = hit = count = mx.array(0.0)
    terms = {}
    for j in range(min(logq.shape[2], T)):
        valid_BT = (segments_BT[:, j:] == segments_BT[:, : T - j]) & real_BT[:, : T - j]
        q_LBTE = logq[:, : T - j, j].transpose(2, 0, 1, 3)
        p_LBTE, ids = targets_LBTE[:, :, j:], ids_LBTK[:, :, j:]
        ce = ce + mx.where(valid_BT, -(p_LBTE * q_LBTE).sum(-1), 0).sum()
        mass = mx.exp(mx.take_along_axis(q_LBTE, ids, axis=-1)).sum(-1)
        hit = hit + mx.where(valid_BT, -_log(mass, 1 / top_k), 0).sum()
        count = count + valid_BT.sum() * len(q_LBTE)
        guess = mx.argsort(-mx.stop_gradient(q_LBTE), axis=-1)[..., :top_k]
        found = (ids[..., :, None] == guess[..., None, :]).any(-1).mean(-1)
        terms[f"recall_{j}"] = _mean(found, valid_BT)
    count = mx.maximum(count, 1)
    return {"lookahead": ce / count, "lookahead_hit": hit / count} | terms


def _places(weights: dict, moments: Sequence[_Flat]) -> dict[str, Place]:
    """Where each tensor of the state lives, by its name in a checkpoint."""
    places = dict(named(weights))
    for moment, flat in zip(_MOMENTS, moments, strict=True):
        tree = tree_unflatten(list(flat.items()))
        places |= {f"{moment}.{name}": place for name, place in named(tree)}
    return places


def _adamw(
    recipe: TrainRecipe,
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


def _mean(x: mx.array, mask_BT: mx.array) -> mx.array:
    """Mean of x [..., B, T] where the mask is true; 0 where it never is."""
    count = mask_BT.sum() * (x.size // mask_BT.size)
    return mx.where(mask_BT, x, 0).sum() / mx.maximum(count, 1)


def _log(x: mx.array, scale: float = 1.0) -> mx.array:
    return mx.log(mx.maximum(x, 1e-9) * scale)


def _add(totals: dict[str, float], terms: dict[str, mx.array], parts: int) -> None:
    for name, value in terms.items():
        totals[name] = totals.get(name, 0.0) + value.item() / parts


def _health(picks_LE: mx.array) -> dict[str, float]:
    """Largest share of one expert and effective experts exp(H) of the picks, over layers."""
    picks = np.array(picks_LE)
    share_LE = picks / np.maximum(picks.sum(-1, keepdims=True), 1)
    effective_L = np.exp(-(share_LE * np.log(np.maximum(share_LE, 1e-9))).sum(-1))
    return {
        "largest_share": float(share_LE.max()),
        "effective_experts": float(effective_L.mean()),
        "effective_experts_min": float(effective_L.min()),
    }
