"""What Chronos needs of a model that another library builds: the geometry of its experts.

Every architecture spells its config.json in its own way; only counts are read here, under all the
spellings that Transformers and MLX-LM know. The rest of the file is the library's business, and the
file itself is never rewritten. Code that a checkpoint brings along (`auto_map`) is refused.
Not known here: shapes, and which layers have experts; those are read from the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from chronos.common.disk.tensors import first_dtype
from chronos.common.errors import ConfigError
from chronos.common.model.config import DTYPE_BYTES, MODEL_TYPE, ModelConfig, load_config
from chronos.common.model.defaults import class_defaults
from chronos.common.model.quantization import coding_of
from chronos.common.model.weights import SAFETENSORS_DTYPE

# Spellings of one count, the most usual first. Where a file has several, the first is taken: the
# others are then copies that a library keeps for older versions of itself.
_SPELLINGS = {
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "max_position_embeddings": (
        "max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions",
        "seq_length", "model_max_length",
    ),
    "num_hidden_layers": (
        "num_hidden_layers", "n_layers", "num_layers", "n_layer", "layers_block_type",
    ),
    "num_experts": (
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        "num_routed_experts",
    ),
    "num_experts_per_tok": (
        "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk",
        "moe_top_k", "moe_k", "top_k_experts", "top_k",
    ),
    "num_shared_experts": (
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert",
    ),
}  # fmt: skip
# Where the file gives no number of shared experts but the width of one.
_SHARED_WIDTHS = (
    "shared_expert_intermediate_size", "shared_intermediate_size",
    "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "share_expert_dim",
)  # fmt: skip
# Architectures that always have one, which their files do not say.
_ALWAYS_SHARED = frozenset({"llama4", "llama4_text", "hunyuan_v1_moe"})
# The text model of a multimodal file; DBRX keeps the counts of its experts apart.
_NESTED = ("text_config", "ffn_config")
_LIMITS = {
    "vocab_size": 4_000_000,
    "max_position_embeddings": 1 << 30,
    "num_hidden_layers": 4_096,
    "num_experts": 65_535,
    "num_experts_per_tok": 1_024,
}
# Scalings of positions whose factor stretches the context; LongRoPE's and Llama 3's files name what
# they reach.
_STRETCHED = ("yarn", "linear", "dynamic")
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPE.items()} | {"F64": "float64"}


class Geometry(Protocol):
    """What sessions, traces and meters read of any model's config, native or guest."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def num_shared_experts(self) -> int: ...
    @property
    def least_slots(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def dtype_bytes(self) -> int: ...


@dataclass(frozen=True)
class GuestConfig:
    """The counts of another library's config.json; the rest stays in that file.

    max_position_embeddings: what the scaling of positions allows, where that is more than the file
    says. dtype: "bfloat16", "float16" or "float32", of the dense part. num_shared_experts: 0 where
    the blocks have none. quantization: "" or the method the checkpoint is stored with, as the file
    names it ("mlx" for MLX-LM's own); what Chronos does not unpack is refused by this name. coding:
    the encoding of what the method quantised, "" where that is MLX-LM's to say, path by path, or
    nobody's. rope_type: how positions are scaled, "" where they are not.
    """

    model_type: str
    vocab_size: int
    max_position_embeddings: int
    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int = 0
    dtype: str = "float32"
    quantization: str = ""
    coding: str = ""
    rope_type: str = ""
    lookahead_steps: ClassVar[int] = 0  # it has no LookaheadRouter

    @property
    def least_slots(self) -> int:
        """Experts that must have room at once: those of one token in a layer."""
        return self.num_experts_per_tok

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @classmethod
    def from_json(cls, source: dict[str, Any] | str | Path) -> GuestConfig:
        """Read the counts from a JSON object, file or model folder.

        Raises ConfigError, naming the key, for `auto_map`, a model without routed experts and
        counts that are missing or out of range.
        """
        return cls.parse(*load_config(source))

    @classmethod
    def parse(cls, data: dict[str, Any], where: str) -> GuestConfig:
        """The counts in a JSON object that came from the file `where` ("": from none)."""
        model_type = data.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            raise ConfigError("config.json names no model_type", where)
        flat = data | {k: v for key in _NESTED for k, v in _object(data, key, where).items()}
        if lost := [name for name in _LIMITS if _spelled(flat, name) is None]:
            flat = _with_defaults(flat, lost, _type_of_text(data, model_type))
        counts = {name: _count(flat, name, where) for name in _LIMITS}
        rope = _scaling(flat)
        counts["max_position_embeddings"] = _context(rope, counts["max_position_embeddings"])
        if counts["num_experts_per_tok"] > counts["num_experts"]:
            raise ConfigError("num_experts_per_tok is above num_experts", where)
        quantization, coding = _quantization(flat, where)
        return cls(
            model_type=model_type,
            num_shared_experts=_shared(flat, model_type),
            dtype=_dtype(flat, where),
            quantization=quantization,
            coding=coding,
            rope_type=str(rope.get("rope_type", ""))[:40],
            **counts,
        )


def read_config(folder: str | Path) -> ModelConfig | GuestConfig:
    """The config of a model folder, ours or another library's. Raises ConfigError."""
    data, where = load_config(folder)
    kind = ModelConfig if data.get("model_type") == MODEL_TYPE else GuestConfig
    return kind.parse(data, where)


def end_ids(folder: str | Path) -> frozenset[int]:
    """Token ids that end a reply: those of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if not path.exists():
            continue
        data, where = load_config(path)
        data = data | _object(data, "text_config", where)
        ids = data.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if found := frozenset(i for i in ids if type(i) is int and i >= 0):
            return found
    return frozenset()


def mlx_lm_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Keys that Transformers 5 writes in a way of its own, as MLX-LM reads them. It would refuse a
    file without them, or take a default."""
    keys: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        keys = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
        scaled = rope.get("rope_type", "default") != "default"
        keys["rope_scaling"] = rope | {"type": rope["rope_type"]} if scaled else None
    if "num_local_experts" in config:
        keys["num_experts"] = config["num_local_experts"]
    return {key: value for key, value in keys.items() if key not in config}


def _object(data: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is not an object", where)
    return value


def _type_of_text(data: dict[str, Any], model_type: str) -> str:
    """The model_type of the part that writes text, by which its defaults are known."""
    text = data.get("text_config")
    if not isinstance(text, dict):
        return model_type
    named = text.get("model_type")
    return named if isinstance(named, str) else f"{model_type}_text"


def _with_defaults(flat: dict[str, Any], lost: list[str], model_type: str) -> dict[str, Any]:
    """Counts that a file leaves out are what Transformers takes for them."""
    defaults = class_defaults(model_type)
    keys = {name: _spelled(defaults, name) for name in lost}
    return flat | {key: defaults[key] for key in keys.values() if key is not None}


def _spelled(data: dict[str, Any], name: str) -> str | None:
    return next((key for key in _SPELLINGS[name] if data.get(key) is not None), None)


def _count(data: dict[str, Any], name: str, where: str) -> int:
    """A count in the first spelling that is there; of a list, one a layer, the largest."""
    key = _spelled(data, name)
    if key is None:
        if name == "num_experts":
            raise ConfigError(
                f"config.json names no routed experts ({', '.join(_SPELLINGS[name])})",
                where,
                "Chronos runs Mixture-of-Experts models",
            )
        raise ConfigError(
            f"config.json has no {name}, and no default for it is known here",
            where,
            f'add "{name}" with the number that the model was made with',
        )
    value = data[key]
    if key == "layers_block_type" and isinstance(value, list):  # a name for each layer
        value = len(value)
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        value = max(value)
    if type(value) is not int or not 1 <= value <= _LIMITS[name]:
        raise ConfigError(f"{key} must be 1 to {_LIMITS[name]}, not {str(data[key])[:80]}", where)
    return value


def _scaling(data: dict[str, Any]) -> dict[str, Any]:
    """How positions are scaled, under either of its keys; {} where they are not."""
    rope = data.get("rope_parameters") or data.get("rope_scaling")
    if not isinstance(rope, dict):
        return {}
    kind = rope.get("rope_type", rope.get("type"))
    return {**rope, "rope_type": kind} if isinstance(kind, str) and kind != "default" else {}


def _context(rope: dict[str, Any], named: int) -> int:
    """Tokens that the scaling of positions allows: recipes add it and leave the number alone."""
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind not in _STRETCHED or not isinstance(factor, int | float) or not 1 <= factor <= 4096:
        return named
    original = rope.get("original_max_position_embeddings")
    start = original if kind == "yarn" and type(original) is int else named
    return min(max(named, int(start * factor)), _LIMITS["max_position_embeddings"])


def _shared(data: dict[str, Any], model_type: str) -> int:
    for key in _SPELLINGS["num_shared_experts"]:
        value = data.get(key)
        if isinstance(value, list):
            value = max((item for item in value if type(item) is int), default=0)
        if type(value) is int and value >= 0:
            return min(value, 64)
    wide = any(type(data.get(key)) is int and data[key] > 0 for key in _SHARED_WIDTHS)
    return int(wide or model_type in _ALWAYS_SHARED)


def _dtype(data: dict[str, Any], where: str) -> str:
    """As the file says, else what Transformers then takes from the tensors."""
    name = data.get("dtype") or data.get("torch_dtype")
    if name is None and where:
        stored = first_dtype(Path(where).parent)
        name = _DTYPES.get(stored, stored)
    name = str(name or "float32").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ConfigError(
            f"dtype must be one of {sorted(DTYPE_BYTES)}, not {name[:80]!r}",
            where,
            'add "dtype" with one of these: the weights are then computed in it',
        )
    return name


def _quantization(data: dict[str, Any], where: str) -> tuple[str, str]:
    if _object(data, "quantization", where):
        return "mlx", ""  # MLX-LM writes its settings under both keys
    settings = _object(data, "quantization_config", where)
    return coding_of(settings) if settings else ("", "")
