"""Attention of the MLX backend: multi-head latent attention and sliding-window attention.

Both take whole sequences (training, prefill) or chunks behind a cache (decode). The latent layer
caches the latent and one shared rotary key per token and decodes in absorbed form; the window layer
keeps the last W keys and values in a ring. Rotations are half-split (NeoX order) and done by
`mx.fast.rope`, whose float32 angles are off by 2e-5 at position 1,000 and 6e-4 at 30,000.
Not covered: attention sinks.

Shape legend: B batch, T new tokens, S all keys, D hidden, H heads, G key-value heads, d head_dim,
r rope_dim, z latent, W window.
"""

from __future__ import annotations

import math
from copy import copy

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from chronos.common.model.config import ModelConfig
from chronos.common.model.rope import temperature
from chronos.common.text.sampling import PIECE

Mask = mx.array | str | None  # what scaled_dot_product_attention takes


class Rotary:
    """RoPE (2104.09864, eq. 34) for one rotated width. The kernel makes the angles: no tables.
    stretch: factors of the frequencies [dim / 2], of which there are none by default."""

    def __init__(
        self, dim: int, theta: float, stretch: npt.NDArray[np.float64] | None = None
    ) -> None:
        self.dim, self.theta = dim, theta
        self.periods: mx.array | None = None  # as the kernel takes them: tokens of a radian
        if stretch is not None:
            half = theta ** (np.arange(0, dim, 2) / dim) / stretch
            self.periods = mx.array(half.astype(np.float32))


Rope = tuple[Rotary, int | mx.array]  # with the position of the first token, or positions [B, T]


def rotate(x_BHTR: mx.array, rope: Rope) -> mx.array:
    """Rotate the last axis by the tokens' positions."""
    rotary, position = rope
    if isinstance(position, int):
        return _rope(x_BHTR, rotary, position)
    # The kernel takes one offset per batch row, so every token of a packed row becomes one.
    B, H, T, R = x_BHTR.shape
    x_NH1R = x_BHTR.transpose(0, 2, 1, 3).reshape(B * T, H, 1, R)
    return _rope(x_NH1R, rotary, position.reshape(-1)).reshape(B, T, H, R).transpose(0, 2, 1, 3)


