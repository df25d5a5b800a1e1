"""Native models as architectures that other libraries have, where the arithmetic is the same.

A model of latent attention alone is a DeepSeek-V2, or a Mistral 4 where the weights of a token's
experts are made to sum to 1; one of windows alone, without shared experts, is a Qwen3-MoE. Others
have no architecture elsewhere, and `refusal` says why. Every number stays what it was: rows change
their place, matrices are laid beside each other. Needs no framework. The facts are from
Transformers' models/deepseek_v2, mistral4 and qwen3_moe, version 5.23.

Shape legend: D hidden, F expert hidden, H heads, d head_dim, r rope_dim, z latent, X any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import dense_tensors

Array = NDArray[Any]
WITH_CODE = "--to hf --with-code writes it with a modelling file of its own"


class Tensor(NamedTuple):
    """A tensor of the dense part as another library has it: its name and shape, the native tensors
    it is made of, and how."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[..., Array]


@dataclass(frozen=True)
class Architecture:
    """A native model as one of another library.

    config: its config.json, ids of tokens left out. dense: all but the routed experts. experts: how
    those of a layer are spelled: as "records", in "three" matrices each, or in two "stacks".
    """

    name: str
    config: dict[str, Any]
    dense: list[Tensor]
    experts: str

    def routed(self, config: ModelConfig, layer: int) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of a layer's experts, in the order of `spelled`."""
        D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
        at = f"model.layers.{layer}.mlp.experts."
        if self.experts == "stacks":
            return [(f"{at}gate_up_proj", (E, 2 * F, D)), (f"{at}down_proj", (E, D, F))]
        three: dict[str, tuple[int, ...]] = {"gate_proj": (F, D), "up_proj": (F, D)}
        own = three if self.experts == "three" else {"gate_up_proj": (2 * F, D)}
        own |= {"down_proj": (D, F)}
        return [(f"{at}{e}.{name}.weight", shape) for e in range(E) for name, shape in own.items()]

    def spelled(self, records: Iterable[tuple[Array, Array]]) -> Iterator[Array]:
        """The tensors of a layer's experts, from gate_up_proj and down_proj of each."""
        if self.experts == "stacks":
            yield from map(np.stack, zip(*records, strict=True))
            return
        for gate_up, down in records:
            yield from (gate_up,) if self.experts == "records" else np.split(gate_up, 2)
            yield down


def refusal(config: ModelConfig) -> str:
    """Why no other library has such a model; "" where one has."""
    sources = config.routing_sources
    odd = [layer for layer, source in enumerate(sources) if source != "gate"]
    if odd:
        return f"layer {odd[0]} chooses its experts by {sources[odd[0]]!r}"
    kinds = [config.attention_kind(layer) for layer in range(config.num_hidden_layers)]
    if len(set(kinds)) > 1:
        named = ", ".join(str(layer) for layer, kind in enumerate(kinds) if kind == "sliding")
        return f"layers {named} attend to a window and the others to a latent"
    if kinds[0] == "sliding":
        if config.num_shared_experts:
            return "its layers have windows and shared experts"
        return ""
    if not config.num_shared_experts:
        return "its layers have a latent and no shared expert"
    if config.rms_norm_eps != 1e-6:
        return f"rms_norm_eps is {config.rms_norm_eps}, and 1e-6 in the norms of other latents"
    if config.num_experts < 2:
        return "its layers have one expert"
    return ""


def architecture(config: ModelConfig) -> Architecture:
    """What `hf` and `mlx` folders hold; of models that have no `refusal`."""
    if config.attention_kind(0) == "sliding":
        return qwen3_moe(config)
    return mistral4(config) if config.norm_topk_prob else deepseek_v2(config)


def as_it_is(config: ModelConfig) -> Architecture:
    """A native model with its own names, and a config that names a modelling file."""
    code = {
        "AutoConfig": "modeling_chronos.ChronosConfig",
        "AutoModelForCausalLM": "modeling_chronos.ChronosForCausalLM",
    }
    own = config.to_json() | {"auto_map": code}
    return Architecture("chronos", own, _own_names(config), "records")


def deepseek_v2(config: ModelConfig) -> Architecture:
    """Latent attention with rotated pairs beside each other."""
    own = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "topk_method": "greedy",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    own = _latent(config, "deepseek_v2") | own
    return Architecture("deepseek_v2", own, _mla(config, True), "three")


