"""The training objectives as formulas, in float64 NumPy: what the backends' losses must equal.

Router probabilities are kept per layer. A token counts where its segment is not negative; a pair of
tokens counts where both lie in the same segment, so neither padding nor a document's border
contributes to any term. A mean over nothing is 0.

Shape legend: L layers, B batch, T tokens, E experts, K top-k, J lookahead steps + 1, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from chronos.common.data import IGNORE
from chronos.common.training.recall import recall_at

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

# Below this a probability's logarithm says nothing; it keeps an underflow from becoming infinite.
_TINY = 1e-9


def cross_entropy(logits_BTV: Floats, labels_BT: Ints) -> float:
    """Mean -log softmax(logits)[label] over the positions whose label is not -100, in nats."""
    logits = np.asarray(logits_BTV, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(-1))
    target = np.take_along_axis(shifted, np.maximum(labels_BT, 0)[..., None], -1)[..., 0]
    return _mean(log_sum - target, labels_BT != IGNORE)


def balance(probs_LBTE: Floats, ids_LBTK: Ints, segments_BT: Ints) -> float:
    """sum_l E * sum_e f_le * p_le over the whole batch (2101.03961, eq. 4-6): f the share of the
    top-k picks, p the mean probability. It is L when every layer uses its experts evenly."""
    real_BT = segments_BT >= 0
    share_LE = pick_shares(ids_LBTK, segments_BT, probs_LBTE.shape[-1])
    sum_LE = np.asarray(probs_LBTE, np.float64)[:, real_BT].sum(1)
    return balance_of(share_LE, sum_LE / max(int(real_BT.sum()), 1))


def balance_of(share_LE: Floats, mean_LE: Floats) -> float:
    """The same from the shares of the picks and the mean probabilities."""
    return float(share_LE.shape[-1] * (share_LE * mean_LE).sum())


def temporal(probs_LBTE: Floats, segments_BT: Ints) -> float:
    """Mean over layers and neighbours of ||P_t - P_{t-1}||^2."""
    probs = np.asarray(probs_LBTE, np.float64)
    step_LBT = np.square(probs[:, :, 1:] - probs[:, :, :-1]).sum(-1)
    return _mean(step_LBT, same_segment(segments_BT, 1))


def locality(probs_LBTE: Floats, ids_LBTK: Ints, segments_BT: Ints) -> float:
    """Mean over layers and neighbours of -log(mass of P_t on the picks of t - 1)."""
    kept = np.take_along_axis(np.asarray(probs_LBTE, np.float64)[:, :, 1:], ids_LBTK[:, :, :-1], -1)
    return _mean(_surprise(kept.sum(-1)), same_segment(segments_BT, 1))


def lookahead(q_BTJLE: Floats, probs_LBTE: Floats, segments_BT: Ints) -> float:
    """Mean over tokens, steps j and layers of -sum_e P_{t+j,l,e} log Q_{t,j,l,e}; P is a target
    and gets no gradient. `q` are probabilities."""
    target_BTLE = np.moveaxis(np.asarray(probs_LBTE, np.float64), 0, 2)
    return _over_steps(
        q_BTJLE, segments_BT, lambda q, j: (target_BTLE[:, j:] * _surprise(q)).sum(-1)
    )


def lookahead_hit(q_BTJLE: Floats, ids_LBTK: Ints, segments_BT: Ints) -> float:
    """Mean of -log(mass of Q_{t,j,l} on the picks of t + j, over k)."""
    ids_BTLK = np.moveaxis(ids_LBTK, 0, 2)

    def term(q_BTLE: Floats, j: int) -> Floats:
        mass = np.take_along_axis(q_BTLE, ids_BTLK[:, j:], -1).sum(-1)
        return np.asarray(-np.log(np.maximum(mass, _TINY) / ids_LBTK.shape[-1]))

    return _over_steps(q_BTJLE, segments_BT, term)


def recall(q_BTJLE: Floats, ids_LBTK: Ints, segments_BT: Ints, step: int, count: int) -> float:
    """Share of the picks of t + step among the `count` most probable of Q_{t,step}."""
    q_BTLE = q_BTJLE[:, : q_BTJLE.shape[1] - step, step]
    found_BTL = recall_at(q_BTLE, np.moveaxis(ids_LBTK, 0, 2)[:, step:], count)
    return _mean(np.moveaxis(found_BTL, -1, 0), same_segment(segments_BT, step))


def anchor(probs_LBTE: Floats, reference_LBTE: Floats, segments_BT: Ints) -> float:
    """Mean over layers and tokens of KL(router || frozen router on the same tokens)."""
    p, r = np.asarray(probs_LBTE, np.float64), np.asarray(reference_LBTE, np.float64)
    return _mean((p * (_surprise(r) - _surprise(p))).sum(-1), segments_BT >= 0)


def router_entropy(probs_LBTE: Floats, segments_BT: Ints) -> float:
    """Mean over layers and tokens of the entropy of P, in nats."""
    probs = np.asarray(probs_LBTE, np.float64)
    return _mean((probs * _surprise(probs)).sum(-1), segments_BT >= 0)


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """log softmax over the last axis."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result


