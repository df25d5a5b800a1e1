"""The model's geometry as one frozen dataclass, read from and written to a `config.json`.

A config is written in both spellings in use (`rope_theta` and `rope_parameters`, `num_experts` and
`num_local_experts`), since Transformers 5 and MLX-LM each misread a file that has only the other's.
Unknown keys are refused with the nearest valid name. Nothing is allocated before `ModelConfig`
has checked every bound. Not covered: foreign model types.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronos.common.disk import foreign
from chronos.common.errors import ConfigError

MODEL_TYPE = "chronos"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ATTENTION_KINDS = ("mla", "sliding")
ROUTING_SOURCES = ("gate", "informed", "lookahead", "history")
HISTORY_NORMS = ("mean", "unit")
# Written by other libraries beside the geometry; they carry nothing Chronos needs.
_IGNORED_KEYS = frozenset(
    "architectures transformers_version torch_dtype use_cache bos_token_id eos_token_id"
    " pad_token_id tie_word_embeddings hidden_act num_local_experts rope_parameters"
    " layer_types"
    " chronos_version is_encoder_decoder return_dict output_hidden_states".split()
)
LISTS = ("hybrid_pattern", "routing_source", "history_decay")  # tuples here, lists in JSON
# Bounds no model of this family needs to pass; they stop a hostile file before allocation.
_LIMITS = {
    "hidden_size": 65_536,
    "num_hidden_layers": 512,
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
    "head_dim": 1_024,
    "vocab_size": 4_000_000,
    "max_position_embeddings": 1 << 26,
    "num_experts": 65_535,
    "num_experts_per_tok": 1_024,
    "moe_intermediate_size": 1 << 20,
    "kv_latent_dim": 16_384,
    "rope_dim": 1_024,
    "sliding_window": 1 << 26,
    "lookahead_hidden_size": 1 << 17,
}
_MAX_PARAMETERS = 1 << 43


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of training beside cross-entropy; 0 switches one off. Formulas:
    `chronos/common/training/losses.py`."""

    balance: float = 0.01
    """Even use of the experts of a layer."""
    temporal: float = 0.0
    """Router probabilities of a token like those of the token before."""
    locality: float = 0.0
    """Probability on the experts that the token before picked."""
    lookahead: float = 0.5
    """The LookaheadRouter's forecast against the router's own probabilities."""
    lookahead_hit: float = 0.0
    """Its probability on the experts that were picked."""

    def __post_init__(self) -> None:
        if not all(_is_number(weight) and weight >= 0 for weight in vars(self).values()):
            raise ConfigError("loss_weights must be numbers of at least 0")


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (2309.00071), which carries rotations of positions beyond those of training, by
    Transformers' names of its numbers. What they do: `chronos/common/model/rope.py`."""

    factor: float
    """Tokens of the context by those of the one before."""
    original_max_position_embeddings: int
    """The context of before: tokens the model was trained for."""
    beta_fast: float = 32.0
    """Turns within that context from which on a rotation stays as it is."""
    beta_slow: float = 1.0
    """Turns up to which a rotation is slowed by the whole factor."""
    attention_factor: float = 0.0
    """What logits of attention are multiplied with, twice; 0: 0.1 ln(factor) + 1."""
    rope_type: str = "yarn"
    """The only one there is."""

    def __post_init__(self) -> None:
        numbers = (self.factor, self.beta_fast, self.beta_slow, self.attention_factor)
        tokens = self.original_max_position_embeddings
        if not all(map(_is_number, numbers)) or type(tokens) is not int:
            raise ConfigError("rope_scaling takes numbers, and whole tokens")
        limit = _LIMITS["max_position_embeddings"]
        if not (1 <= self.factor <= limit and 1 <= tokens <= limit):
            raise ConfigError("rope_scaling: factor and tokens must be at least 1")
        if not (0 < self.beta_slow < self.beta_fast and self.attention_factor >= 0):
            raise ConfigError(
                "rope_scaling: beta_slow must be above 0, beta_fast above it, attention_factor at"
                " least 0"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Geometry and numerics of a Chronos model. All sizes are counts of elements."""

    hidden_size: int = 512
    """Width of the states between layers."""
    num_hidden_layers: int = 8
    """Layers; each has attention and experts."""
    num_attention_heads: int = 8
    """Heads of queries."""
    num_key_value_heads: int = 4
    """Heads of keys and values; divides the heads of queries."""
    head_dim: int = 64
    """Width of a head; even."""
    vocab_size: int = 32_000
    """Tokens of the vocabulary; when training, the tokenizer's."""
    max_position_embeddings: int = 32_768
    """The context: tokens of prompt and reply."""
    rope_theta: float = 1e6
    """Base of the rotation of positions."""
    rope_scaling: RopeScaling | None = None
    """How positions beyond those of training are reached, where they are; a table."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in norms."""
    num_experts: int = 32
    """Routed experts of a layer."""
    num_experts_per_tok: int = 4
    """Of them, how many each token uses."""
    num_shared_experts: int = 1
    """Experts that every token uses beside them; 0 to 64."""
    moe_intermediate_size: int = 512
    """Width inside an expert."""
    norm_topk_prob: bool = True
    """Whether the weights of the experts used are made to sum to 1."""
    kv_latent_dim: int = 64
    """Width of the latent that `mla` layers cache in place of keys and values."""
    rope_dim: int = 32
    """Width of the part of a head that `mla` layers rotate; even."""
    sliding_window: int = 2_048
    """Tokens that `sliding` layers see."""
    hybrid_pattern: tuple[str, ...] = ATTENTION_KINDS
    """Attention of the layers, `mla` or `sliding`, repeated over them."""
    lookahead_steps: int = 2
    """Tokens ahead whose experts the LookaheadRouter forecasts; 0 to 16."""
    lookahead_hidden_size: int = 256
    """Width inside the LookaheadRouter."""
    routing_source: str | tuple[str, ...] = "gate"
    """What chooses a layer's experts, one for all layers or a list with one for each: `gate`;
    `informed`, a gate that sees the token before too; `lookahead`, what is known after the first
    layer, for later ones; `history`, a few resident experts by an informed gate and the others by
    the tokens before alone, so that they are known a token ahead."""
    num_resident_experts: int = 4
    """History: the first experts of a layer, always in memory."""
    num_resident_experts_per_tok: int = 2
    """History: of those used for a token, how many are resident ones."""
    history_decay: float | tuple[float, ...] = 0.9
    """History: what a token counts for the choice of streamed experts, by that of the token after
    it; several values share these experts out, in order and evenly."""
    history_norm: str = "mean"
    """History: what the weighted sum of the tokens before is divided by: `mean`, its weights' sum;
    `unit`, the root of the sum of their squares, so that it varies as much as one token's
    scores."""
    streamed_balance: float = 1.0
    """History: factor on the balance of the streamed experts."""
    loss_weights: LossWeights = LossWeights()
    """Weights of the terms of training."""
    fallback_mask_prob: float = 0.0
    """Share of picks in training that the shared experts stand in for."""
    dropout: float = 0.0
    """Share of what attention and experts add that training zeroes."""
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    dtype: str = "float32"
    """What weights are written as: `float32`, `bfloat16` or `float16`."""

    def __post_init__(self) -> None:
        _check(self)

    def attention_kind(self, layer: int) -> str:
        """ "mla" or "sliding": the pattern repeats over the layers."""
        return self.hybrid_pattern[layer % len(self.hybrid_pattern)]

    def routing_of(self, layer: int) -> str:
        """What chooses a layer's experts: one of ROUTING_SOURCES."""
        source = self.routing_source
        return source if isinstance(source, str) else source[layer]

    @property
    def routing_sources(self) -> tuple[str, ...]:
        """What chooses the experts of each layer."""
        return tuple(map(self.routing_of, range(self.num_hidden_layers)))

    @property
    def decays(self) -> tuple[float, ...]:
        """The values of `history_decay`."""
        decay = self.history_decay
        return decay if isinstance(decay, tuple) else (decay,)

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed (or shared) expert: gate, up and down projections."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def num_routed_experts(self) -> int:
        """Routed experts of the whole model, all layers."""
        return self.num_hidden_layers * self.num_experts

    @property
    def least_slots(self) -> int:
        """Experts that must have room at once: those of one token in a layer; of layers that
        announce theirs, all that always stay and the announced ones of one token."""
        follow = self.routing_sources.count("history")
        streamed = self.num_experts_per_tok - self.num_resident_experts_per_tok
        known = follow * (self.num_resident_experts + streamed) if follow else 0
        others = self.num_experts_per_tok if follow < self.num_hidden_layers else 0
        return max(self.num_experts_per_tok, known + others)

    def to_json(self) -> dict[str, Any]:
        """The config.json object, in both spellings."""
        data = dataclasses.asdict(self)
        scaling = data.pop("rope_scaling") or {}
        if scaling:
            if not scaling["attention_factor"]:
                del scaling["attention_factor"]
            data["rope_scaling"] = scaling
        for name in LISTS:
            if isinstance(data[name], tuple):
                data[name] = list(data[name])
        return data | {
            "model_type": MODEL_TYPE,
            "architectures": ["ChronosForCausalLM"],
            "num_local_experts": self.num_experts,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta} | scaling,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
        }

    def dumps(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_json(), indent=2) + "\n"

    @classmethod
    def from_json(cls, source: dict[str, Any] | str | Path) -> ModelConfig:
        """Read a config from its JSON object, file or model folder. Raises ConfigError."""
        return cls.parse(*load_config(source))

    @classmethod
    def parse(cls, data: dict[str, Any], where: str) -> ModelConfig:
        """The config in a JSON object that came from `where`. Raises ConfigError."""
        if data.get("model_type") != MODEL_TYPE:
            raise ConfigError(
                f"model_type is {data.get('model_type')!r}, not {MODEL_TYPE!r}", where
            )
        try:
            return cls(**_fields(data, where))
        except ConfigError as error:
            raise ConfigError(error.what, where or error.where, error.fix) from None


