"""The network of the full-stack forecaster, its gradients written out by hand: NumPy, float32.

It sees the routing of every layer - of the token under way where it has been served, else of the
token before - and how often each expert was used lately, at several speeds of fading. It answers
for every (layer, expert) twice: the chance of use at the layer's next turn, and the discounted use
over the turns after that. Three ways lead from input to output, summed before the sigmoid:

- through one hidden layer that joins the whole stack, entered and left by a low-rank map per layer;
- from a layer's own last ids to its own experts, a matrix per layer (left out where E is large);
- from an expert's own history to itself, a handful of weights: a calibrated decayed LFU.

Not covered: where inputs come from and what answers are for (`forecast`), how to train (`fit`).

Shape legend: B batch, L layers, E experts, I inputs of an expert (ids, then one per decay), R rank,
H hidden units, O the two answers. Biases are part of `bias_LOE` and `moment_LH`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Params = dict[str, Floats]

DECAYS = (0.5, 0.8, 0.95, 0.99)
INPUTS, ANSWERS = 1 + len(DECAYS), 2
BLENDED = 7  # numbers that say how far to trust a memory's vote: see `blend`
_FLOOR = 0.02  # added to a share of use before its logarithm: under one use in 50 turns is seldom
_OWN_LIMIT = 4_000_000  # weights of the own-layer matrices beyond which they are left out


@dataclass(frozen=True)
class Geometry:
    """Sizes of a network. `hidden` and `rank` decide its cost, the others are the model's."""

    layers: int
    experts: int
    top_k: int
    hidden: int = 512
    rank: int = 32

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter names and shapes."""
        L, E, H, R = self.layers, self.experts, self.hidden, self.rank
        shapes: dict[str, tuple[int, ...]] = {
            "enter": (L, INPUTS * E, R),
            "join": (L * R, H),
            "moment": (L, H),
            "part": (H, L * R),
            "leave": (L, R, ANSWERS * E),
            "self": (L, INPUTS, ANSWERS * E),
            "bias": (L, ANSWERS * E),
            "blend": (ANSWERS, BLENDED),
        }
        if L * E * ANSWERS * E <= _OWN_LIMIT:
            shapes["own"] = (L, E, ANSWERS * E)
        return shapes


def initial(geometry: Geometry, seed: int) -> Params:
    """Parameters that answer top_k / E everywhere, whatever the input."""
    rng = np.random.default_rng(seed)
    params = {name: np.zeros(shape, np.float32) for name, shape in geometry.shapes.items()}
    for name, fan_in in (
        ("enter", INPUTS * geometry.experts),
        ("join", geometry.layers * geometry.rank),
        ("part", geometry.hidden),
    ):
        noise = rng.standard_normal(params[name].shape, np.float32)
        params[name] = noise * np.float32(fan_in**-0.5)
    params["blend"][:, 0] = 1.0  # no trust in votes
    share = min(geometry.top_k / geometry.experts, 0.99)
    params["bias"] += np.float32(np.log(share / (1.0 - share)))
    return params


def history_input(share: NDArray[Any]) -> Floats:
    """Decayed shares of use as the network sees them: logarithms of about -1 to 1."""
    value: Floats = (0.5 * np.log(share + np.float32(_FLOOR)) + 1.0).astype(np.float32)
    return value


@dataclass
class Forward:
    """What `forward` leaves for `backward`."""

    inputs_LBIE: Floats
    moment_B: NDArray[np.intp]
    low_BX: Floats  # X = L R
    hidden_BH: Floats
    parted_LBR: Floats
    logits_LBX: Floats  # X = O E
    masks: tuple[Floats | None, Floats | None]  # dropout on low and hidden


def forward(
    params: Mapping[str, Floats],
    inputs_LBIE: Floats,
    moment_B: NDArray[np.intp],
    *,
    drop: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Forward:
    """Logits of a batch. moment_B: the last layer served, 0 to L - 1, L - 1 at a token's end.

    With `drop`, that share of the low-rank inputs and of the hidden units is left out.
    """
    layers, count = inputs_LBIE.shape[:2]
    flat_LBX = inputs_LBIE.reshape(layers, count, -1)
    low = np.matmul(flat_LBX, params["enter"]).transpose(1, 0, 2).reshape(count, -1)
    masks = (_mask(low.shape, drop, rng), _mask((count, params["join"].shape[1]), drop, rng))
    if masks[0] is not None:
        low = low * masks[0]
    hidden = np.maximum(low @ params["join"] + params["moment"][moment_B], 0.0)
    if masks[1] is not None:
        hidden = hidden * masks[1]
    parted = np.ascontiguousarray(
        (hidden @ params["part"]).reshape(count, layers, -1).transpose(1, 0, 2)
    )
    logits = np.matmul(parted, params["leave"])
    logits += params["bias"][:, None]
    if "own" in params:
        logits += np.matmul(inputs_LBIE[:, :, 0], params["own"])
    by_answer = logits.reshape(layers, count, ANSWERS, -1)
    weights_LIOE = params["self"].reshape(layers, INPUTS, ANSWERS, -1)
    for i in range(INPUTS):
        by_answer += inputs_LBIE[:, :, i, None] * weights_LIOE[:, i, None]
    return Forward(inputs_LBIE, moment_B, low, hidden, parted, logits, masks)


def backward(params: Mapping[str, Floats], kept: Forward, dlogits_LBX: Floats) -> Params:
    """Gradients of a loss whose derivative by the logits is given."""
    layers, count = dlogits_LBX.shape[:2]
    x, flat = kept.inputs_LBIE, kept.inputs_LBIE.reshape(layers, count, -1)
    grads: Params = {"bias": dlogits_LBX.sum(1)}
    by_answer = dlogits_LBX.reshape(layers, count, ANSWERS, -1)
    grads["self"] = np.stack(
        [(x[:, :, i, None] * by_answer).sum(1).reshape(layers, -1) for i in range(INPUTS)], 1
    )
    if "own" in params:
        grads["own"] = np.matmul(x[:, :, 0].transpose(0, 2, 1), dlogits_LBX)
    grads["leave"] = np.matmul(kept.parted_LBR.transpose(0, 2, 1), dlogits_LBX)
    dparted = np.matmul(dlogits_LBX, params["leave"].transpose(0, 2, 1))
    dparted = dparted.transpose(1, 0, 2).reshape(count, -1)
    grads["part"] = kept.hidden_BH.T @ dparted
    dhidden = (dparted @ params["part"].T) * (kept.hidden_BH > 0)
    if kept.masks[1] is not None:
        dhidden *= kept.masks[1]
    grads["moment"] = np.zeros_like(params["moment"])
    np.add.at(grads["moment"], kept.moment_B, dhidden)
    grads["join"] = kept.low_BX.T @ dhidden
    dlow = dhidden @ params["join"].T
    if kept.masks[0] is not None:
        dlow *= kept.masks[0]
    dlow = np.ascontiguousarray(dlow.reshape(count, layers, -1).transpose(1, 0, 2))
    grads["enter"] = np.matmul(flat.transpose(0, 2, 1), dlow)
    return grads


def blend_inputs(logits_OLE: Floats, votes_OLE: Floats, likeness: float) -> Floats:
    """[O, 7, L, E]: what `blend` sums up: the network's logit and the vote's, each also times the
    likeness (the vote's times its square, too), a constant and the likeness."""
    share = np.clip(votes_OLE, _FLOOR, 1.0 - _FLOOR)
    vote = np.log(share / (1.0 - share))
    one, c = np.ones_like(vote), np.float32(likeness)
    return np.stack([logits_OLE, logits_OLE * c, vote, vote * c, vote * (c * c), one, one * c], 1)


def blend(weights_O7: Floats, logits_OLE: Floats, votes_OLE: Floats, likeness: float) -> Floats:
    """The network's logits and a memory's votes [O, L, E] as one: `weights_O7` @ `blend_inputs`."""
    c = np.float32(likeness)
    share = np.clip(votes_OLE, _FLOOR, 1.0 - _FLOOR)
    w = weights_O7.T[:, :, None, None]
    mixed: Floats = logits_OLE * (w[0] + w[1] * c) + (w[5] + w[6] * c)
    mixed += np.log(share / (1.0 - share)) * (w[2] + w[3] * c + w[4] * (c * c))
    return mixed


def loss(logits_LBX: Floats, targets_LBX: Floats) -> float:
    """Cross entropy of soft yes-or-no targets, summed over the answers, mean over all else."""
    terms = np.logaddexp(0.0, logits_LBX) - logits_LBX * targets_LBX
    return float(terms.sum(dtype=np.float64) * ANSWERS / logits_LBX.size)


def slope(logits_LBX: Floats, targets_LBX: Floats) -> Floats:
    """Derivative of `loss` by the logits."""
    slope = sigmoid(logits_LBX)
    slope -= targets_LBX
    slope *= np.float32(ANSWERS / logits_LBX.size)
    return slope


def sigmoid(x: Floats) -> Floats:
    value: Floats = x * np.float32(0.5)
    np.tanh(value, out=value)
    value += np.float32(1.0)
    value *= np.float32(0.5)
    return value


def _mask(shape: tuple[int, ...], drop: float, rng: np.random.Generator | None) -> Floats | None:
    if not drop or rng is None:
        return None
    kept = (rng.random(shape, np.float32) >= drop).astype(np.float32)
    return kept / np.float32(1.0 - drop)