def label_log_probs(
    logits_BTV: Floats, labels_BT: Ints, temperature: float = 1.0
) -> npt.NDArray[np.float64]:
    """log softmax(logits / temperature)[label] in nats, [B, T]; 0 where there is no label."""
    lp = log_softmax(np.asarray(logits_BTV, np.float64) / temperature)
    taken = np.take_along_axis(lp, np.maximum(labels_BT, 0)[..., None], -1)[..., 0]
    return np.where(labels_BT == IGNORE, 0.0, taken)


def dft(lp_BT: Floats, labels_BT: Ints) -> float:
    """Mean of -p log p of the labels, p without gradient (2508.05629, eq. 8)."""
    return _mean(-np.exp(lp_BT) * lp_BT, labels_BT != IGNORE)


def dpo(
    lp_BT: Floats,
    reference_BT: Floats,
    labels_BT: Ints,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float = 1.0,
) -> dict[str, float]:
    """The loss of `Preference` and what is logged beside it: means over pairs (rows 2i and 2i + 1
    are chosen and rejected), log-probabilities summed over a row's labels. Rewards are of the sums
    for kinds that compare means, too."""
    mask = (labels_BT != IGNORE).astype(np.float64)
    length_B = mask.sum(1)
    shorter_B = np.repeat(length_B.reshape(-1, 2).min(1), 2)
    weight_BT = np.where(mask.cumsum(1) <= shorter_B[:, None], 1.0, ld_alpha) * mask
    own_P2, reference_P2 = (
        (np.asarray(x, np.float64) * weight_BT).sum(1).reshape(-1, 2) for x in (lp_BT, reference_BT)
    )
    gain_P2 = own_P2 - reference_P2
    means = kind in ("ipo", "sigmoid_norm")
    scores_P2 = gain_P2 / np.maximum(length_B, 1).reshape(-1, 2) if means else gain_P2
    d = scores_P2[:, 0] - scores_P2[:, 1]
    loss, opposite = np.logaddexp(0, -beta * d), np.logaddexp(0, beta * d)
    e = label_smoothing
    if kind == "ipo":
        loss = np.square(d - 1 / (2 * beta))
    elif kind == "robust":
        loss = ((1 - e) * loss - e * opposite) / (1 - 2 * e)
    else:
        loss = (1 - e) * loss + e * opposite
    rewards = beta * gain_P2
    return {
        "dpo": float(loss.mean()),
        "rewards/chosen": float(rewards[:, 0].mean()),
        "rewards/rejected": float(rewards[:, 1].mean()),
        "rewards/margins": float((rewards[:, 0] - rewards[:, 1]).mean()),
        "rewards/accuracies": float((rewards[:, 0] > rewards[:, 1]).mean()),
        "logps/chosen": float(own_P2[:, 0].mean()),
        "logps/rejected": float(own_P2[:, 1].mean()),
    }


