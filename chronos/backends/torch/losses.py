"""The losses of the torch backend: a formula for each objective, and the routing terms all share.

A term is a batch's sum over a count of the whole update (`Counts`), so micro-batches add up to the
joined batch, uneven ones too. The formulas are those of `common.training.losses`; a new objective
is a function here under its name in OBJECTIVES.

Shape legend: B batch, T tokens, V vocabulary, L layers, E experts, K top-k, J lookahead steps + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chronos.backends.torch.model import Model, Output
from chronos.common.data import IGNORE, Batch
from chronos.common.errors import UsageError
from chronos.common.training.objectives import Counts, Objective

Tensors = Mapping[str, Tensor]
Terms = dict[str, Tensor]


class Losses(NamedTuple):
    """What a micro-batch adds to its update: the loss to differentiate, its terms, and the picks
    and the probabilities of its tokens, summed."""

    loss: Tensor
    terms: Terms
    picks_LE: Tensor
    probs_LE: Tensor


def losses(
    model: Model, batch: Batch, objective: Objective, counts: Counts, picks_LE: Tensor | None
) -> Losses:
    """One batch's part of an update's loss.

    picks_LE: those of the whole update, whose fractions f the balance term (2101.03961, eq. 4) is
    made of; None where this batch is all of it. Raises UsageError for an unknown objective.
    """
    formula = OBJECTIVES.get(objective.name)
    if formula is None:
        raise UsageError(f"the torch backend has no loss for {objective.name!r}")
    arrays = tensors_of(batch, model.device)
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
    probs_LE = probs_LBTE[:, segments_BT >= 0].sum(1)
    balance = _balance(own_LE if picks_LE is None else picks_LE, probs_LE, counts)
    mix = terms | {"balance": balance}
    loss = torch.stack([w * mix[name] for name, w in weights.items() if w and name in mix]).sum()
    return Losses(loss, terms, own_LE, probs_LE)


def tensors_of(batch: Batch, device: torch.device) -> Tensors:
    """`ids`, `labels` and `segments` [B, T] of a batch, and its other arrays by their names."""
    arrays = {"ids": batch.ids_BT, "labels": batch.labels_BT, "segments": batch.segments_BT}
    found = {name: torch.from_numpy(array).long().to(device) for name, array in arrays.items()}
    extra = {name: torch.from_numpy(array).to(device) for name, array in batch.extra.items()}
    return found | extra


def count_picks(model: Model, batch: Batch) -> Tensor:
    """How often a batch's tokens choose each expert, [L, E], by a pass without logits. As gradients
    are on, its products are those of `losses`, to the last bit."""
    arrays = tensors_of(batch, model.device)
    out = model(arrays["ids"], segments_BT=arrays["segments"], last_only=True)
    probs_LBTE, ids_LBTK = _routed(out, arrays["segments"])
    return _picks(ids_LBTK, arrays["segments"], probs_LBTE.shape[-1])


def label_log_probs(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """log softmax(logits)[label] in nats, [B, T]; 0 where there is no label."""
    nats_N = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(),
        labels_BT.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    )
    return -nats_N.view_as(labels_BT)


def next_token(out: Output, batch: Tensors, objective: Objective, counts: Counts) -> Terms:
    """Cross-entropy of the labels."""
    return {"ce": -label_log_probs(out.logits, batch["labels"]).sum() / max(counts.own, 1)}


OBJECTIVES: dict[str, Callable[[Output, Tensors, Any, Counts], Terms]] = {"next-token": next_token}


def routing_terms(
    probs_LBTE: Tensor, ids_LBTK: Tensor, segments_BT: Tensor, objective: Objective, counts: Counts
) -> Terms:
    """Temporal and locality terms and the router's entropy, pads left out."""
    real_BT = segments_BT >= 0
    both_BT = (segments_BT[:, 1:] == segments_BT[:, :-1]) & real_BT[:, 1:]
    now, before = probs_LBTE[:, :, 1:], probs_LBTE[:, :, :-1]
    tokens, pairs = (max(n * len(probs_LBTE), 1) for n in counts.pairs[:2])
    terms = {"temporal": ((now - before).square().sum(-1) * both_BT).sum() / pairs}
    if objective.weights.get("locality"):
        kept = now.gather(-1, ids_LBTK[:, :, :-1]).sum(-1)
        terms["locality"] = (-kept.clamp(min=1e-9).log() * both_BT).sum() / pairs
    entropy = -(probs_LBTE * probs_LBTE.clamp(min=1e-9).log()).sum(-1)
    return terms | {"entropy": (entropy * real_BT).sum().detach() / tokens}


def lookahead_terms(
    logits_BTJLE: Tensor,
    probs_LBTE: Tensor,
    ids_LBTK: Tensor,
    segments_BT: Tensor,
    counts: Counts,
) -> Terms:
    """Cross-entropy of Q against the detached routing j tokens later, the top-k hit term and the
    share of the routed experts among Q's top-k. The first layer is routed before Q exists."""
    logq = logits_BTJLE.float().log_softmax(-1)
    targets_BTLE, ids_BTLK = probs_LBTE.detach().permute(1, 2, 0, 3), ids_LBTK.permute(1, 2, 0, 3)
    real_BT, T = segments_BT >= 0, segments_BT.shape[1]
    (L, *_, K), J = ids_LBTK.shape, logq.shape[2]
    count = max(sum(counts.pairs[:J]) * L, 1)
    ce, hit, recall = [], [], {}
    for j in range(min(J, T)):
        valid_BT = (segments_BT[:, j:] == segments_BT[:, : T - j]) & real_BT[:, : T - j]
        q_NLE = logq[:, : T - j, j][valid_BT]
        p_NLE, ids_NLK = targets_BTLE[:, j:][valid_BT], ids_BTLK[:, j:][valid_BT]
        ce.append(-(p_NLE * q_NLE).sum())
        mass = q_NLE.gather(-1, ids_NLK).exp().sum(-1)
        hit.append(-(mass.clamp(min=1e-9) / K).log().sum())
        with torch.no_grad():
            guess = torch.zeros_like(p_NLE).scatter_(-1, q_NLE.topk(K).indices, 1.0)
            found = guess.gather(-1, ids_NLK).sum()
            recall[f"recall_{j}"] = found / max(counts.pairs[j] * L * K, 1)
    terms = {"lookahead": torch.stack(ce).sum(), "lookahead_hit": torch.stack(hit).sum()}
    return {name: total / count for name, total in terms.items()} | recall


def _balance(picks_LE: Tensor, probs_LE: Tensor, counts: Counts) -> Tensor:
    share_LE = picks_LE / picks_LE.sum(-1, keepdim=True).clamp(min=1)
    return picks_LE.shape[-1] * (share_LE * probs_LE).sum() / max(counts.tokens, 1)


def _routed(out: Output, segments_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Router probabilities [L, B, T, E] and the ids of the chosen [L, B, T, K]."""
    probs_LTE = torch.stack([r.probs_TE for r in out.routing])
    ids_LTK = torch.stack([r.ids_TK for r in out.routing])
    return probs_LTE.unflatten(1, segments_BT.shape), ids_LTK.unflatten(1, segments_BT.shape)


def _picks(ids_LBTK: Tensor, segments_BT: Tensor, experts: int) -> Tensor:
    real_LBTK = (segments_BT >= 0)[..., None].expand_as(ids_LBTK).float()
    none_LE = real_LBTK.new_zeros(len(ids_LBTK), experts)
    return none_LE.scatter_add(1, ids_LBTK.flatten(1), real_LBTK.flatten(1))
