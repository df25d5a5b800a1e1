"""The losses of the MLX backend: a formula for each objective, and the routing terms all share.

A term is a batch's sum over a count of the whole update (`Counts`), so micro-batches add up to the
joined batch, uneven ones too. The formulas are those of `common.training.losses`; a new objective
is a function here under its name in OBJECTIVES. Nothing is evaluated here.

Shape legend: B batch, T tokens, V vocabulary, L layers, E experts, K top-k, J lookahead steps + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from chronos.backends.mlx.model import Model, Output
from chronos.common.data import IGNORE, Batch
from chronos.common.errors import UsageError
from chronos.common.training.objectives import Counts, Objective

Tensors = Mapping[str, mx.array]
Terms = dict[str, mx.array]


class Losses(NamedTuple):
    """What a micro-batch adds to its update: the loss to differentiate, its terms, and the picks
    and the probabilities of its tokens, summed."""

    loss: mx.array
    terms: Terms
    picks_LE: mx.array
    probs_LE: mx.array


def losses(
    model: Model, batch: Batch, objective: Objective, counts: Counts, picks_LE: mx.array | None
) -> Losses:
    """One batch's part of an update's loss.

    picks_LE: those of the whole update, whose fractions f the balance term (2101.03961, eq. 4) is
    made of; None where this batch is all of it. Raises UsageError for an unknown objective.
    """
    formula = OBJECTIVES.get(objective.name)
    if formula is None:
        raise UsageError(f"the MLX backend has no loss for {objective.name!r}")
    arrays = tensors_of(batch)
    segments_BT = arrays["segments"]
    out = model(
        arrays["ids"],
        segments_BT=segments_BT,
        want_lookahead=model.lookahead is not None,
        lookahead_into_trunk=objective.lookahead_into_trunk,
    )
    weights, (probs_LBTE, ids_LBTK) = objective.weights, _routed(out, segments_BT)
    terms = formula(out, arrays, objective, counts)
    terms |= routing_terms(probs_LBTE, ids_LBTK, segments_BT, objective, counts)
    if out.lookahead is not None:
        terms |= lookahead_terms(out.lookahead, probs_LBTE, ids_LBTK, segments_BT, counts)
    own_LE = _picks(ids_LBTK, segments_BT, probs_LBTE.shape[-1])
    probs_LE = (probs_LBTE * (segments_BT >= 0)[..., None]).sum((1, 2))
    balance = _balance(own_LE if picks_LE is None else picks_LE, probs_LE, counts)
    mix = terms | {"balance": balance}
    loss = mx.stack([w * mix[name] for name, w in weights.items() if w and name in mix]).sum()
    return Losses(loss, terms, own_LE, probs_LE)


def tensors_of(batch: Batch) -> Tensors:
    """`ids`, `labels` and `segments` [B, T] of a batch, and its other arrays by their names."""
    arrays = {"ids": batch.ids_BT, "labels": batch.labels_BT, "segments": batch.segments_BT}
    return {name: mx.array(array) for name, array in (arrays | dict(batch.extra)).items()}


def count_picks(model: Model, batch: Batch) -> mx.array:
    """How often a batch's tokens choose each expert, [L, E], by a pass without logits."""
    arrays = tensors_of(batch)
    out = model(arrays["ids"], segments_BT=arrays["segments"], last_only=True)
    probs_LBTE, ids_LBTK = _routed(out, arrays["segments"])
    return _picks(ids_LBTK, arrays["segments"], probs_LBTE.shape[-1])


def label_log_probs(logits_BTV: mx.array, labels_BT: mx.array) -> mx.array:
    """log softmax(logits)[label] in nats, [B, T]; 0 where there is no label."""
    logits_BTV = logits_BTV.astype(mx.float32)
    nats_BT = nn.losses.cross_entropy(logits_BTV, mx.maximum(labels_BT, 0))
    return mx.where(labels_BT != IGNORE, -nats_BT, 0)


def next_token(out: Output, batch: Tensors, objective: Objective, counts: Counts) -> Terms:
    """Cross-entropy of the labels."""
    return {"ce": -label_log_probs(out.logits, batch["labels"]).sum() / max(counts.own, 1)}


OBJECTIVES: dict[str, Callable[[Output, Tensors, Any, Counts], Terms]] = {"next-token": next_token}


