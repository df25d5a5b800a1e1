"""The losses of the MLX backend: a formula for each objective, and the routing terms all share.

A term is a batch's sum over a count of the whole update (`Counts`), so micro-batches add up to the
joined batch, uneven ones too. The formulas are those of `common.training.losses`; a new objective
is a function here under its name in OBJECTIVES. Nothing is evaluated here.

Shape legend: B batch, T tokens, N labels, P pairs, V vocabulary, L layers, E experts, K top-k,
J lookahead steps + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx import nn

from chronos.backends.mlx.model import Model, Output
from chronos.common.data import IGNORE, Batch
from chronos.common.errors import UsageError
from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import GuestConfig
from chronos.common.model.history import balance_scale, tiers
from chronos.common.training.memory import TILE_BYTES
from chronos.common.training.objectives import Counts, Objective

Tensors = Mapping[str, mx.array]
Terms = dict[str, mx.array]
AtLabels = Callable[..., tuple[mx.array, ...]]  # `at_labels` of a model and a batch


class Losses(NamedTuple):
    """What a micro-batch adds to its update: the loss to differentiate, its terms, and the picks
    and the probabilities of its tokens, summed, the latter as they count for the balance."""

    loss: mx.array
    terms: Terms
    picks_LE: mx.array
    probs_LE: mx.array


def states(model: Model, batch: Batch, objective: Objective, **options: Any) -> Output:
    """What an objective is computed from. options: of the model's call."""
    arrays = tensors_of(batch)
    out: Output = model(
        arrays["ids"],
        segments_BT=arrays["segments"],
        want_lookahead=model.lookahead is not None,
        lookahead_into_trunk=objective.lookahead_into_trunk,
        replay=replay_of(arrays),
        want_logits=False,
        **options,
    )
    return out


def losses(
    model: Model,
    batch: Batch,
    objective: Objective,
    counts: Counts,
    picks_LE: mx.array | None,
    **options: Any,
) -> Losses:
    """One batch's part of an update's loss.

    picks_LE: those of the whole update, whose fractions f the balance term (2101.03961, eq. 4) is
    made of; None where this batch is all of it. options: of the model's call. Raises UsageError for
    an unknown objective.
    """
    formula = OBJECTIVES.get(objective.name)
    if formula is None:
        raise UsageError(f"the MLX backend has no loss for {objective.name!r}")
    arrays = tensors_of(batch)
    segments_BT = arrays["segments"]
    out = states(model, batch, objective, **options)
    weights, (probs_LBTE, ids_LBTK) = objective.weights, _routed(out, segments_BT)
    terms = formula(partial(at_labels, model, out.hidden, arrays), arrays, objective, counts)
    terms |= routing_terms(probs_LBTE, ids_LBTK, segments_BT, objective, counts)
    terms |= anchor_terms(out, probs_LBTE, ids_LBTK, arrays, counts, model.config)
    if out.lookahead is not None:
        terms |= lookahead_terms(out.lookahead, probs_LBTE, ids_LBTK, segments_BT, counts)
    own_LE = _picks(ids_LBTK, segments_BT, probs_LBTE.shape[-1])
    probs_LE = (probs_LBTE * (segments_BT >= 0)[..., None]).sum((1, 2))
    probs_LE = probs_LE * mx.array(balance_scale(model.config).astype(np.float32))
    balance = _balance(own_LE if picks_LE is None else picks_LE, probs_LE, counts)
    mix = terms | {"balance": balance}
    loss = mx.stack([w * mix[name] for name, w in weights.items() if w and name in mix]).sum()
    return Losses(loss, terms, own_LE, probs_LE)


def replay_of(arrays: Tensors) -> Callable[[int], tuple[mx.array, None]] | None:
    """The experts that a batch names, weighed by the gates as they are: those of a policy of before
    or of sampling (R2 and R3 of 2510.11370); None where it names none."""
    return partial(_replayed, arrays["picks"]) if "picks" in arrays else None