def causal_mask(q_pos: mx.array, k_pos: mx.array, window: int | None) -> mx.array:
    """True where a query may look: j <= i, and i - W < j inside a window. [..., T, S]."""
    distance = q_pos[..., :, None] - k_pos[..., None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


class LatentCache:
    """z and the rotary key of every past token, [B, capacity, z + r]; grows by doubling."""

    def __init__(self, batch: int, width: int, like: mx.array) -> None:
        self.length = 0
        self.buffer_BSC = mx.zeros((batch, 256, width), like.dtype)

    def append(self, x_BTC: mx.array) -> mx.array:
        """Add T entries; returns all of them, [B, S, z + r], valid until the next append."""
        B, T, C = x_BTC.shape
        start, end = self.length, self.length + T
        size = self.buffer_BSC.shape[1]
        if end > size:
            more = mx.zeros((B, max(end, 2 * size) - size, C), self.buffer_BSC.dtype)
            self.buffer_BSC = mx.concatenate([self.buffer_BSC, more], axis=1)
        self.buffer_BSC[:, start:end] = x_BTC
        self.length = end
        return self.buffer_BSC[:, :end]

    def copied(self) -> LatentCache:
        twin = copy(self)
        twin.buffer_BSC = mx.array(self.buffer_BSC)  # the same memory until one is written to
        return twin

    def cut(self, length: int) -> bool:
        """Forget what came after the first `length` tokens; False where that is not possible."""
        self.length = length
        return True

    def kept(self) -> mx.array:
        """What `restore` makes the cache of: [B, S, z + r]."""
        return self.buffer_BSC[:, : self.length]

    def restore(self, length: int, x_BSC: mx.array) -> None:
        """Fill an empty cache, in the pieces of a prompt, so that it grows as it did there. Raises
        ValueError where there are not so many."""
        if x_BSC.shape[1] != length:
            raise ValueError(f"{x_BSC.shape[1]} entries of {length} tokens")
        for x_BTC in mx.split(x_BSC, range(PIECE, x_BSC.shape[1], PIECE), axis=1):
            self.append(x_BTC)


class WindowCache:
    """The last W keys and values in a ring, [2, B, G, W, d]; entry p sits at slot p mod W."""

    def __init__(self, batch: int, heads: int, window: int, dim: int, like: mx.array) -> None:
        self.length = 0
        self.window = window
        self.ring_2BGWd = mx.zeros((2, batch, heads, min(window, 256), dim), like.dtype)

    def append(self, kv_2BGTd: mx.array) -> mx.array:
        """Add T entries; returns what the new queries may see, in position order when T > 1."""
        start, count = self.length, kv_2BGTd.shape[3]
        self.length += count
        self._grow(min(self.length, self.window))
        size = self.ring_2BGWd.shape[3]
        if count == 1:
            self.ring_2BGWd[:, :, :, start % size : start % size + 1] = kv_2BGTd
            return self.ring_2BGWd[:, :, :, : min(self.length, self.window)]
        past = mx.arange(max(0, start - self.window + 1), start) % size
        seen = mx.concatenate([self.ring_2BGWd[:, :, :, past], kv_2BGTd], axis=3)
        first = max(start, self.length - self.window)
        kept = mx.arange(first, self.length) % size
        self.ring_2BGWd[:, :, :, kept] = kv_2BGTd[:, :, :, first - start :]
        return seen

    def copied(self) -> WindowCache:
        twin = copy(self)
        twin.ring_2BGWd = mx.array(self.ring_2BGWd)
        return twin

    def cut(self, length: int) -> bool:
        """See LatentCache; not possible once the ring went round: what was there is gone."""
        if self.length > self.window and length < self.length:
            return False
        self.length = length
        return True

    def kept(self) -> mx.array:
        """See LatentCache; [2, B, G, min(S, W), d]."""
        return self.ring_2BGWd[:, :, :, : min(self.length, self.window)]

    def restore(self, length: int, kept_2BGWd: mx.array) -> None:
        """See LatentCache."""
        for end in range(PIECE, length + PIECE, PIECE):
            self._grow(min(end, length, self.window))
        self.ring_2BGWd[:, :, :, : kept_2BGWd.shape[3]] = kept_2BGWd
        self.length = length

    def _grow(self, needed: int) -> None:
        """Before the ring is full slot p is entry p, so growing appends room."""
        size = self.ring_2BGWd.shape[3]
        if needed <= size:
            return
        shape = list(self.ring_2BGWd.shape)
        shape[3] = min(self.window, max(needed, 2 * size)) - size
        more = mx.zeros(shape, self.ring_2BGWd.dtype)
        self.ring_2BGWd = mx.concatenate([self.ring_2BGWd, more], axis=3)


class LatentAttention(nn.Module):
    """MLA (DeepSeek-V2, 2405.04434, section 2.1): scores (q_N.k_N + q_R.k_R) / sqrt(d + r)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H, d = config.hidden_size, config.num_attention_heads, config.head_dim
        z, r = config.kv_latent_dim, config.rope_dim
        self.heads, self.head_dim, self.latent, self.rope_dim = H, d, z, r
        self.scale = temperature(config, "mla") / math.sqrt(d + r)
        self.q_proj = nn.Linear(D, H * (d + r), bias=False)
        self.kv_down_proj = nn.Linear(D, z, bias=False)
        self.kv_norm = nn.RMSNorm(z, eps=config.rms_norm_eps)
        self.k_rope_proj = nn.Linear(D, r, bias=False)
        self.k_up_proj = nn.Linear(z, H * d, bias=False)
        self.v_up_proj = nn.Linear(z, H * d, bias=False)
        self.o_proj = nn.Linear(H * d, D, bias=False)

    def new_cache(self, batch: int, like: mx.array) -> LatentCache:
        return LatentCache(batch, self.latent + self.rope_dim, like)

    def __call__(
        self, x_BTD: mx.array, rope: Rope, mask: Mask, cache: LatentCache | None
    ) -> mx.array:
        B, T, _ = x_BTD.shape
        q_BHTX = self.q_proj(x_BTD).reshape(B, T, self.heads, -1).transpose(0, 2, 1, 3)
        q_BHTd, q_BHTr = mx.split(q_BHTX, [self.head_dim], axis=-1)
        q_BHTr = rotate(q_BHTr, rope)
        z_BTz = self.kv_norm(self.kv_down_proj(x_BTD))
        k_BTr = rotate(self.k_rope_proj(x_BTD)[:, None], rope)[:, 0]
        latent_BSC = mx.concatenate([z_BTz, k_BTr], axis=-1)
        if cache is not None:
            latent_BSC = cache.append(latent_BSC)
        if cache is not None and T == 1:
            y_BHTd = self._absorbed(q_BHTd, q_BHTr, latent_BSC)
        else:
            y_BHTd = self._expanded(q_BHTd, q_BHTr, latent_BSC, mask)
        out_BTD: mx.array = self.o_proj(y_BHTd.transpose(0, 2, 1, 3).reshape(B, T, -1))
        return out_BTD

    def _expanded(
        self, q_BHTd: mx.array, q_BHTr: mx.array, latent_BSC: mx.array, mask: Mask
    ) -> mx.array:
        B, S, _ = latent_BSC.shape
        z_BSz, k_BSr = mx.split(latent_BSC, [self.latent], axis=-1)
        k_BHSd = self.k_up_proj(z_BSz).reshape(B, S, self.heads, -1).transpose(0, 2, 1, 3)
        v_BHSd = self.v_up_proj(z_BSz).reshape(B, S, self.heads, -1).transpose(0, 2, 1, 3)
        k_BHSr = mx.broadcast_to(k_BSr[:, None], (B, self.heads, S, self.rope_dim))
        q, k = mx.concatenate([q_BHTd, q_BHTr], -1), mx.concatenate([k_BHSd, k_BHSr], -1)
        return mx.fast.scaled_dot_product_attention(q, k, v_BHSd, scale=self.scale, mask=mask)

    def _absorbed(self, q_BHTd: mx.array, q_BHTr: mx.array, latent_BSC: mx.array) -> mx.array:
        """One query: W_UK folded into it, W_UV into the result; K and V are never rebuilt. The
        latents act as the one key-value head of all query heads."""
        up_k_Hdz = self.k_up_proj.weight.reshape(self.heads, self.head_dim, self.latent)
        up_v_Hdz = self.v_up_proj.weight.reshape(self.heads, self.head_dim, self.latent)
        q_BHTC = mx.concatenate([q_BHTd @ up_k_Hdz, q_BHTr], axis=-1)
        k_B1SC = latent_BSC[:, None]
        z_BHTz = mx.fast.scaled_dot_product_attention(
            q_BHTC, k_B1SC, k_B1SC[..., : self.latent], scale=self.scale
        )
        y_BHTd: mx.array = z_BHTz @ up_v_Hdz.swapaxes(-1, -2)
        return y_BHTd


class WindowAttention(nn.Module):
    """Grouped-query attention (2305.13245) with QK-norm over the last W positions (2004.05150)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H, G = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        d, eps = config.head_dim, config.rms_norm_eps
        self.heads, self.kv_heads, self.head_dim = H, G, d
        self.scale = temperature(config, "sliding") / math.sqrt(d)
        self.window = config.sliding_window
        self.q_proj = nn.Linear(D, H * d, bias=False)
        self.k_proj = nn.Linear(D, G * d, bias=False)
        self.v_proj = nn.Linear(D, G * d, bias=False)
        self.q_norm = nn.RMSNorm(d, eps=eps)
        self.k_norm = nn.RMSNorm(d, eps=eps)
        self.o_proj = nn.Linear(H * d, D, bias=False)

    def new_cache(self, batch: int, like: mx.array) -> WindowCache:
        return WindowCache(batch, self.kv_heads, self.window, self.head_dim, like)

    def __call__(
        self, x_BTD: mx.array, rope: Rope, mask: Mask, cache: WindowCache | None
    ) -> mx.array:
        B, T, _ = x_BTD.shape
        q_BTHd = self.q_norm(self.q_proj(x_BTD).reshape(B, T, self.heads, -1))
        k_BTGd = self.k_norm(self.k_proj(x_BTD).reshape(B, T, self.kv_heads, -1))
        v_BTGd = self.v_proj(x_BTD).reshape(B, T, self.kv_heads, -1)
        q_BHTd, k_BGTd, v_BGTd = (y.transpose(0, 2, 1, 3) for y in (q_BTHd, k_BTGd, v_BTGd))
        q_BHTd, k_BGTd = rotate(q_BHTd, rope), rotate(k_BGTd, rope)
        if cache is not None:
            k_BGTd, v_BGTd = cache.append(mx.stack([k_BGTd, v_BGTd]))
        y_BHTd = mx.fast.scaled_dot_product_attention(
            q_BHTd, k_BGTd, v_BGTd, scale=self.scale, mask=mask
        )
        out_BTD: mx.array = self.o_proj(y_BHTd.transpose(0, 2, 1, 3).reshape(B, T, -1))
        return out_BTD


def _rope(x_BHTR: mx.array, rotary: Rotary, offset: int | mx.array) -> mx.array:
    base, periods = (rotary.theta, None) if rotary.periods is None else (None, rotary.periods)
    return mx.fast.rope(
        x_BHTR, rotary.dim, traditional=False, base=base, scale=1.0, offset=offset, freqs=periods
    )