def mistral4(config: ModelConfig) -> Architecture:
    """Latent attention with rotated halves. Its library rotates a part of a head under YaRN alone,
    which with factor 1 is plain rotation; 0 leaves out its scale of far queries."""
    width = config.head_dim + config.rope_dim
    rope = {
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.0,
        "partial_rotary_factor": config.rope_dim / width,
    }
    own = {
        "architectures": ["Mistral4ForCausalLM"],
        "n_group": 1,
        "topk_group": 1,
        "rope_interleave": False,
        "rope_parameters": rope,
    }
    own = _latent(config, "mistral4") | own
    return Architecture("mistral4", own, _mla(config, False), "stacks")


def _common(config: ModelConfig, model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.moe_intermediate_size,  # of layers without experts: none here
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }


def _latent(config: ModelConfig, model_type: str) -> dict[str, Any]:
    return _common(config, model_type) | {
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": None,
        "kv_lora_rank": config.kv_latent_dim,
        "qk_nope_head_dim": config.head_dim,
        "qk_rope_head_dim": config.rope_dim,
        "v_head_dim": config.head_dim,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.num_shared_experts,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
    }


def qwen3_moe(config: ModelConfig) -> Architecture:
    """Windows; it has a native model's names of them. One as long as the context is none."""
    windowed = config.sliding_window < config.max_position_embeddings
    own = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": windowed,
        "sliding_window": config.sliding_window if windowed else None,
        "max_window_layers": 0,
        "layer_types": [f"{'sliding' if windowed else 'full'}_attention"]
        * config.num_hidden_layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    own = _common(config, "qwen3_moe") | own
    return Architecture("qwen3_moe", own, _own_names(config), "three")


def _same(name: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, shape, (name,), lambda x: x)


def _own_names(config: ModelConfig) -> list[Tensor]:
    return [_same(spec.name, spec.shape) for spec in dense_tensors(config)]


def _mla(config: ModelConfig, pairs: bool) -> list[Tensor]:
    """The dense part with DeepSeek's names. pairs: rotated rows lie pair by pair, not in halves."""
    D, H, d = config.hidden_size, config.num_attention_heads, config.head_dim
    z, r = config.kv_latent_dim, config.rope_dim
    order_r = np.arange(r).reshape(2, -1).T.reshape(-1) if pairs else np.arange(r)
    order_X = np.concatenate((np.arange(d), d + order_r))

    def query(q_XD: Array) -> Array:
        return q_XD.reshape(H, d + r, D)[:, order_X].reshape(-1, D)

    def down(latent_zD: Array, rotated_rD: Array) -> Array:
        return np.concatenate((latent_zD, rotated_rD[order_r]))

    def up(key_Xz: Array, value_Xz: Array) -> Array:
        both = (key_Xz.reshape(H, d, z), value_Xz.reshape(H, d, z))
        return np.concatenate(both, axis=1).reshape(-1, z)

    found = []
    for spec in dense_tensors(config):
        before, _, leaf = spec.name.partition(".self_attn.")
        at = f"{before}.self_attn."
        if leaf == "q_proj.weight":
            found.append(Tensor(spec.name, spec.shape, (spec.name,), query))
        elif leaf == "kv_down_proj.weight":
            sources = (spec.name, f"{at}k_rope_proj.weight")
            found.append(Tensor(f"{at}kv_a_proj_with_mqa.weight", (z + r, D), sources, down))
        elif leaf == "kv_norm.weight":
            found.append(_same(spec.name, spec.shape)._replace(name=f"{at}kv_a_layernorm.weight"))
        elif leaf == "k_up_proj.weight":
            sources = (spec.name, f"{at}v_up_proj.weight")
            found.append(Tensor(f"{at}kv_b_proj.weight", (2 * H * d, z), sources, up))
        elif leaf in ("k_rope_proj.weight", "v_up_proj.weight"):
            continue
        elif ".shared_experts." not in spec.name:
            found.append(_same(spec.name, spec.shape))
        elif ".shared_experts.0.gate_up_proj." in spec.name:
            found += _shared(config, spec.name.partition("shared_experts.")[0] + "shared_experts.")
    return found


def _shared(config: ModelConfig, at: str) -> Iterator[Tensor]:
    """The shared experts as one that is as wide as all of them."""
    D, F, count = config.hidden_size, config.moe_intermediate_size, config.num_shared_experts
    up = tuple(f"{at}{i}.gate_up_proj.weight" for i in range(count))
    down = tuple(f"{at}{i}.down_proj.weight" for i in range(count))

    def half(which: int) -> Callable[..., Array]:
        return lambda *each: np.concatenate([x.reshape(2, F, D)[which] for x in each])

    yield Tensor(f"{at}gate_proj.weight", (count * F, D), up, half(0))
    yield Tensor(f"{at}up_proj.weight", (count * F, D), up, half(1))
    yield Tensor(
        f"{at}down_proj.weight", (D, count * F), down, lambda *each: np.concatenate(each, axis=1)
    )
