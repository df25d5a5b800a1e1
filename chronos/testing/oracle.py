"""The whole model in float64 NumPy, written for reading: what every backend is compared with.

It follows the papers, not a backend: MLA in expanded form, masks spelled out, no cache, experts
one after another. Rotations are half-split (NeoX order). Where two experts are equally probable
the one with the lower index comes first. Slow on purpose; for models of a few thousand weights.
Not covered: dropout, caches.

Shape legend: B batch, T tokens, S keys, D hidden, F expert hidden, V vocabulary, L layers,
E experts, K top-k, J lookahead steps + 1, H heads, G key-value heads, d head_dim, r rope_dim,
z latent, U lookahead hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from chronos.common.model.config import ModelConfig, RopeScaling
from chronos.common.model.weights import (
    TensorSpec,
    dense_tensors,
    expert_name,
    lookahead_tensors,
    routed_tensors,
)

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]
Weights = Mapping[str, npt.NDArray[np.floating]]


@dataclass(frozen=True)
class OracleOutput:
    """Logits [B, T, V]; per layer the router's probabilities, the chosen experts, the most probable
    first, and their weights; the LookaheadRouter's logits [B, T, J, L, E] if there are weights for
    it."""

    logits_BTV: Array
    probs_LBTE: Array
    ids_LBTK: npt.NDArray[np.int64]
    weights_LBTK: Array
    lookahead_BTJLE: Array | None


def forward(
    weights: Weights,
    config: ModelConfig,
    ids_BT: Ints,
    *,
    segments_BT: Ints | None = None,
    available_LE: Bools | None = None,
) -> OracleOutput:
    """Run the model over whole sequences.

    segments_BT: a token attends within its own segment only, and positions restart with it.
    available_LE: an expert that is False is replaced by the sum of the shared experts.
    """
    w = _Scope(weights)
    ids_BT = np.asarray(ids_BT)
    segments_BT = np.zeros_like(ids_BT) if segments_BT is None else np.asarray(segments_BT)
    position_BT = _positions(segments_BT)
    x_BTD = w["model.embed_tokens.weight"][ids_BT]
    q_BTJLE: Array | None = None
    routing: list[tuple[Array, npt.NDArray[np.int64], Array]] = []
    for layer in range(config.num_hidden_layers):
        block = w.under(f"model.layers.{layer}.")
        h_BTD = rms_norm(x_BTD, block["input_layernorm.weight"], config.rms_norm_eps)
        attend = _latent if config.attention_kind(layer) == "mla" else _window
        x_BTD = x_BTD + attend(block.under("self_attn."), config, h_BTD, position_BT, segments_BT)
        h_BTD = rms_norm(x_BTD, block["post_attention_layernorm.weight"], config.rms_norm_eps)
        source, mlp = config.routing_of(layer), block.under("mlp.")
        z_BTE = h_BTD @ mlp["gate.weight"].T
        if source in ("informed", "history"):
            v_BTA = h_BTD @ mlp["previous_gate.weight"].T
            z_BTE[..., : v_BTA.shape[-1]] += _before(v_BTA, position_BT)
        if source == "lookahead" and layer > 0:
            assert q_BTJLE is not None, "committed routing needs the LookaheadRouter's weights"
            z_BTE = q_BTJLE[:, :, 0, layer]
        if source == "history":
            z_BTE = _history(config, z_BTE, position_BT)
            probs_BTE, ids_BTK, weights_BTK = route_tiers(config, z_BTE)
        else:
            probs_BTE, top_k = softmax(z_BTE), config.num_experts_per_tok
            ids_BTK, weights_BTK = route(probs_BTE, top_k, config.norm_topk_prob)
        available_E = None if available_LE is None else available_LE[layer]
        x_BTD = x_BTD + _mixture(w, config, layer, h_BTD, ids_BTK, weights_BTK, available_E)
        routing.append((probs_BTE, ids_BTK, weights_BTK))
        if layer == 0 and "lookahead.in_proj.weight" in weights:
            q_BTJLE = _lookahead(w.under("lookahead."), config, x_BTD)
    x_BTD = rms_norm(x_BTD, w["model.norm.weight"], config.rms_norm_eps)
    probs, ids, mix = (np.stack(part) for part in zip(*routing, strict=True))
    return OracleOutput(x_BTD @ w["model.embed_tokens.weight"].T, probs, ids, mix, q_BTJLE)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (1910.07467, eq. 4)."""
    y: Array = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + eps) * weight
    return y