def orpo(lp_BT: Floats, answer_BT: Bools, labels_BT: Ints, beta: float = 0.1) -> dict[str, float]:
    """The terms of `OddsRatio`: `nll_loss` - beta * `log_odds_ratio` is the loss."""
    lp, answer = np.asarray(lp_BT, np.float64), np.asarray(answer_BT, np.float64)
    x_P2 = ((lp * answer).sum(1) / np.maximum(answer.sum(1), 1)).reshape(-1, 2)
    odds_P2 = x_P2 - log1mexp(x_P2)
    d = odds_P2[:, 0] - odds_P2[:, 1]
    chosen = labels_BT[::2] != IGNORE
    return {
        "nll_loss": float(-(lp[::2] * chosen).sum() / max(int(chosen.sum()), 1)),
        "log_odds_ratio": float(-np.logaddexp(0, -d).mean()),
        "log_odds_chosen": float(d.mean()),
        "rewards/chosen": float(beta * x_P2[:, 0].mean()),
        "rewards/rejected": float(beta * x_P2[:, 1].mean()),
        "rewards/margins": float(beta * (x_P2[:, 0] - x_P2[:, 1]).mean()),
        "rewards/accuracies": float((x_P2[:, 0] > x_P2[:, 1]).mean()),
        "logps/chosen": float(x_P2[:, 0].mean()),
        "logps/rejected": float(x_P2[:, 1].mean()),
    }


def log1mexp(x: Floats) -> npt.NDArray[np.float64]:
    """log(1 - e^x) for x < 0, by expm1 near 0 and log1p elsewhere (Maechler 2012); x is kept
    below -1e-12, where its odds are beyond any use."""
    x = np.minimum(np.asarray(x, np.float64), -1e-12)
    near = x > -np.log(2)
    return np.where(
        near, np.log(-np.expm1(np.where(near, x, -1.0))), np.log1p(-np.exp(np.where(near, -1.0, x)))
    )


def grpo(
    lp_BT: Floats,
    old_BT: Floats,
    reference_BT: Floats,
    advantages_B: Floats,
    labels_BT: Ints,
    *,
    kind: str = "dapo",
    level: str = "token",
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    max_tokens: int = 1,
) -> dict[str, float]:
    """The loss of `PolicyGradient` and what is logged beside it, of one micro-batch alone."""
    mask = (labels_BT != IGNORE).astype(np.float64)
    length_B, labels = mask.sum(1), max(float(mask.sum()), 1.0)
    lp, old = np.asarray(lp_BT, np.float64), np.asarray(old_BT, np.float64)
    token_log = log_BT = lp - old
    if level == "sequence":
        mean_B = (token_log * mask).sum(1) / np.maximum(length_B, 1)
        log_BT = np.broadcast_to(mean_B[:, None], lp.shape)
    ratio, a_BT = np.exp(log_BT), np.asarray(advantages_B, np.float64)[:, None]
    low, high = 1 - epsilon, 1 + epsilon_high
    loss_BT = -np.minimum(ratio * a_BT, np.clip(ratio, low, high) * a_BT)
    d = np.asarray(reference_BT, np.float64) - lp
    kl_BT = (np.exp(d) - d - 1) * np.exp(token_log)
    if beta:
        loss_BT = loss_BT + beta * kl_BT
    rows = max(int((length_B > 0).sum()), 1)
    per_row = (loss_BT * mask).sum(1) / np.maximum(length_B, 1)
    total = float((loss_BT * mask).sum())
    policy = {
        "dapo": total / labels,
        "bnpo": total / labels,
        "grpo": float(per_row.sum()) / rows,
        "dr_grpo": total / (rows * max_tokens),
    }[kind]
    below, above = (ratio < low) & (a_BT < 0), (ratio > high) & (a_BT > 0)
    return {
        "policy": policy,
        "kl": float((kl_BT * mask).sum() / labels),
        "clip_ratio/low_mean": float((below * mask).sum() / labels),
        "clip_ratio/high_mean": float((above * mask).sum() / labels),
        "clip_ratio/region_mean": float(((below | above) * mask).sum() / labels),
    }


