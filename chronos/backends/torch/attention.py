"""Attention of the torch backend: multi-head latent attention and sliding-window attention.

Both take whole sequences (training, prefill) or chunks behind a cache (decode). The latent layer
caches the latent and one shared rotary key per token and decodes in absorbed form; the window layer
keeps the last W keys and values in a ring. Rotations are half-split (NeoX order).
Not covered: attention sinks.

Shape legend: B batch, T new tokens, S all keys, D hidden, H heads, G key-value heads, d head_dim,
r rope_dim, z latent, W window.
"""

from __future__ import annotations

import math
from copy import copy

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronos.backends.torch.products import Linear
from chronos.common.model.config import ModelConfig
from chronos.common.model.rope import temperature
from chronos.common.text.sampling import PIECE


class RMSNorm(nn.Module):
    """x / rms(x) * weight (1910.07467), the mean in float32. On a GPU by torch's own kernel, one
    launch for six; torch has it from 2.4 on only, and Intel Macs end at 2.2."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and hasattr(F, "rms_norm"):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class Rotary:
    """RoPE tables (2104.09864, eq. 34) of one width, grown on demand, angles in float64. stretch:
    factors of the frequencies [dim / 2], of which there are none by default."""

    def __init__(
        self, dim: int, theta: float, stretch: npt.NDArray[np.float64] | None = None
    ) -> None:
        self.dim, self.theta, self.stretch = dim, theta, stretch
        self.cos_PR = self.sin_PR = torch.empty(0, dim)

    def tables(self, positions: range | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, dim] for a range or [B, T, dim] for a tensor of positions."""
        end = positions.stop if isinstance(positions, range) else int(positions.max()) + 1
        kept = self.cos_PR
        if end > len(kept) or (kept.device, kept.dtype) != (like.device, like.dtype):
            self._grow(max(end, 2 * len(kept), 256), like)
        if isinstance(positions, range):
            return self.cos_PR[positions.start : end], self.sin_PR[positions.start : end]
        return self.cos_PR[positions], self.sin_PR[positions]

    def _grow(self, length: int, like: Tensor) -> None:
        half = self.theta ** -(torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        if self.stretch is not None:
            half = half * torch.from_numpy(self.stretch)
        angle_PR = torch.arange(length, dtype=torch.float64)[:, None] * torch.cat((half, half))
        self.cos_PR = angle_PR.cos().to(like.device, like.dtype)
        self.sin_PR = angle_PR.sin().to(like.device, like.dtype)


def rotate(x_BHTR: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the last axis; rope tables are [T, R] or [B, T, R]."""
    cos, sin = rope
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    first, second = x_BHTR.chunk(2, dim=-1)
    return x_BHTR * cos + torch.cat((-second, first), dim=-1) * sin


def causal_mask(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """True where a query may look: j <= i, and i - W < j inside a window. [..., T, S]."""
    distance = q_pos[..., :, None] - k_pos[..., None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


class LatentCache:
    """z and the rotary key of every past token, [B, capacity, z + r]; grows by doubling."""

    def __init__(self, batch: int, width: int, like: Tensor) -> None:
        self.length = 0
        self.buffer_BSC = like.new_empty(batch, 256, width)

    def append(self, x_BTC: Tensor) -> Tensor:
        """Add T entries; returns all of them, [B, S, z + r], valid until the next append."""
        end = self.length + x_BTC.shape[1]
        if end > self.buffer_BSC.shape[1]:
            size = max(end, 2 * self.buffer_BSC.shape[1])
            grown = self.buffer_BSC.new_empty(x_BTC.shape[0], size, x_BTC.shape[2])
            grown[:, : self.length] = self.buffer_BSC[:, : self.length]
            self.buffer_BSC = grown
        self.buffer_BSC[:, self.length : end] = x_BTC
        self.length = end
        return self.buffer_BSC[:, :end]

    def copied(self) -> LatentCache:
        twin = copy(self)
        twin.buffer_BSC = self.buffer_BSC.clone()
        return twin

    def cut(self, length: int) -> bool:
        """Forget what came after the first `length` tokens; False where that is not possible."""
        self.length = length
        return True

    def kept(self) -> Tensor:
        """What `restore` makes the cache of: [B, S, z + r]."""
        return self.buffer_BSC[:, : self.length]

    def restore(self, length: int, x_BSC: Tensor) -> None:
        """Fill an empty cache, in the pieces of a prompt, so that it grows as it did there. Raises
        ValueError where there are not so many."""
        if x_BSC.shape[1] != length:
            raise ValueError(f"{x_BSC.shape[1]} entries of {length} tokens")
        for x_BTC in x_BSC.split(PIECE, dim=1):
            self.append(x_BTC)


class WindowCache:
    """The last W keys and values in a ring, [2, B, G, W, d]; entry p sits at slot p mod W."""

    def __init__(self, batch: int, heads: int, window: int, dim: int, like: Tensor) -> None:
        self.length = 0
        self.window = window
        self.ring_2BGWd = like.new_empty(2, batch, heads, min(window, 256), dim)

    def append(self, kv_2BGTd: Tensor) -> Tensor:
        """Add T entries; returns what the new queries may see, in position order when T > 1."""
        start, count = self.length, kv_2BGTd.shape[3]
        self.length += count
        self._grow(min(self.length, self.window))
        size = self.ring_2BGWd.shape[3]
        if count == 1:
            self.ring_2BGWd[:, :, :, start % size] = kv_2BGTd[:, :, :, 0]
            return self.ring_2BGWd[:, :, :, : min(self.length, self.window)]
        device = kv_2BGTd.device
        past = torch.arange(max(0, start - self.window + 1), start, device=device) % size
        seen = torch.cat((self.ring_2BGWd[:, :, :, past], kv_2BGTd), dim=3)
        kept = torch.arange(max(start, self.length - self.window), self.length, device=device)
        self.ring_2BGWd[:, :, :, kept % size] = kv_2BGTd[:, :, :, kept - start]
        return seen

    def copied(self) -> WindowCache:
        twin = copy(self)
        twin.ring_2BGWd = self.ring_2BGWd.clone()
        return twin

    def cut(self, length: int) -> bool:
        """See LatentCache; not possible once the ring went round: what was there is gone."""
        if self.length > self.window and length < self.length:
            return False
        self.length = length
        return True

    def kept(self) -> Tensor:
        """See LatentCache; [2, B, G, min(S, W), d]."""
        return self.ring_2BGWd[:, :, :, : min(self.length, self.window)]

    def restore(self, length: int, kept_2BGWd: Tensor) -> None:
        """See LatentCache."""
        for end in range(PIECE, length + PIECE, PIECE):
            self._grow(min(end, length, self.window))
        self.ring_2BGWd[:, :, :, : kept_2BGWd.shape[3]] = kept_2BGWd
        self.length = length

    def _grow(self, needed: int) -> None:
        """Before the ring is full slot p is entry p, so growing is a copy of the prefix."""
        size = self.ring_2BGWd.shape[3]
        if needed <= size:
            return
        shape = list(self.ring_2BGWd.shape)
        shape[3] = min(self.window, max(needed, 2 * size))
        grown = self.ring_2BGWd.new_empty(shape)
        grown[:, :, :, :size] = self.ring_2BGWd
        self.ring_2BGWd = grown


class LatentAttention(nn.Module):
    """MLA (DeepSeek-V2, 2405.04434, section 2.1): scores (q_N.k_N + q_R.k_R) / sqrt(d + r)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H, d = config.hidden_size, config.num_attention_heads, config.head_dim
        z, r = config.kv_latent_dim, config.rope_dim
        self.heads, self.head_dim, self.latent, self.rope_dim = H, d, z, r
        self.scale = temperature(config, "mla") / math.sqrt(d + r)
        self.q_proj = Linear(D, H * (d + r))
        self.kv_down_proj = Linear(D, z)
        self.kv_norm = RMSNorm(z, eps=config.rms_norm_eps)
        self.k_rope_proj = Linear(D, r)
        self.k_up_proj = Linear(z, H * d)
        self.v_up_proj = Linear(z, H * d)
        self.o_proj = Linear(H * d, D)

    def new_cache(self, batch: int, like: Tensor) -> LatentCache:
        return LatentCache(batch, self.latent + self.rope_dim, like)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LatentCache | None,
    ) -> Tensor:
        if cache is not None and x_BTD.shape[1] == 1:
            return self.back(self.core(*self.front(x_BTD, rope), cache))
        q_BHTd, q_BHTr, latent_BSC = self._project(x_BTD, rope)
        if cache is not None:
            latent_BSC = cache.append(latent_BSC)
        return self._out(self._expanded(q_BHTd, q_BHTr, latent_BSC, mask))

    # One query, in three parts: shapes in the middle one grow with the cache. W_UK is folded into
    # the query, W_UV into the result; K and V are never rebuilt.

    def front(self, x_B1D: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The absorbed query [B, H, 1, z + r] and the token's entry in the cache [B, 1, z + r]."""
        q_BHTd, q_BHTr, latent_BTC = self._project(x_B1D, rope)
        up_k_Hdz = self.k_up_proj.weight.view(self.heads, self.head_dim, self.latent)
        return torch.cat((q_BHTd @ up_k_Hdz, q_BHTr), dim=-1), latent_BTC

    def core(self, q_BHTC: Tensor, latent_BTC: Tensor, cache: LatentCache) -> Tensor:
        """Attention over all the cache holds, the new token with it: [B, H, 1, z]."""
        latent_BSC = cache.append(latent_BTC)
        scores_BHTS = q_BHTC @ latent_BSC[:, None].transpose(-1, -2) * self.scale
        return scores_BHTS.softmax(dim=-1) @ latent_BSC[:, None, :, : self.latent]

    def back(self, z_BHTz: Tensor) -> Tensor:
        """What attention adds to the residual stream."""
        up_v_Hdz = self.v_up_proj.weight.view(self.heads, self.head_dim, self.latent)
        return self._out(z_BHTz @ up_v_Hdz.transpose(-1, -2))

    def _project(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x_BTD.shape
        q_BHTX = self.q_proj(x_BTD).view(B, T, self.heads, -1).transpose(1, 2)
        q_BHTd, q_BHTr = q_BHTX.split((self.head_dim, self.rope_dim), dim=-1)
        z_BTz = self.kv_norm(self.kv_down_proj(x_BTD))
        k_BTr = rotate(self.k_rope_proj(x_BTD)[:, None], rope)[:, 0]
        return q_BHTd, rotate(q_BHTr, rope), torch.cat((z_BTz, k_BTr), dim=-1)

    def _out(self, y_BHTd: Tensor) -> Tensor:
        out_BTD: Tensor = self.o_proj(y_BHTd.transpose(1, 2).flatten(2))
        return out_BTD

    def _expanded(
        self, q_BHTd: Tensor, q_BHTr: Tensor, latent_BSC: Tensor, mask: Tensor | None
    ) -> Tensor:
        B, S, _ = latent_BSC.shape
        z_BSz, k_BSr = latent_BSC.split((self.latent, self.rope_dim), dim=-1)
        k_BHSd = self.k_up_proj(z_BSz).view(B, S, self.heads, -1).transpose(1, 2)
        v_BHSd = self.v_up_proj(z_BSz).view(B, S, self.heads, -1).transpose(1, 2)
        k_BHSr = k_BSr[:, None].expand(-1, self.heads, -1, -1)
        q, k = torch.cat((q_BHTd, q_BHTr), -1), torch.cat((k_BHSd, k_BHSr), -1)
        # The fused kernels want values as wide as keys; zero columns cost less than the plain path
        # (a fifth of a training step on a CPU).
        v = F.pad(v_BHSd, (0, self.rope_dim))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return y[..., : self.head_dim]


class WindowAttention(nn.Module):
    """Grouped-query attention (2305.13245) with QK-norm over the last W positions (2004.05150)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H, G = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        d, eps = config.head_dim, config.rms_norm_eps
        self.heads, self.kv_heads, self.head_dim = H, G, d
        self.scale = temperature(config, "sliding") / math.sqrt(d)
        self.window = config.sliding_window
        self.q_proj = Linear(D, H * d)
        self.k_proj = Linear(D, G * d)
        self.v_proj = Linear(D, G * d)
        self.q_norm = RMSNorm(d, eps=eps)
        self.k_norm = RMSNorm(d, eps=eps)
        self.o_proj = Linear(H * d, D)

    def new_cache(self, batch: int, like: Tensor) -> WindowCache:
        return WindowCache(batch, self.kv_heads, self.window, self.head_dim, like)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: WindowCache | None,
    ) -> Tensor:
        q_BHTd, k_BGTd, v_BGTd = self._project(x_BTD, rope)
        if cache is not None:
            k_BGTd, v_BGTd = cache.append(torch.stack((k_BGTd, v_BGTd))).unbind(0)
        return self.back(self._attend(q_BHTd, k_BGTd, v_BGTd, mask))

    # One query, in three parts, as in LatentAttention.

    def front(self, x_B1D: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The query [B, H, 1, d] and the token's entry in the cache [2, B, G, 1, d]."""
        q_BHTd, k_BGTd, v_BGTd = self._project(x_B1D, rope)
        return q_BHTd, torch.stack((k_BGTd, v_BGTd))

    def core(self, q_BHTd: Tensor, kv_2BGTd: Tensor, cache: WindowCache) -> Tensor:
        """Attention over the window, the new token with it: [B, H, 1, d]."""
        k_BGTd, v_BGTd = cache.append(kv_2BGTd).unbind(0)
        return self._attend(q_BHTd, k_BGTd, v_BGTd, None)

    def back(self, y_BHTd: Tensor) -> Tensor:
        """What attention adds to the residual stream."""
        out_BTD: Tensor = self.o_proj(y_BHTd.transpose(1, 2).flatten(2))
        return out_BTD

    def _project(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x_BTD.shape
        q_BHTd = self.q_norm(self.q_proj(x_BTD).view(B, T, self.heads, -1)).transpose(1, 2)
        k_BGTd = self.k_norm(self.k_proj(x_BTD).view(B, T, self.kv_heads, -1)).transpose(1, 2)
        v_BGTd = self.v_proj(x_BTD).view(B, T, self.kv_heads, -1).transpose(1, 2)
        return rotate(q_BHTd, rope), rotate(k_BGTd, rope), v_BGTd

    def _attend(
        self, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None
    ) -> Tensor:
        group = self.heads // self.kv_heads
        k_BHTd, v_BHTd = (x.repeat_interleave(group, dim=1) for x in (k_BGTd, v_BGTd))
        return F.scaled_dot_product_attention(
            q_BHTd, k_BHTd, v_BHTd, attn_mask=mask, scale=self.scale
        )