def rope(x: Array, position: Ints, theta: float, scaling: RopeScaling | None = None) -> Array:
    """Rotate pairs (i, i + n/2) of the last axis, of width n, by position * theta^(-2i/n)
    (2104.09864, eq. 15), or as YaRN has it. `position` broadcasts to the shape of x without its
    last axis."""
    half = x.shape[-1] // 2
    frequencies = [yarn(i, 2 * half, theta, scaling) for i in range(half)]
    angle = np.asarray(position)[..., None] * np.array(frequencies)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)


def yarn(pair: int, width: int, theta: float, s: RopeScaling | None) -> float:
    """The frequency of a pair of dimensions (2309.00071, definition 3): a mixture of theta^(-2i/n)
    and of that divided by the factor. Its share falls evenly over the pairs between two bounds:
    those that make beta_fast and beta_slow turns within the context of training."""
    own = theta ** (-2 * pair / width)
    if s is None:
        return float(own)
    # A pair i turns L theta^(-2i/n) / 2 pi times within L tokens; solved for i.
    L = s.original_max_position_embeddings
    fast, slow = (
        width * np.log(L / (turns * 2 * np.pi)) / (2 * np.log(theta))
        for turns in (s.beta_fast, s.beta_slow)
    )
    first, last = max(np.floor(fast), 0), min(np.ceil(slow), width - 1)
    if pair <= first:
        return float(own)
    if pair >= last:
        return float(own / s.factor)
    slowed = (pair - first) / (last - first)
    return float((1 - slowed) * own + slowed * own / s.factor)


def sharpened(scores: Array, s: RopeScaling | None) -> Array:
    """Logits of attention by YaRN's temperature t: sqrt(1/t) = 0.1 ln(factor) + 1 (eq. 22)."""
    if s is None:
        return scores
    root = s.attention_factor or 0.1 * np.log(s.factor) + 1
    return scores * root**2


def softmax(x: Array) -> Array:
    """Over the last axis; -inf entries get probability 0."""
    e: Array = np.exp(x - x.max(-1, keepdims=True))
    p: Array = e / e.sum(-1, keepdims=True)
    return p


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def swiglu(x_TD: Array, gate_up_FD: Array, down_DF: Array) -> Array:
    """down(silu(gate x) * up x) (2002.05202, eq. 6); the gate's rows come first in gate_up."""
    gate_FD, up_FD = np.split(gate_up_FD, 2)
    return (silu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T)) @ down_DF.T


def route(probs_BTE: Array, top_k: int, normalize: bool) -> tuple[npt.NDArray[np.int64], Array]:
    """The k most probable experts and their weights; ties go to the lower index."""
    ids = np.argsort(-probs_BTE, -1, kind="stable")[..., :top_k]
    chosen = np.take_along_axis(probs_BTE, ids, -1)
    return ids, chosen / chosen.sum(-1, keepdims=True) if normalize else chosen


def route_tiers(
    config: ModelConfig, scores_BTE: Array
) -> tuple[Array, npt.NDArray[np.int64], Array]:
    """Of each tier its share of the k, by its scores, the resident one's first; the weights are a
    softmax over all that were chosen. The probabilities are each tier's softmax times its share."""
    split, near, k = (
        config.num_resident_experts,
        config.num_resident_experts_per_tok,
        config.num_experts_per_tok,
    )
    a_BTA, s_BTS = scores_BTE[..., :split], scores_BTE[..., split:]
    probs_BTE = np.concatenate((softmax(a_BTA) * near / k, softmax(s_BTS) * (k - near) / k), -1)
    ids_a, _ = route(a_BTA, near, False)
    ids_s, _ = route(s_BTS, k - near, False)
    ids_BTK = np.concatenate((ids_a, ids_s + split), -1)
    return probs_BTE, ids_BTK, softmax(np.take_along_axis(scores_BTE, ids_BTK, -1))


def visible(segments_BT: Ints, window: int | None) -> Bools:
    """Whether query i may see key j: the same segment, j <= i, and i - window < j. [B, T, T]"""
    index = np.arange(segments_BT.shape[1])
    distance = index[:, None] - index[None, :]
    near = (distance >= 0) & (distance < (window or len(index) + 1))
    result: Bools = near & (segments_BT[:, :, None] == segments_BT[:, None, :])
    return result