def _replayed(picks_BTLK: mx.array, layer: int) -> tuple[mx.array, None]:
    return picks_BTLK[:, :, layer].flatten(0, 1), None


def tensors_of(batch: Batch) -> Tensors:
    """`ids`, `labels` and `segments` [B, T] of a batch, and its other arrays by their names; `at`:
    where its labels are, in row order [N], since MLX cannot find that out."""
    arrays = {"ids": batch.ids_BT, "labels": batch.labels_BT, "segments": batch.segments_BT}
    arrays["at"] = np.flatnonzero(batch.labels_BT != IGNORE).astype(np.int32)
    return {name: mx.array(array) for name, array in (arrays | dict(batch.extra)).items()}


def count_picks(model: Model, batch: Batch) -> mx.array:
    """How often a batch's tokens choose each expert, [L, E], by a pass without logits."""
    arrays = tensors_of(batch)
    out = model(arrays["ids"], segments_BT=arrays["segments"], want_logits=False)
    return picks_of(out, arrays["segments"])


def picks_of(out: Output, segments_BT: mx.array) -> mx.array:
    """How often the tokens that are no padding chose each expert, [L, E]."""
    probs_LBTE, ids_LBTK = _routed(out, segments_BT)
    return _picks(ids_LBTK, segments_BT, probs_LBTE.shape[-1])