def advantages(
    rewards_GN: Floats, *, scale: str = "group", epsilon: float = 1e-4
) -> npt.NDArray[np.float64]:
    """(r - mean) / (std + epsilon) within each group (2402.03300, section 4.1.2), std unbiased.

    NaN is an answer that was not judged: its advantage is 0 and the others of its group do without
    it, as does a group with fewer than two judged. scale: `group`, `batch` (std of all) or `none`.
    """
    r = np.asarray(rewards_GN, np.float64)
    judged = np.isfinite(r)
    count_G = judged.sum(1, keepdims=True)
    filled = np.where(judged, r, 0.0)
    centred = np.where(judged, filled - filled.sum(1, keepdims=True) / np.maximum(count_G, 1), 0.0)
    if scale == "group":
        spread = np.sqrt(np.square(centred).sum(1, keepdims=True) / np.maximum(count_G - 1, 1))
    elif scale == "batch":
        known = r[judged]
        spread = np.array(known.std(ddof=1) if len(known) > 1 else 0.0)
    else:
        spread = np.array(1.0 - epsilon)
    return np.where(judged & (count_G > 1), centred / (spread + epsilon), 0.0)


def divergence(
    logits_NV: Floats, teacher_NV: Floats, temperature: float = 1.0, jsd: float | None = None
) -> npt.NDArray[np.float64]:
    """What `Distillation` takes the mean of over the labels. [N]"""
    s = log_softmax(np.asarray(logits_NV, np.float64) / temperature)
    t = log_softmax(np.asarray(teacher_NV, np.float64) / temperature)

    def kl(p: Floats, q: Floats) -> Any:
        return (np.exp(p) * (p - q)).sum(-1)

    if jsd is None:
        result = temperature**2 * kl(t, s)
    elif jsd in (0, 1):
        result = kl(s, t) if jsd else kl(t, s)
    else:
        m = np.logaddexp(t + np.log(jsd), s + np.log1p(-jsd))
        result = jsd * kl(t, m) + (1 - jsd) * kl(s, m)
    return np.asarray(result, np.float64)


def shift(ids_LBTK: Ints, reference_LBTK: Ints, segments_BT: Ints) -> float:
    """Share of the picks that are not among a reference router's on the same tokens."""
    same = (ids_LBTK[..., :, None] == reference_LBTK[..., None, :]).any(-1)
    return _mean(np.moveaxis(1.0 - same, -1, 0), segments_BT >= 0)


def pick_shares(ids_LBTK: Ints, segments_BT: Ints, num_experts: int) -> npt.NDArray[np.float64]:
    """Each expert's share of its layer's picks. [L, E]"""
    real = ids_LBTK[:, segments_BT >= 0].reshape(len(ids_LBTK), -1)
    return shares(np.stack([np.bincount(ids, minlength=num_experts) for ids in real]))


def shares(picks_LE: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Each row's shares of its sum; zeros where there were no picks."""
    picks = np.asarray(picks_LE, np.float64)
    result: npt.NDArray[np.float64] = picks / np.maximum(picks.sum(-1, keepdims=True), 1)
    return result


def effective_experts(share_LE: Floats) -> npt.NDArray[np.float64]:
    """exp(entropy) of the shares: E when all are used alike, 1 when one takes everything. [L]"""
    result: npt.NDArray[np.float64] = np.exp((share_LE * _surprise(share_LE)).sum(-1))
    return result


def largest_share(share_LE: Floats) -> float:
    """The share of the most used expert of any layer."""
    return float(share_LE.max())


def same_segment(segments_BT: Ints, distance: int) -> Bools:
    """Whether token t and token t + distance are real and of one document. [B, T - distance]"""
    T = segments_BT.shape[1]
    first, second = segments_BT[:, : max(T - distance, 0)], segments_BT[:, distance:]
    result: Bools = (first == second) & (first >= 0)
    return result


def _over_steps(q_BTJLE: Floats, segments_BT: Ints, term: Callable[[Floats, int], Floats]) -> float:
    """Mean of a term [B, T - j, L] over all valid tokens, steps and layers together."""
    q = np.asarray(q_BTJLE, np.float64)
    total, count = 0.0, 0
    for j in range(min(q.shape[2], q.shape[1])):
        valid = same_segment(segments_BT, j)
        values = term(q[:, : q.shape[1] - j, j], j)[valid]
        total, count = total + float(values.sum()), count + values.size
    return total / max(count, 1)


def _surprise(probability: Floats) -> Floats:
    return np.asarray(-np.log(np.maximum(probability, _TINY)))


def _mean(x: Floats, mask_BT: Bools) -> float:
    """Mean of x [..., B, T] where the mask is true."""
    chosen = x[..., mask_BT]
    return float(chosen.sum() / max(chosen.size, 1))