def random_weights(config: ModelConfig, seed: int = 0, scale: float = 0.2) -> dict[str, Array]:
    """Every tensor of a model with its LookaheadRouter; norms near one, so that a backend that
    forgets a norm's weight is found out."""
    random = np.random.default_rng(seed)

    def values(spec: TensorSpec) -> Array:
        noise = random.standard_normal(spec.shape) * scale
        # Rounded, so that float32 backends start from exactly these numbers.
        return (noise + ("norm" in spec.name)).astype(np.float32).astype(np.float64)

    specs = dense_tensors(config) + routed_tensors(config) + lookahead_tensors(config)
    return {spec.name: values(spec) for spec in specs}


def read_weights(folder: str | Path) -> dict[str, Array]:
    """All tensors of an unpacked model folder with one model.safetensors, as float64."""
    from chronos.common.disk.tensors import read_tensors

    found: dict[str, Array] = {}
    for name in ("model.safetensors", "lookahead.safetensors"):
        path = Path(folder) / name
        for entry, data in read_tensors(path) if path.exists() else ():
            found[entry.name] = _to_float64(data, entry.dtype).reshape(entry.shape)
    return found


class _Scope:
    """Weights by name under a prefix, in float64."""

    def __init__(self, weights: Weights, prefix: str = "") -> None:
        self.weights, self.prefix = weights, prefix

    def __getitem__(self, name: str) -> Array:
        return np.asarray(self.weights[self.prefix + name], np.float64)

    def under(self, prefix: str) -> _Scope:
        return _Scope(self.weights, self.prefix + prefix)


def _positions(segments_BT: Ints) -> npt.NDArray[np.int64]:
    """How far each token is from the start of its run of equal segments."""
    position_BT = np.zeros(segments_BT.shape, np.int64)
    for t in range(1, segments_BT.shape[1]):
        same = segments_BT[:, t] == segments_BT[:, t - 1]
        position_BT[:, t] = np.where(same, position_BT[:, t - 1] + 1, 0)
    return position_BT


def _before(x_BTX: Array, position_BT: Ints) -> Array:
    """What the token before has, zeros at a document's first token."""
    shifted = np.concatenate((np.zeros_like(x_BTX[:, :1]), x_BTX[:, :-1]), 1)
    return np.where((position_BT == 0)[..., None], 0.0, shifted)