def at_labels(
    model: Model,
    hidden_BTD: mx.array | None,
    batch: Tensors,
    function: Callable[..., tuple[mx.array, ...]],
    *others: mx.array,
) -> tuple[mx.array, ...]:
    """What a function of (logits [n, V], labels [n], others [n, ...]) makes of each label, [B, T];
    0 where there is none. It gets as many labels at a time as `TILE_BYTES` hold logits."""
    assert hidden_BTD is not None
    labels_BT, at_N = batch["labels"], batch["at"]
    x_ND, labels_N = hidden_BTD.flatten(0, 1)[at_N], labels_BT.flatten()[at_N]
    size = max(1, TILE_BYTES // (4 * model.config.vocab_size))
    weight = model.head_weight  # an argument: else its gradient would be lost

    def tile(first: int, weight: mx.array, x_nD: mx.array) -> tuple[mx.array, ...]:
        rest = (x[first : first + size] for x in (labels_N, *others))  # have no gradient
        return function(model.head_by(weight, x_nD).astype(mx.float32), *rest)

    if len(at_N) <= size:
        found = tile(0, weight, x_ND)
    else:
        parts = [
            mx.checkpoint(partial(tile, i))(weight, x_ND[i : i + size])
            for i in range(0, len(at_N), size)
        ]
        found = tuple(mx.concatenate(list(part)) for part in zip(*parts, strict=True))
    none_M = mx.zeros(labels_BT.size, mx.float32)
    return tuple(none_M.at[at_N].add(x_N).reshape(labels_BT.shape) for x_N in found)


def label_log_probs(
    logits_NV: mx.array, labels_N: mx.array, temperature: float = 1
) -> tuple[mx.array]:
    """log softmax(logits / temperature)[label] in nats. [N]"""
    if temperature != 1:
        logits_NV = logits_NV / temperature
    return (-nn.losses.cross_entropy(logits_NV, labels_N),)


def label_details(logits_NV: mx.array, labels_N: mx.array) -> tuple[mx.array, ...]:
    """The log-probabilities, whether the label was the first choice, the entropy in nats, and the
    mean of all logits."""
    still_NV = mx.stop_gradient(logits_NV)
    hit_N = (mx.argmax(still_NV, axis=-1) == labels_N).astype(mx.float32)
    logp_NV = _log_softmax(still_NV)
    entropy_N = -(mx.exp(logp_NV) * logp_NV).sum(-1)
    return *label_log_probs(logits_NV, labels_N), hit_N, entropy_N, still_NV.mean(-1)


def next_token(labels: AtLabels, batch: Tensors, objective: Any, counts: Counts) -> Terms:
    """Cross-entropy of the labels."""
    count = counts.own["labels"]
    lp_BT, *details = labels(label_details if objective.details else label_log_probs)
    nats_BT = -lp_BT * mx.exp(mx.stop_gradient(lp_BT)) if objective.dft else -lp_BT
    terms = {"ce": nats_BT.sum() / count}
    for name, value_BT in zip(("mean_token_accuracy", "entropy"), details, strict=False):
        terms[name] = value_BT.sum() / count
    return terms


def dpo(labels: AtLabels, batch: Tensors, objective: Any, counts: Counts) -> Terms:
    """Preference of the chosen answer over the rejected one, against a reference."""
    o, (lp_BT, *details) = objective, labels(label_details)
    mask_BT = (batch["labels"] != IGNORE).astype(mx.float32)
    length_B1 = mask_BT.sum(1, keepdims=True)
    shorter_B1 = mx.repeat(length_B1.reshape(-1, 2).min(1), 2)[:, None]
    weight_BT = mx.where(mx.cumsum(mask_BT, axis=1) <= shorter_B1, 1.0, o.ld_alpha) * mask_BT
    own_P2 = (lp_BT * weight_BT).sum(1).reshape(-1, 2)
    gain_P2 = own_P2 - (batch["reference"] * weight_BT).sum(1).reshape(-1, 2)
    means = o.kind in ("ipo", "sigmoid_norm")
    scores_P2 = gain_P2 / mx.maximum(length_B1, 1).reshape(-1, 2) if means else gain_P2
    d_P = scores_P2[:, 0] - scores_P2[:, 1]
    loss_P, opposite_P = _softplus(-o.beta * d_P), _softplus(o.beta * d_P)
    e = o.label_smoothing
    if o.kind == "ipo":
        loss_P = mx.square(d_P - 1 / (2 * o.beta))
    elif o.kind == "robust":
        loss_P = ((1 - e) * loss_P - e * opposite_P) / (1 - 2 * e)
    else:
        loss_P = (1 - e) * loss_P + e * opposite_P
    terms = {"dpo": loss_P.sum() / counts.own["pairs"]}
    if o.sft:
        terms["nll_loss"] = -lp_BT[::2].sum() / counts.own["chosen"]
    return terms | _rewards(o.beta * gain_P2, own_P2, counts) | _details(details, counts)


def orpo(labels: AtLabels, batch: Tensors, objective: Any, counts: Counts) -> Terms:
    """Cross-entropy of the chosen answers, and the odds of chosen over rejected."""
    (lp_BT,) = labels(label_log_probs)
    answer_BT = batch["answer"].astype(mx.float32)
    x_P2 = ((lp_BT * answer_BT).sum(1) / mx.maximum(answer_BT.sum(1), 1)).reshape(-1, 2)
    odds_P2 = x_P2 - _log1mexp(x_P2)
    d_P = odds_P2[:, 0] - odds_P2[:, 1]
    terms = {
        "nll_loss": -lp_BT[::2].sum() / counts.own["chosen"],
        "log_odds_ratio": -_softplus(-d_P).sum() / counts.own["pairs"],
        "log_odds_chosen": d_P.sum() / counts.own["pairs"],
    }
    return terms | _rewards(objective.beta * x_P2, x_P2, counts)


def grpo(labels: AtLabels, batch: Tensors, objective: Any, counts: Counts) -> Terms:
    """Clipped policy gradient of sampled rows, and the divergence from a reference."""
    o, mask_BT = objective, (batch["labels"] != IGNORE).astype(mx.float32)
    lp_BT, _, entropy_BT, _ = labels(partial(_tempered, temperature=o.temperature))
    old_BT = batch["old"] if "old" in batch else mx.stop_gradient(lp_BT)
    length_B1 = mx.maximum(mask_BT.sum(1, keepdims=True), 1)
    token_BT = log_BT = (lp_BT - old_BT) * mask_BT
    if o.level == "sequence":
        log_BT = mx.broadcast_to(token_BT.sum(1, keepdims=True) / length_B1, token_BT.shape)
    ratio_BT, a_B1 = mx.exp(log_BT), batch["advantages"][:, None]
    low, high = 1 - o.epsilon, 1 + o.epsilon_high
    loss_BT = -mx.minimum(ratio_BT * a_B1, mx.clip(ratio_BT, low, high) * a_B1)
    terms: Terms = {}
    if o.beta:
        d_BT = (batch["reference"] - lp_BT) * mask_BT
        kl_BT = (mx.exp(d_BT) - d_BT - 1) * mx.exp(token_BT)
        loss_BT = loss_BT + o.beta * kl_BT
        terms["kl"] = mx.stop_gradient(kl_BT).sum() / counts.own["labels"]
    weight_BT = mask_BT / length_B1 if o.kind == "grpo" else mask_BT
    if o.kind == "bnpo":
        weight_BT = mask_BT / mx.maximum(mask_BT.sum(), 1)
    terms["policy"] = (loss_BT * weight_BT).sum() / counts.own["policy"]
    below, above = (ratio_BT < low) & (a_B1 < 0), (ratio_BT > high) & (a_B1 > 0)
    logged = {
        "entropy": entropy_BT,
        "clip_ratio/low_mean": below * mask_BT,
        "clip_ratio/high_mean": above * mask_BT,
        "clip_ratio/region_mean": (below | above) * mask_BT,
    }
    terms |= {k: mx.stop_gradient(x).sum() / counts.own["labels"] for k, x in logged.items()}
    # Of an answer, the least and the most; one without labels counts for neither.
    low_B = (below * mask_BT).sum(1) / length_B1[:, 0] + (mask_BT.sum(1) == 0)
    terms["clip_ratio/low_min"] = low_B.min()
    terms["clip_ratio/high_max"] = ((above * mask_BT).sum(1) / length_B1[:, 0]).max()
    return terms


def distill(labels: AtLabels, batch: Tensors, objective: Any, counts: Counts) -> Terms:
    """Divergence from a teacher, and cross-entropy."""
    kd_BT, lp_BT = labels(partial(_divergence, objective), batch["teacher"])
    count = counts.own["labels"]
    return {"kd": kd_BT.sum() / count, "ce": -lp_BT.sum() / count}


OBJECTIVES: dict[str, Callable[[AtLabels, Tensors, Any, Counts], Terms]] = {
    "next-token": next_token,
    "dpo": dpo,
    "orpo": orpo,
    "grpo": grpo,
    "distill": distill,
}


def _tempered(logits_NV: mx.array, labels_N: mx.array, temperature: float) -> tuple[mx.array, ...]:
    return label_details(logits_NV / temperature, labels_N)


def _divergence(
    objective: Any, logits_NV: mx.array, labels_N: mx.array, teacher_NV: mx.array
) -> tuple[mx.array, mx.array]:
    """`common.training.losses.divergence` of each label, and its log-probability."""
    T, beta = objective.temperature, objective.jsd
    s, t = _log_softmax(logits_NV / T), _log_softmax(teacher_NV.astype(mx.float32) / T)
    if beta is None:
        kd_N = T**2 * _kl(t, s)
    elif beta in (0, 1):
        kd_N = _kl(s, t) if beta else _kl(t, s)
    else:
        m = mx.logaddexp(t + math.log(beta), s + math.log1p(-beta))
        kd_N = beta * _kl(t, m) + (1 - beta) * _kl(s, m)
    return kd_N, *label_log_probs(logits_NV, labels_N)


def _kl(p_NV: mx.array, q_NV: mx.array) -> mx.array:
    """KL(p || q) of log-probabilities. [N]"""
    return (mx.exp(p_NV) * (p_NV - q_NV)).sum(-1)


def _log_softmax(x: mx.array) -> mx.array:
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, 0.0)


