"""The losses of the torch backend: a formula for each objective, and the routing terms all share.

A term is a batch's sum over a count of the whole update (`Counts`), so micro-batches add up to the
joined batch, uneven ones too. The formulas are those of `common.training.losses`; a new objective
is a function here under its name in OBJECTIVES.

Shape legend: B batch, T tokens, N labels, P pairs, V vocabulary, L layers, E experts, K top-k,
J lookahead steps + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chronos.backends.torch.model import Model, Output
from chronos.common.data import IGNORE, Batch
from chronos.common.errors import UsageError
from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import GuestConfig
from chronos.common.model.history import balance_scale, tiers
from chronos.common.training.memory import TILE_BYTES
from chronos.common.training.objectives import Counts, Objective

Tensors = Mapping[str, Tensor]
Terms = dict[str, Tensor]
AtLabels = Callable[..., tuple[Tensor, ...]]  # `at_labels` of a model and a batch


class Losses(NamedTuple):
    """What a micro-batch adds to its update: the loss to differentiate, its terms, and the picks
    and the probabilities of its tokens, summed, the latter as they count for the balance."""

    loss: Tensor
    terms: Terms
    picks_LE: Tensor
    probs_LE: Tensor


def states(model: Model, batch: Batch, objective: Objective, **options: Any) -> Output:
    """What an objective is computed from. options: of the model's call."""
    arrays = tensors_of(batch, model.device)
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
    picks_LE: Tensor | None,
    out: Output | None = None,
) -> Losses:
    """One batch's part of an update's loss.

    picks_LE: those of the whole update, whose fractions f the balance term (2101.03961, eq. 4) is
    made of; None where this batch is all of it. out: its `states`, where they are there already.
    Raises UsageError for an unknown objective.
    """
    formula = OBJECTIVES.get(objective.name)
    if formula is None:
        raise UsageError(f"the torch backend has no loss for {objective.name!r}")
    arrays = tensors_of(batch, model.device)
    segments_BT = arrays["segments"]
    out = out or states(model, batch, objective)
    weights, (probs_LBTE, ids_LBTK) = objective.weights, _routed(out, segments_BT)
    terms = formula(partial(at_labels, model, out.hidden, arrays), arrays, objective, counts)
    terms |= routing_terms(probs_LBTE, ids_LBTK, segments_BT, objective, counts)
    terms |= anchor_terms(out, probs_LBTE, ids_LBTK, arrays, counts, model.config)
    if out.lookahead is not None:
        terms |= lookahead_terms(out.lookahead, probs_LBTE, ids_LBTK, segments_BT, counts)
    own_LE = _picks(ids_LBTK, segments_BT, probs_LBTE.shape[-1])
    scale_LE = torch.from_numpy(balance_scale(model.config)).to(probs_LBTE)
    probs_LE = probs_LBTE[:, segments_BT >= 0].sum(1) * scale_LE
    balance = _balance(own_LE if picks_LE is None else picks_LE, probs_LE, counts)
    mix = terms | {"balance": balance}
    loss = torch.stack([w * mix[name] for name, w in weights.items() if w and name in mix]).sum()
    return Losses(loss, terms, own_LE, probs_LE)


def replay_of(arrays: Tensors) -> Callable[[int], tuple[Tensor, None]] | None:
    """The experts that a batch names, weighed by the gates as they are: those of a policy of before
    or of sampling (R2 and R3 of 2510.11370); None where it names none."""
    return partial(_replayed, arrays["picks"]) if "picks" in arrays else None


def _replayed(picks_BTLK: Tensor, layer: int) -> tuple[Tensor, None]:
    return picks_BTLK[:, :, layer].flatten(0, 1).long(), None


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
    out = model(arrays["ids"], segments_BT=arrays["segments"], want_logits=False)
    return picks_of(out, arrays["segments"])


def picks_of(out: Output, segments_BT: Tensor) -> Tensor:
    """How often the tokens that are no padding chose each expert, [L, E]."""
    probs_LBTE, ids_LBTK = _routed(out, segments_BT)
    return _picks(ids_LBTK, segments_BT, probs_LBTE.shape[-1])