def load_config(source: dict[str, Any] | str | Path) -> tuple[dict[str, Any], str]:
    """The JSON object of a config.json and where it is; refuses one that asks for code of its own.

    Raises ConfigError.
    """
    if isinstance(source, dict):
        data, where = source, ""
    else:
        data, where = _read(Path(source))
    if "auto_map" in data:
        raise ConfigError(
            "config.json asks for code from the checkpoint (auto_map); Chronos runs none",
            where,
            "remove auto_map if the architecture is a built-in one",
        )
    return data, where


def _read(path: Path) -> tuple[dict[str, Any], str]:
    if path.is_dir():
        path = path / "config.json"
    try:
        if path.stat().st_size > 4 << 20:
            raise ConfigError("config.json is larger than 4 MiB", str(path))
        raw = path.read_bytes()
        if error := foreign.by_content(path, raw[: foreign.HEAD]):
            raise ConfigError(error.what, error.where, error.fix)
        data = json.loads(raw.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError("no config.json", str(path), "name a model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        fix = "restore the one that came with the weights"
        raise ConfigError(f"config.json cannot be read: {error}", str(path), fix) from None
    if not isinstance(data, dict):
        raise ConfigError("config.json is not a JSON object", str(path))
    return data, str(path)


def _fields(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Known fields under our own names; both spellings must agree where both are given."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    for key in data.keys() - known - _IGNORED_KEYS - {"model_type"}:
        near = difflib.get_close_matches(key, known, n=1)
        raise ConfigError(
            f"unknown key {key!r}", where, f"did you mean {near[0]!r}?" if near else ""
        )
    fields = {key: value for key, value in data.items() if key in known}
    fields["rope_scaling"] = _rope_scaling(fields.get("rope_scaling") or {}, where)
    rope = data.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError("rope_parameters is not an object", where)
    _merge(fields, "rope_theta", rope.get("rope_theta"), where)
    _merge(fields, "num_experts", data.get("num_local_experts"), where)
    _merge(fields, "dtype", data.get("torch_dtype"), where)
    _merge(fields, "rope_scaling", _rope_scaling(rope, where), where)
    if data.get("tie_word_embeddings", True) is not True:
        raise ConfigError("tie_word_embeddings must be true", where)
    for name in LISTS:
        if isinstance(fields.get(name), list):
            fields[name] = tuple(fields[name])
    weights = fields.get("loss_weights")
    if weights is not None:
        fields["loss_weights"] = _loss_weights(weights, where)
    return fields


def _merge(fields: dict[str, Any], name: str, other: Any, where: str) -> None:
    if other is None:
        return
    if fields.get(name) is None:
        fields[name] = other
    if fields[name] != other:
        raise ConfigError(
            f"{name} is {fields[name]!r} in one spelling, {other!r} in the other", where
        )


def _rope_scaling(value: Any, where: str) -> RopeScaling | None:
    """What one of the two spellings says of it, beside what is not about it."""
    given = value if isinstance(value, dict) else {"rope_type": value}
    kind = given.get("rope_type", given.get("type", "default"))
    rest = {k: v for k, v in given.items() if k not in ("rope_type", "type", "rope_theta")}
    if kind in ("default", None):
        return None
    if kind != "yarn":
        raise ConfigError(f"RoPE scaling {kind!r} is not supported", where, "use yarn or default")
    names = {field.name for field in dataclasses.fields(RopeScaling)}
    odd = sorted(k for k, v in rest.items() if k not in names and v not in (None, True))
    needed = {"factor", "original_max_position_embeddings"}
    if odd or needed - rest.keys():
        what = f"has {odd[0]}" if odd else f"lacks {min(needed - rest.keys())}"
        raise ConfigError(f"RoPE scaling {what}", where, f"yarn takes {', '.join(sorted(names))}")
    return RopeScaling(**{k: v for k, v in rest.items() if k in names and v is not None})


def _loss_weights(value: Any, where: str) -> LossWeights:
    names = {field.name for field in dataclasses.fields(LossWeights)}
    if not isinstance(value, dict) or value.keys() - names:
        raise ConfigError(f"loss_weights takes {sorted(names)}", where)
    return LossWeights(**value)


def _check(c: ModelConfig) -> None:
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
            raise ConfigError(f"{field.name} must be a whole number, not {value!r}")
        if field.type == "float" and not _is_number(value):
            raise ConfigError(f"{field.name} must be a number, not {value!r}")
        if field.type == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{field.name} must be true or false, not {value!r}")
    for name, limit in _LIMITS.items():
        if not 1 <= getattr(c, name) <= limit:
            raise ConfigError(f"{name} must be 1 to {limit}, not {getattr(c, name)}")
    rules = {
        "num_experts_per_tok is above num_experts": c.num_experts_per_tok > c.num_experts,
        "num_shared_experts must be 0 to 64": not 0 <= c.num_shared_experts <= 64,
        "num_attention_heads must be a multiple of num_key_value_heads": bool(
            c.num_attention_heads % c.num_key_value_heads
        ),
        "rope_dim must be even": bool(c.rope_dim % 2),
        "head_dim must be even": bool(c.head_dim % 2),
        "lookahead_steps must be 0 to 16": not 0 <= c.lookahead_steps <= 16,
        "rope_theta and rms_norm_eps must be above 0": c.rope_theta <= 0 or c.rms_norm_eps <= 0,
        "rope_scaling needs rope_theta above 1, and reaches factor times"
        " original_max_position_embeddings": c.rope_scaling is not None
        and (
            c.rope_theta <= 1
            or c.max_position_embeddings
            > math.ceil(c.rope_scaling.factor * c.rope_scaling.original_max_position_embeddings)
        ),
        "dropout and fallback_mask_prob must be in [0, 1)": not (
            0 <= c.dropout < 1 and 0 <= c.fallback_mask_prob < 1
        ),
        "fallback_mask_prob needs a shared expert": c.fallback_mask_prob > 0
        and c.num_shared_experts == 0,
        f"dtype must be one of {sorted(DTYPE_BYTES)}": c.dtype not in list(DTYPE_BYTES),
        f"hybrid_pattern must list some of {ATTENTION_KINDS}": not (
            isinstance(c.hybrid_pattern, tuple)
            and c.hybrid_pattern
            and len(c.hybrid_pattern) <= c.num_hidden_layers
            and all(kind in ATTENTION_KINDS for kind in c.hybrid_pattern)
        ),
    }
    for message, broken in (rules | _routing_rules(c)).items():
        if broken:
            raise ConfigError(message)
    if (c.num_routed_experts + c.num_shared_experts) * c.expert_parameters > _MAX_PARAMETERS:
        raise ConfigError(f"the experts would hold more than {_MAX_PARAMETERS} parameters")


def _routing_rules(c: ModelConfig) -> dict[str, bool]:
    """What `routing_source` asks for: message -> whether it is broken."""
    listed = c.routing_source if isinstance(c.routing_source, tuple) else (c.routing_source,)
    rules = {
        f"routing_source must be one of {ROUTING_SOURCES}, or a list of them with one for each of"
        f" the {c.num_hidden_layers} layers": any(name not in ROUTING_SOURCES for name in listed)
        or (isinstance(c.routing_source, tuple) and len(listed) != c.num_hidden_layers),
        "history_decay must be one number or several, between 0 and 1, at most one a streamed"
        " expert": not (
            c.decays
            and all(_is_number(decay) and 0 < decay < 1 for decay in c.decays)
            and len(c.decays) <= max(1, c.num_experts - c.num_resident_experts)
        ),
        f"history_norm must be one of {HISTORY_NORMS}": c.history_norm not in HISTORY_NORMS,
        "streamed_balance must be at least 0": c.streamed_balance < 0,
    }
    if "history" not in listed:
        return rules
    resident, streamed = c.num_resident_experts, c.num_experts - c.num_resident_experts
    near = c.num_resident_experts_per_tok
    far = c.num_experts_per_tok - near
    return rules | {
        "history routing needs 1 <= num_resident_experts_per_tok <= num_resident_experts": not (
            1 <= near <= resident
        ),
        "history routing needs at least one streamed expert for each token, and as many as that:"
        f" {far} of {streamed} are left beside the resident ones": not 1 <= far <= streamed,
        "history routing needs norm_topk_prob": not c.norm_topk_prob,
    }