def _rewards(rewards_P2: mx.array, lp_P2: mx.array, counts: Counts) -> Terms:
    """What is logged of pairs, none of it to be trained."""
    rewards_P2, lp_P2 = mx.stop_gradient(rewards_P2), mx.stop_gradient(lp_P2)
    chosen, rejected = rewards_P2[:, 0], rewards_P2[:, 1]
    logged = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(mx.float32),
        "logps/chosen": lp_P2[:, 0],
        "logps/rejected": lp_P2[:, 1],
    }
    return {name: x_P.sum() / counts.own["pairs"] for name, x_P in logged.items()}


def _details(details: Sequence[mx.array], counts: Counts) -> Terms:
    """What is logged of the labels of pairs."""
    hit_BT, entropy_BT, mean_BT = details
    return {
        "entropy": entropy_BT.sum() / counts.own["labels"],
        "mean_token_accuracy": hit_BT[::2].sum() / counts.own["chosen"],
        "logits/chosen": mean_BT[::2].sum() / counts.own["chosen"],
        "logits/rejected": mean_BT[1::2].sum() / counts.own["rejected"],
    }


def _log1mexp(x: mx.array) -> mx.array:
    """log(1 - e^x) for x < 0. Each branch computes where it is used only: a gradient of the other
    would be NaN times 0."""
    x = mx.minimum(x, -1e-12)
    near = x > -math.log(2)
    return mx.where(
        near,
        mx.log(-mx.expm1(mx.where(near, x, -1.0))),
        mx.log1p(-mx.exp(mx.where(near, -1.0, x))),
    )