def at_labels(
    model: Model,
    hidden_BTD: Tensor | None,
    batch: Tensors,
    function: Callable[..., tuple[Tensor, ...]],
    *others: Tensor,
) -> tuple[Tensor, ...]:
    """What a function of (logits [n, V], labels [n], others [n, ...]) makes of each label, [B, T];
    0 where there is none. It gets as many labels at a time as `TILE_BYTES` hold logits."""
    assert hidden_BTD is not None
    labels_BT = batch["labels"]
    at_N = (labels_BT.flatten() != IGNORE).nonzero()[:, 0]
    x_ND, labels_N = hidden_BTD.flatten(0, 1)[at_N], labels_BT.flatten()[at_N]
    size = max(1, TILE_BYTES // (4 * model.config.vocab_size))

    def tile(x_nD: Tensor, labels_n: Tensor, *others_n: Tensor) -> tuple[Tensor, ...]:
        return function(model.head(x_nD).float(), labels_n, *others_n)

    if len(at_N) <= size:
        found = tile(x_ND, labels_N, *others)
    else:
        tiles = zip(*(x.split(size) for x in (x_ND, labels_N, *others)), strict=True)
        parts = [checkpoint(tile, *each, use_reentrant=False) for each in tiles]
        found = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    none_M = x_ND.new_zeros(labels_BT.numel(), dtype=torch.float32)
    return tuple(none_M.index_put((at_N,), x_N).view_as(labels_BT) for x_N in found)


def label_log_probs(logits_NV: Tensor, labels_N: Tensor, temperature: float = 1) -> tuple[Tensor]:
    """log softmax(logits / temperature)[label] in nats. [N]"""
    if temperature != 1:
        logits_NV = logits_NV / temperature
    return (-F.cross_entropy(logits_NV, labels_N, reduction="none"),)


def label_details(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, ...]:
    """The log-probabilities, whether the label was the first choice, the entropy in nats, and the
    mean of all logits."""
    with torch.no_grad():
        hit_N = (logits_NV.argmax(-1) == labels_N).float()
        logp_NV = logits_NV.log_softmax(-1)
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        mean_N = logits_NV.mean(-1)
    return *label_log_probs(logits_NV, labels_N), hit_N, entropy_N, mean_N


def next_token(labels: AtLabels, batch: Tensors, objective: Any, counts: Counts) -> Terms:
    """Cross-entropy of the labels."""
    count = counts.own["labels"]
    lp_BT, *details = labels(label_details if objective.details else label_log_probs)
    nats_BT = -lp_BT * lp_BT.detach().exp() if objective.dft else -lp_BT
    terms = {"ce": nats_BT.sum() / count}
    for name, value_BT in zip(("mean_token_accuracy", "entropy"), details, strict=False):
        terms[name] = value_BT.sum() / count
    return terms


def dpo(labels: AtLabels, batch: Tensors, objective: Any, counts: Counts) -> Terms:
    """Preference of the chosen answer over the rejected one, against a reference."""
    o, (lp_BT, *details) = objective, labels(label_details)
    mask_BT = (batch["labels"] != IGNORE).float()
    length_B1 = mask_BT.sum(1, keepdim=True)
    shorter_B1 = length_B1.view(-1, 2).amin(1).repeat_interleave(2)[:, None]
    weight_BT = torch.where(mask_BT.cumsum(1) <= shorter_B1, 1.0, o.ld_alpha) * mask_BT
    own_P2 = (lp_BT * weight_BT).sum(1).view(-1, 2)
    gain_P2 = own_P2 - (batch["reference"] * weight_BT).sum(1).view(-1, 2)
    means = o.kind in ("ipo", "sigmoid_norm")
    scores_P2 = gain_P2 / length_B1.clamp(min=1).view(-1, 2) if means else gain_P2
    d_P = scores_P2[:, 0] - scores_P2[:, 1]
    loss_P, opposite_P, e = F.softplus(-o.beta * d_P), F.softplus(o.beta * d_P), o.label_smoothing
    if o.kind == "ipo":
        loss_P = (d_P - 1 / (2 * o.beta)).square()
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
    answer_BT = batch["answer"].float()
    x_P2 = ((lp_BT * answer_BT).sum(1) / answer_BT.sum(1).clamp(min=1)).view(-1, 2)
    odds_P2 = x_P2 - _log1mexp(x_P2)
    d_P = odds_P2[:, 0] - odds_P2[:, 1]
    terms = {
        "nll_loss": -lp_BT[::2].sum() / counts.own["chosen"],
        "log_odds_ratio": F.logsigmoid(d_P).sum() / counts.own["pairs"],
        "log_odds_chosen": d_P.sum() / counts.own["pairs"],
    }
    return terms | _rewards(objective.beta * x_P2, x_P2, counts)


def grpo(labels: AtLabels, batch: Tensors, objective: Any, counts: Counts) -> Terms:
    """Clipped policy gradient of sampled rows, and the divergence from a reference."""
    o, mask_BT = objective, (batch["labels"] != IGNORE).float()
    lp_BT, _, entropy_BT, _ = labels(partial(_tempered, temperature=o.temperature))
    old_BT = batch["old"] if "old" in batch else lp_BT.detach()
    length_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
    token_BT = log_BT = (lp_BT - old_BT) * mask_BT
    if o.level == "sequence":
        log_BT = (token_BT.sum(1, keepdim=True) / length_B1).expand_as(token_BT)
    ratio_BT, a_B1 = log_BT.exp(), batch["advantages"][:, None]
    low, high = 1 - o.epsilon, 1 + o.epsilon_high
    loss_BT = -torch.minimum(ratio_BT * a_B1, ratio_BT.clamp(low, high) * a_B1)
    terms: Terms = {}
    if o.beta:
        d_BT = (batch["reference"] - lp_BT) * mask_BT
        kl_BT = (d_BT.exp() - d_BT - 1) * token_BT.exp()
        loss_BT = loss_BT + o.beta * kl_BT
        terms["kl"] = kl_BT.detach().sum() / counts.own["labels"]
    weight_BT = mask_BT / length_B1 if o.kind == "grpo" else mask_BT
    if o.kind == "bnpo":
        weight_BT = mask_BT / mask_BT.sum().clamp(min=1)
    terms["policy"] = (loss_BT * weight_BT).sum() / counts.own["policy"]
    below, above = (ratio_BT < low) & (a_B1 < 0), (ratio_BT > high) & (a_B1 > 0)
    logged = {
        "entropy": entropy_BT,
        "clip_ratio/low_mean": below * mask_BT,
        "clip_ratio/high_mean": above * mask_BT,
        "clip_ratio/region_mean": (below | above) * mask_BT,
    }
    terms |= {k: x.detach().sum() / counts.own["labels"] for k, x in logged.items()}
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


def _tempered(logits_NV: Tensor, labels_N: Tensor, temperature: float) -> tuple[Tensor, ...]:
    return label_details(logits_NV / temperature, labels_N)


def _divergence(
    objective: Any, logits_NV: Tensor, labels_N: Tensor, teacher_NV: Tensor
) -> tuple[Tensor, Tensor]:
    """`common.training.losses.divergence` of each label, and its log-probability."""
    T, beta = objective.temperature, objective.jsd
    s, t = (logits_NV / T).log_softmax(-1), (teacher_NV.float() / T).log_softmax(-1)
    if beta is None:
        kd_N = T**2 * _kl(t, s)
    elif beta in (0, 1):
        kd_N = _kl(s, t) if beta else _kl(t, s)
    else:
        m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
        kd_N = beta * _kl(t, m) + (1 - beta) * _kl(s, m)
    return kd_N, *label_log_probs(logits_NV, labels_N)


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities. [N]"""
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1)


def _rewards(rewards_P2: Tensor, lp_P2: Tensor, counts: Counts) -> Terms:
    """What is logged of pairs, none of it to be trained."""
    chosen, rejected = rewards_P2.detach().unbind(1)
    logged = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": lp_P2[:, 0].detach(),
        "logps/rejected": lp_P2[:, 1].detach(),
    }
    return {name: x_P.sum() / counts.own["pairs"] for name, x_P in logged.items()}


def _details(details: Sequence[Tensor], counts: Counts) -> Terms:
    """What is logged of the labels of pairs."""
    hit_BT, entropy_BT, mean_BT = details
    return {
        "entropy": entropy_BT.sum() / counts.own["labels"],
        "mean_token_accuracy": hit_BT[::2].sum() / counts.own["chosen"],
        "logits/chosen": mean_BT[::2].sum() / counts.own["chosen"],
        "logits/rejected": mean_BT[1::2].sum() / counts.own["rejected"],
    }


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0. Each branch computes where it is used only: a gradient of the other
    would be NaN times 0."""
    x = x.clamp(max=-1e-12)
    near = x > -math.log(2)
    return torch.where(
        near,
        (-torch.where(near, x, -1.0).expm1()).log(),
        (-torch.where(near, -1.0, x).exp()).log1p(),
    )


def anchor_terms(
    out: Output,
    probs_LBTE: Tensor,
    ids_LBTK: Tensor,
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
        reference_LBTE = batch["reference_probs"].permute(2, 0, 1, 3)
    elif out.routing[0].reference_TE is not None:
        reference_LTE = torch.stack([r.reference_TE for r in out.routing])  # type: ignore[misc]
        reference_LBTE = reference_LTE.unflatten(1, real_BT.shape)
    if reference_LBTE is not None:
        p, r = probs_LBTE.clamp(min=1e-9).log(), reference_LBTE.clamp(min=1e-9).log()
        terms["anchor"] = ((probs_LBTE * (p - r)).sum(-1) * real_BT).sum() / count
    if "reference_ids" in batch:
        known_LBTK = batch["reference_ids"].permute(2, 0, 1, 3)
    elif reference_LBTE is not None:
        known_LBTK = torch.stack(
            [_likeliest(p, tiers(config, x)) for x, p in enumerate(reference_LBTE)]
        )
    else:
        return terms
    same_LBTK = (ids_LBTK[..., :, None] == known_LBTK[..., None, :]).any(-1)
    moved = ((~same_LBTK).float().mean(-1) * real_BT).sum() / count
    return terms | {"router/shift": moved}


def _likeliest(probs_BTE: Tensor, parts: list[tuple[slice, int]]) -> Tensor:
    """The likeliest experts of each tier."""
    found = [probs_BTE[..., part].topk(k, dim=-1).indices + part.start for part, k in parts]
    return torch.cat(found, dim=-1)


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
    return terms | {"router/entropy": (entropy * real_BT).sum().detach() / tokens}


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
