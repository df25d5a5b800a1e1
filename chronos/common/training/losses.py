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