def routing_terms(
    probs_LBTE: mx.array,
    ids_LBTK: mx.array,
    segments_BT: mx.array,
    objective: Objective,
    counts: Counts,
) -> Terms:
    """Temporal and locality terms and the router's entropy, pads left out."""
    real_BT = segments_BT >= 0
    both_BT = (segments_BT[:, 1:] == segments_BT[:, :-1]) & real_BT[:, 1:]
    now, before = probs_LBTE[:, :, 1:], probs_LBTE[:, :, :-1]
    tokens, pairs = (max(n * len(probs_LBTE), 1) for n in counts.pairs[:2])
    terms = {"temporal": _sum(mx.square(now - before).sum(-1), both_BT) / pairs}
    if objective.weights.get("locality"):
        kept = mx.take_along_axis(now, ids_LBTK[:, :, :-1], axis=-1).sum(-1)
        terms["locality"] = _sum(-_log(kept), both_BT) / pairs
    entropy = -(probs_LBTE * _log(probs_LBTE)).sum(-1)
    return terms | {"entropy": mx.stop_gradient(_sum(entropy, real_BT)) / tokens}


def lookahead_terms(
    logits_BTJLE: mx.array,
    probs_LBTE: mx.array,
    ids_LBTK: mx.array,
    segments_BT: mx.array,
    counts: Counts,
) -> Terms:
    """Cross-entropy of Q against the detached routing j tokens later, the top-k hit term and the
    share of the routed experts among Q's top-k. The first layer is routed before Q exists."""
    logits = logits_BTJLE.astype(mx.float32)
    logq = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    targets_LBTE = mx.stop_gradient(probs_LBTE)
    real_BT, T = segments_BT >= 0, segments_BT.shape[1]
    (L, *_, K), J = ids_LBTK.shape, logq.shape[2]
    count = max(sum(counts.pairs[:J]) * L, 1)
    ce = hit = mx.array(0.0)
    recall = {}
    for j in range(min(J, T)):
        valid_BT = (segments_BT[:, j:] == segments_BT[:, : T - j]) & real_BT[:, : T - j]
        q_LBTE = logq[:, : T - j, j].transpose(2, 0, 1, 3)
        p_LBTE, ids = targets_LBTE[:, :, j:], ids_LBTK[:, :, j:]
        ce = ce + _sum(-(p_LBTE * q_LBTE).sum(-1), valid_BT)
        mass = mx.exp(mx.take_along_axis(q_LBTE, ids, axis=-1)).sum(-1)
        hit = hit + _sum(-_log(mass, 1 / K), valid_BT)
        guess = mx.argsort(-mx.stop_gradient(q_LBTE), axis=-1)[..., :K]
        found = (ids[..., :, None] == guess[..., None, :]).any(-1).sum(-1)
        recall[f"recall_{j}"] = _sum(found, valid_BT) / max(counts.pairs[j] * L * K, 1)
    return {"lookahead": ce / count, "lookahead_hit": hit / count} | recall


def _balance(picks_LE: mx.array, probs_LE: mx.array, counts: Counts) -> mx.array:
    share_LE = picks_LE / mx.maximum(picks_LE.sum(-1, keepdims=True), 1)
    return picks_LE.shape[-1] * (share_LE * probs_LE).sum() / max(counts.tokens, 1)


def _routed(out: Output, segments_BT: mx.array) -> tuple[mx.array, mx.array]:
    """Router probabilities [L, B, T, E] and the ids of the chosen [L, B, T, K]."""
    shape = segments_BT.shape
    probs_LBTE = mx.unflatten(mx.stack([r.probs_TE for r in out.routing]), 1, shape)
    return probs_LBTE, mx.unflatten(mx.stack([r.ids_TK for r in out.routing]), 1, shape)


def _picks(ids_LBTK: mx.array, segments_BT: mx.array, experts: int) -> mx.array:
    none_LBTE = mx.zeros((*ids_LBTK.shape[:-1], experts))
    picked_LBTE = mx.put_along_axis(none_LBTE, ids_LBTK, mx.array(1.0), axis=-1)
    return (picked_LBTE * (segments_BT >= 0)[..., None]).sum((1, 2))


def _sum(x: mx.array, mask_BT: mx.array) -> mx.array:
    """Sum of x [..., B, T] where the mask is true."""
    return mx.where(mask_BT, x, 0).sum()


def _log(x: mx.array, scale: float = 1.0) -> mx.array:
    return mx.log(mx.maximum(x, 1e-9) * scale)