def _history(config: ModelConfig, z_BTE: Array, position_BT: Ints) -> Array:
    """The scores with those of streamed experts replaced, after a document's first token, by the
    mean over its tokens so far, each counting rho times what the one after it does; their weighted
    sum with the norm of the weights for its divisor, where that is asked for."""
    scores_BTE, first = z_BTE.copy(), config.num_resident_experts
    streamed = z_BTE.shape[-1] - first
    for group, rho in enumerate(config.decays):
        groups = len(config.decays)
        part = slice(first + streamed * group // groups, first + streamed * (group + 1) // groups)
        for row, positions in enumerate(position_BT):
            total, weight, square = np.zeros(part.stop - part.start), 0.0, 0.0
            for t, position in enumerate(positions):
                if position:
                    unit = config.history_norm == "unit"
                    scores_BTE[row, t, part] = total / (np.sqrt(square) if unit else weight)
                else:
                    total, weight, square = np.zeros_like(total), 0.0, 0.0
                total = rho * total + z_BTE[row, t, part]
                weight, square = rho * weight + 1, rho**2 * square + 1
    return scores_BTE


def _heads(x_BTC: Array, heads: int) -> Array:
    """[B, T, heads * width] -> [B, heads, T, width]"""
    B, T, _ = x_BTC.shape
    return x_BTC.reshape(B, T, heads, -1).transpose(0, 2, 1, 3)


def _softmax_attention(scores_BHTS: Array, v_BHSd: Array, mask_BTS: Bools) -> Array:
    """[B, T, H * d]"""
    y_BHTd = softmax(np.where(mask_BTS[:, None], scores_BHTS, -np.inf)) @ v_BHSd
    B, H, T, d = y_BHTd.shape
    return y_BHTd.transpose(0, 2, 1, 3).reshape(B, T, H * d)


def _latent(w: _Scope, c: ModelConfig, x_BTD: Array, position_BT: Ints, segments_BT: Ints) -> Array:
    """Multi-head latent attention (2405.04434, eq. 9-19, without query compression)."""
    at_BHT = position_BT[:, None]
    q_BHTX = _heads(x_BTD @ w["q_proj.weight"].T, c.num_attention_heads)
    qN_BHTd, qR_BHTr = q_BHTX[..., : c.head_dim], q_BHTX[..., c.head_dim :]
    yarn = c.rope_scaling
    qR_BHTr = rope(qR_BHTr, at_BHT, c.rope_theta, yarn)
    z_BSz = rms_norm(x_BTD @ w["kv_down_proj.weight"].T, w["kv_norm.weight"], c.rms_norm_eps)
    kR_BSr = rope(x_BTD @ w["k_rope_proj.weight"].T, position_BT, c.rope_theta, yarn)
    kN_BHSd = _heads(z_BSz @ w["k_up_proj.weight"].T, c.num_attention_heads)
    v_BHSd = _heads(z_BSz @ w["v_up_proj.weight"].T, c.num_attention_heads)
    content = np.einsum("bhtd,bhsd->bhts", qN_BHTd, kN_BHSd)
    place = np.einsum("bhtr,bsr->bhts", qR_BHTr, kR_BSr)
    scores = sharpened((content + place) / np.sqrt(c.head_dim + c.rope_dim), yarn)
    return _softmax_attention(scores, v_BHSd, visible(segments_BT, None)) @ w["o_proj.weight"].T


def _window(w: _Scope, c: ModelConfig, x_BTD: Array, position_BT: Ints, segments_BT: Ints) -> Array:
    """Grouped-query attention with QK-norm over the last `sliding_window` positions."""
    at_BHT, per_group = position_BT[:, None], c.num_attention_heads // c.num_key_value_heads
    q_BHTd = _heads(x_BTD @ w["q_proj.weight"].T, c.num_attention_heads)
    k_BGSd = _heads(x_BTD @ w["k_proj.weight"].T, c.num_key_value_heads)
    v_BGSd = _heads(x_BTD @ w["v_proj.weight"].T, c.num_key_value_heads)
    yarn = c.rope_scaling  # within a window that training knew, distances stay as they are
    if yarn is not None and c.sliding_window <= yarn.original_max_position_embeddings:
        yarn = None
    q_BHTd, k_BGSd = (
        rope(rms_norm(x, w[f"{name}_norm.weight"], c.rms_norm_eps), at_BHT, c.rope_theta, yarn)
        for name, x in (("q", q_BHTd), ("k", k_BGSd))
    )
    k_BHSd, v_BHSd = np.repeat(k_BGSd, per_group, 1), np.repeat(v_BGSd, per_group, 1)
    scores = sharpened(np.einsum("bhtd,bhsd->bhts", q_BHTd, k_BHSd) / np.sqrt(c.head_dim), yarn)
    mask_BTS = visible(segments_BT, c.sliding_window)
    return _softmax_attention(scores, v_BHSd, mask_BTS) @ w["o_proj.weight"].T


def _mixture(
    w: _Scope,
    c: ModelConfig,
    layer: int,
    h_BTD: Array,
    ids_BTK: Ints,
    weights_BTK: Array,
    available_E: Bools | None,
) -> Array:
    """sum_k w_k E_k(h) + sum_s S_s(h) (2401.06066, eq. 9); a missing E_k is sum_s S_s."""
    shared_BTD = np.zeros_like(h_BTD)
    for s in range(c.num_shared_experts):
        scope = w.under(f"model.layers.{layer}.mlp.shared_experts.{s}.")
        shared_BTD += swiglu(h_BTD, scope["gate_up_proj.weight"], scope["down_proj.weight"])
    y_BTD = shared_BTD.copy()
    for expert in np.unique(ids_BTK):
        share_BT = (weights_BTK * (ids_BTK == expert)).sum(-1)
        if available_E is not None and not available_E[expert]:
            y_BTD += share_BT[..., None] * shared_BTD
            continue
        gate_up = w[expert_name(layer, int(expert), "gate_up_proj")]
        down = w[expert_name(layer, int(expert), "down_proj")]
        y_BTD += share_BT[..., None] * swiglu(h_BTD, gate_up, down)
    return y_BTD


def _lookahead(w: _Scope, c: ModelConfig, x_BTD: Array) -> Array:
    """Logits of the routing of tokens t .. t + J - 1 in every layer. [B, T, J, L, E]"""
    h_BTU = silu(rms_norm(x_BTD, w["norm.weight"], c.rms_norm_eps) @ w["in_proj.weight"].T)
    shape = (c.lookahead_steps + 1, c.num_hidden_layers, c.num_experts)
    return (h_BTU @ w["out_proj.weight"].T).reshape(*x_BTD.shape[:2], *shape)


def _to_float64(data: memoryview, dtype: str) -> Array:
    if dtype == "BF16":  # the upper half of a float32
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
    return np.frombuffer(data, kind).astype(np.float64)
