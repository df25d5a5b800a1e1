"""A Chronos model for Transformers, in one file: needs torch and transformers, and not Chronos.

`chronos export --to hf --with-code` lays it beside the weights; `AutoModelForCausalLM` then loads
the folder with `trust_remote_code=True`. All experts are in memory here, and the LookaheadRouter,
which only foresees them, is not part of the model. Layers have latent attention (MLA, 2405.04434)
or grouped-query attention with QK-norm in a sliding window; experts are chosen by a gate, by one
that sees the token before too, or by the past alone (`routing_source`).
Not covered: packed rows of several documents, static caches.

Shape legend: B batch, T new tokens, S all tokens, N = B * T, D hidden, H heads, G key-value heads,
d head_dim, r rope_dim, z latent, E experts, K experts of a token, A resident experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PAST = ("informed", "history")  # routing that looks at the tokens before


class ChronosConfig(PreTrainedConfig):
    """The keys of a native model's config.json as attributes; defaults are a native model's."""

    model_type = "chronos"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32_000,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 4,
        head_dim: int = 64,
        kv_latent_dim: int = 64,
        rope_dim: int = 32,
        sliding_window: int = 2_048,
        hybrid_pattern: tuple[str, ...] = ("mla", "sliding"),
        num_experts: int = 32,
        num_experts_per_tok: int = 4,
        num_shared_experts: int = 1,
        moe_intermediate_size: int = 512,
        norm_topk_prob: bool = True,
        routing_source: str | tuple[str, ...] = "gate",
        num_resident_experts: int = 4,
        num_resident_experts_per_tok: int = 2,
        history_decay: float | tuple[float, ...] = 0.9,
        history_norm: str = "mean",
        max_position_embeddings: int = 32_768,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.kv_latent_dim, self.rope_dim = kv_latent_dim, rope_dim
        self.sliding_window, self.hybrid_pattern = sliding_window, list(hybrid_pattern)
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.num_shared_experts, self.norm_topk_prob = num_shared_experts, norm_topk_prob
        self.moe_intermediate_size = moe_intermediate_size
        each = isinstance(routing_source, str)
        self.routing_source = routing_source if each else list(routing_source)
        self.num_resident_experts = num_resident_experts
        self.num_resident_experts_per_tok = num_resident_experts_per_tok
        self.history_decay, self.history_norm = history_decay, history_norm
        self.max_position_embeddings, self.rms_norm_eps = max_position_embeddings, rms_norm_eps
        self.rope_theta, self.initializer_range = rope_theta, initializer_range
        self.use_cache = use_cache
        kinds = {"mla": "full_attention", "sliding": "sliding_attention"}
        self.layer_types = [
            kinds[hybrid_pattern[layer % len(hybrid_pattern)]] for layer in range(num_hidden_layers)
        ]
        kwargs.pop("layer_types", None)
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)

    def routing_of(self, layer: int) -> str:
        source = self.routing_source
        return source if isinstance(source, str) else source[layer]


class ChronosRMSNorm(nn.Module):
    """x / rms(x) * weight (1910.07467), the mean in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class Rotary:
    """Tables of RoPE (2104.09864), grown on demand; angles in float64, exact at far positions."""

    def __init__(self, dim: int, theta: float) -> None:
        self.dim, self.theta = dim, theta
        self.cos_Pr = self.sin_Pr = torch.empty(0)

    def tables(self, positions_BT: Tensor, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, T, r]; all positions are below `end`."""
        kept = self.cos_Pr
        if end > len(kept) or (kept.device, kept.dtype) != (like.device, like.dtype):
            half = self.theta ** -(torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
            places = torch.arange(max(end, 256, 2 * len(kept)), dtype=torch.float64)
            angle_Pr = places[:, None] * torch.cat((half, half))
            self.cos_Pr = angle_Pr.cos().to(like.device, like.dtype)
            self.sin_Pr = angle_Pr.sin().to(like.device, like.dtype)
        return self.cos_Pr[positions_BT][:, None], self.sin_Pr[positions_BT][:, None]


def rotate(x_BHTr: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = x_BHTr.chunk(2, dim=-1)
    return x_BHTr * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """What `attn_implementation="eager"` asks for; q [B, H, T, d], result [B, T, H, d]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores_BHTS = q @ k.transpose(-1, -2) * options["scaling"]
    if mask is not None:
        scores_BHTS = scores_BHTS + mask
    shares_BHTS = scores_BHTS.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return (shares_BHTS @ v).transpose(1, 2).contiguous(), shares_BHTS