def anchor_terms(
    out: Output,
    probs_LBTE: mx.array,
    ids_LBTK: mx.array,
    batch: Tensors,
    counts: Counts,
    config: ModelConfig | GuestConfig,
) -> Terms:
    """Distance from a reference router on the same tokens: KL(router || reference), and the share
    of the picks that are not the reference's.

    The reference is `reference_probs` [B, T, L, E] of the batch, a frozen model's on its own
    states, or else the frozen gates (`MoE.anchor`) on this model's states, without gradient into
    those. Its picks are `reference_ids` [B, T, L, K] where the batch has them.
    """
    real_BT, count = batch["segments"] >= 0, max(counts.tokens * len(probs_LBTE), 1)
    terms, reference_LBTE = {}, None
    if "reference_probs" in batch:
        reference_LBTE = batch["reference_probs"].transpose(2, 0, 1, 3)
    elif out.routing[0].reference_TE is not None:
        reference_LTE = mx.stack([r.reference_TE for r in out.routing])  # type: ignore[misc]
        reference_LBTE = reference_LTE.reshape(len(reference_LTE), *real_BT.shape, -1)
    if reference_LBTE is not None:
        per_LBTE = probs_LBTE * (_log(probs_LBTE) - _log(reference_LBTE))
        terms["anchor"] = _sum(per_LBTE.sum(-1), real_BT) / count
    if "reference_ids" in batch:
        known_LBTK = batch["reference_ids"].transpose(2, 0, 1, 3)
    elif reference_LBTE is not None:
        known_LBTK = mx.stack(
            [_likeliest(p, tiers(config, x)) for x, p in enumerate(reference_LBTE)]
        )
    else:
        return terms
    same_LBTK = (ids_LBTK[..., :, None] == known_LBTK[..., None, :]).any(-1)
    moved = _sum((~same_LBTK).astype(mx.float32).mean(-1), real_BT) / count
    return terms | {"router/shift": mx.stop_gradient(moved)}


def _likeliest(probs_BTE: mx.array, parts: list[tuple[slice, int]]) -> mx.array:
    """The likeliest experts of each tier."""
    found = [mx.argsort(-probs_BTE[..., part], axis=-1)[..., :k] + part.start for part, k in parts]
    return mx.concatenate(found, axis=-1)


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
    return terms | {"router/entropy": mx.stop_gradient(_sum(entropy, real_BT)) / tokens}


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