class _Attention(nn.Module):
    """What both kinds share: the products themselves are the library's."""

    is_causal = True

    def __init__(self, config: ChronosConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_key_value_groups = 1
        self.window: int | None = None
        self.scaling = self.head_dim**-0.5
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        options = {"scaling": self.scaling, "dropout": 0.0, "sliding_window": self.window}
        y_BTHd, _ = function(self, q, k, v, mask, **(more | options))
        return self.o_proj(y_BTHd.flatten(2))


class LatentAttention(_Attention):
    """MLA; the cache holds the latent and one rotated key of each token."""

    def __init__(self, config: ChronosConfig, layer: int) -> None:
        super().__init__(config, layer)
        D, H, d = config.hidden_size, self.heads, self.head_dim
        z, r = config.kv_latent_dim, config.rope_dim
        self.rope_dim, self.scaling = r, (d + r) ** -0.5
        self.q_proj = nn.Linear(D, H * (d + r), bias=False)
        self.kv_down_proj = nn.Linear(D, z, bias=False)
        self.kv_norm = ChronosRMSNorm(z, config.rms_norm_eps)
        self.k_rope_proj = nn.Linear(D, r, bias=False)
        self.k_up_proj = nn.Linear(z, H * d, bias=False)
        self.v_up_proj = nn.Linear(z, H * d, bias=False)

    def forward(
        self, x_BTD: Tensor, rope: Any, mask: Tensor | None, cache: Cache | None, **more: Any
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BHTX = self.q_proj(x_BTD).view(B, T, self.heads, -1).transpose(1, 2)
        q_BHTd, q_BHTr = q_BHTX.split((self.head_dim, self.rope_dim), dim=-1)
        z_B1Sz = self.kv_norm(self.kv_down_proj(x_BTD))[:, None]
        k_B1Sr = rotate(self.k_rope_proj(x_BTD)[:, None], rope)
        if cache is not None:
            z_B1Sz, k_B1Sr = cache.update(z_B1Sz, k_B1Sr, self.layer_idx)
        k_BHSd, v_BHSd = (
            up(z_B1Sz[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for up in (self.k_up_proj, self.v_up_proj)
        )
        k = torch.cat((k_BHSd, k_B1Sr.expand(-1, self.heads, -1, -1)), dim=-1)
        return self.attend(torch.cat((q_BHTd, rotate(q_BHTr, rope)), -1), k, v_BHSd, mask, **more)


class WindowAttention(_Attention):
    """Grouped-query attention with QK-norm over the last tokens."""

    def __init__(self, config: ChronosConfig, layer: int) -> None:
        super().__init__(config, layer)
        D, H, d = config.hidden_size, self.heads, self.head_dim
        G = config.num_key_value_heads
        self.num_key_value_groups, self.window = H // G, config.sliding_window
        self.q_proj = nn.Linear(D, H * d, bias=False)
        self.k_proj = nn.Linear(D, G * d, bias=False)
        self.v_proj = nn.Linear(D, G * d, bias=False)
        self.q_norm = ChronosRMSNorm(d, config.rms_norm_eps)
        self.k_norm = ChronosRMSNorm(d, config.rms_norm_eps)

    def forward(
        self, x_BTD: Tensor, rope: Any, mask: Tensor | None, cache: Cache | None, **more: Any
    ) -> Tensor:
        shape = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BHTd = rotate(self.q_norm(self.q_proj(x_BTD).view(shape)).transpose(1, 2), rope)
        k_BGSd = rotate(self.k_norm(self.k_proj(x_BTD).view(shape)).transpose(1, 2), rope)
        v_BGSd = self.v_proj(x_BTD).view(shape).transpose(1, 2)
        if cache is not None:
            k_BGSd, v_BGSd = cache.update(k_BGSd, v_BGSd, self.layer_idx)
        return self.attend(q_BHTd, k_BGSd, v_BGSd, mask, **more)


class Expert(nn.Module):
    """down(silu(gate x) * up x); gate rows first (2002.05202)."""

    def __init__(self, config: ChronosConfig) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class MoE(nn.Module):
    """Routed experts, weighted, and shared ones for every token."""

    def __init__(self, config: ChronosConfig, layer: int) -> None:
        super().__init__()
        D, E = config.hidden_size, config.num_experts
        self.source, self.top_k = config.routing_of(layer), config.num_experts_per_tok
        if self.source not in ("gate", *_PAST):
            raise ValueError(f"routing_source {self.source!r} is not supported here")
        self.normalize = config.norm_topk_prob
        self.resident, self.near = config.num_resident_experts, config.num_resident_experts_per_tok
        decay = config.history_decay
        self.unit = config.history_norm == "unit"
        self.decays = tuple(decay) if isinstance(decay, list | tuple) else (decay,)
        self.gate = nn.Linear(D, E, bias=False)
        if self.source in _PAST:
            rows = E if self.source == "informed" else self.resident
            self.previous_gate = nn.Linear(D, rows, bias=False)
            # Where the cache keeps the layer's scores: behind the layers' keys and values.
            earlier = sum(config.routing_of(other) in _PAST for other in range(layer))
            self.slot = config.num_hidden_layers + earlier
        self.experts = nn.ModuleList(Expert(config) for _ in range(E))
        self.shared_experts = nn.ModuleList(
            Expert(config) for _ in range(config.num_shared_experts)
        )

    def forward(self, x_BTD: Tensor, real_BS: Tensor, cache: Cache | None) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        ids_NK, weights_NK = self.route(x_BTD, real_BS, cache)
        y_ND = torch.zeros_like(x_ND)
        for expert in ids_NK.unique().tolist():
            token, place = torch.where(ids_NK == expert)
            y_XD = self.experts[expert](x_ND[token]) * weights_NK[token, place, None]
            y_ND.index_add_(0, token, y_XD.to(y_ND.dtype))
        for shared in self.shared_experts:
            y_ND = y_ND + shared(x_ND)
        return y_ND.view_as(x_BTD)

    def route(self, x_BTD: Tensor, real_BS: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Ids and weights [N, K] of the experts that tokens use. real_BS: False for padding."""
        z_BTE = self.gate(x_BTD).float()
        if self.source in _PAST:
            v_BTA = self.previous_gate(x_BTD).float()
            z_BSE, v_BSA = self._past(z_BTE, v_BTA, cache)
            T, S = z_BTE.shape[1], z_BSE.shape[1]
            count_BS = real_BS.long().cumsum(-1)[:, -S:]
            first_BT1 = (count_BS <= 1)[:, -T:, None]
            before_BTA = F.pad(v_BSA, (0, 0, 1, 0))[:, -T - 1 : -1].masked_fill(first_BT1, 0.0)
            if self.source == "history":
                a_BTA = z_BTE[..., : self.resident] + before_BTA
                s_BTX = self._means(z_BSE[..., self.resident :], T, real_BS[:, -S:], count_BS)
                s_BTX = torch.where(first_BT1, z_BTE[..., self.resident :], s_BTX)
                far_BTK = s_BTX.topk(self.top_k - self.near, dim=-1).indices + self.resident
                ids_BTK = torch.cat((a_BTA.topk(self.near, dim=-1).indices, far_BTK), dim=-1)
                chosen_BTK = torch.cat((a_BTA, s_BTX), dim=-1).gather(-1, ids_BTK)
                weights_BTK = chosen_BTK.softmax(dim=-1)
                return ids_BTK.flatten(0, 1), weights_BTK.flatten(0, 1).to(x_BTD.dtype)
            z_BTE = z_BTE + before_BTA
        weights_NK, ids_NK = z_BTE.flatten(0, 1).softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.normalize:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        return ids_NK, weights_NK.to(x_BTD.dtype)

    def _past(self, z_BTE: Tensor, v_BTA: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """The scores of all tokens, those in the cache too."""
        if cache is None:
            return z_BTE, v_BTA
        while len(cache.layers) <= self.slot:
            cache.layers.append(DynamicLayer())
        z_B1SE, v_B1SA = cache.update(z_BTE[:, None], v_BTA[:, None], self.slot)
        return z_B1SE[:, 0], v_B1SA[:, 0]

    def _means(self, z_BSX: Tensor, T: int, real_BS: Tensor, count_BS: Tensor) -> Tensor:
        """The mean of the scores of the tokens before the last T, a token counting `decay` of what
        the one behind it counts; by the norm of these weights, if asked. [B, T, X]"""
        S, streamed = z_BSX.shape[1:]
        index_S = torch.arange(S, device=z_BSX.device)
        gap_TS = index_S[-T:, None] - 1 - index_S
        seen_BTS = real_BS[:, None] & (gap_TS >= 0)
        edges = [streamed * group // len(self.decays) for group in range(len(self.decays) + 1)]
        found = []
        for decay, start, stop in zip(self.decays, edges, edges[1:], strict=False):
            weights_BTS = decay ** gap_TS.clamp(min=0) * seen_BTS
            total_BT1 = (weights_BTS**2 if self.unit else weights_BTS).sum(-1, keepdim=True)
            total_BT1 = (total_BT1.sqrt() if self.unit else total_BT1).clamp(min=1.0)
            found.append(weights_BTS @ z_BSX[..., start:stop] / total_BT1)
        return torch.cat(found, dim=-1)


class Block(nn.Module):
    """Pre-norm attention and mixture of experts."""

    def __init__(self, config: ChronosConfig, layer: int) -> None:
        super().__init__()
        self.kind = config.layer_types[layer]
        attention = LatentAttention if self.kind == "full_attention" else WindowAttention
        self.input_layernorm = ChronosRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, layer)
        self.post_attention_layernorm = ChronosRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, layer)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Any,
        mask: Tensor | None,
        real_BS: Tensor,
        cache: Cache | None,
        **more: Any,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, mask, cache, **more)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD), real_BS, cache)


class ChronosPreTrainedModel(PreTrainedModel):
    config_class = ChronosConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False


class ChronosModel(ChronosPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ChronosConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = ChronosRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = {
            "full_attention": Rotary(config.rope_dim, config.rope_theta),
            "sliding_attention": Rotary(config.head_dim, config.rope_theta),
        }
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> tuple[Tensor, Cache | None]:
        """States [B, T, D] and the cache."""
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        T = x_BTD.shape[1]
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + T, device=x_BTD.device)[None]
        if attention_mask is not None and attention_mask.dim() == 2:
            real_BS = attention_mask.bool()
        else:
            real_BS = torch.ones(x_BTD.shape[0], seen + T, dtype=torch.bool, device=x_BTD.device)
        makers: dict[str, Callable[..., Any]] = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        given = {
            "config": self.config,
            "inputs_embeds": x_BTD,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        kinds = set(self.config.layer_types)
        masks = {kind: makers[kind](**given) for kind in kinds}
        ropes = {kind: self.rotary[kind].tables(position_ids, seen + T, x_BTD) for kind in kinds}
        for block in self.layers:
            place = (ropes[block.kind], masks[block.kind], real_BS)
            x_BTD = block(x_BTD, *place, past_key_values, **more)
        return self.norm(x_BTD), past_key_values


class ChronosForCausalLM(ChronosPreTrainedModel, GenerationMixin):
    """The model with its head, which is the embedding's matrix."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ChronosConfig) -> None:
        super().__init__(config)
        self.model = ChronosModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, T, V]; labels [B, T]: -100 is left out of the loss."""
        more.pop("return_dict", None)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        x_BTD, cache = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache and not self.training,
            **more,
        )
        if isinstance(logits_to_keep, Tensor):
            x_BTD = x_BTD[:, logits_to_keep]
        elif logits_to_keep:
            x_BTD = x_BTD[:, -logits_to_keep:]
        logits_BTV = self.lm_head(x_BTD)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, self.config.vocab_size, **more)
        return MoeCausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=cache)
