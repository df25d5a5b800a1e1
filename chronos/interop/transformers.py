"""Native Chronos models as models of Transformers, once `chronos.interop.transformers` is imported.

Afterwards `AutoConfig`, `AutoModelForCausalLM` and `pipeline` know model folders of type "chronos",
packed or not; weights go in and out through the torch backend's own reader and writer, so logits
and folders are Chronos' own. All experts are resident here: `chronos.load` streams.
With a cache each row of a batch runs by itself (padding then costs nothing and a row's tokens are
those of `Engine`), without one the batch runs as a whole. Trainers of other libraries train these
models; dropout is a module that they know how to switch off, simulated misses are off here.
Not covered: sharded and quantised weights, input embeddings, hidden states and attentions as
outputs, assisted decoding. MLX-LM looks models up in its own package and cannot be taught this way.

Shape legend: B batch, T new tokens, S all columns seen, V vocabulary, E experts.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, ClassVar

from chronos import backends
from chronos.common.errors import MissingBackendError, ShapeMismatch, UsageError
from chronos.common.layout import is_packed, packed_experts
from chronos.common.layout.codecs import SWIGLU
from chronos.common.model.config import ModelConfig
from chronos.common.text.tokenizer import Tokenizer
from chronos.run import hub
from chronos.run.models import resolve_model

backends.load("torch")  # says what to install where torch is missing

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from chronos.backends.torch import pick_device  # noqa: E402
from chronos.backends.torch.checkpoint import load_model, save_model  # noqa: E402
from chronos.backends.torch.model import Cache, Model, Output  # noqa: E402
from chronos.backends.torch.moe import Routing  # noqa: E402
from chronos.common.text.sampling import PIECE  # noqa: E402

try:
    import huggingface_hub
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationConfig,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
except ImportError as error:
    raise MissingBackendError(
        "chronos.interop.transformers needs Transformers 5.20 or newer",
        str(error).splitlines()[0],
        "pip install 'chronos-moe[guests]'",
    ) from error

_FIELDS = tuple(ModelConfig().to_json())
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# What AutoModel passes along beside those, and reading a Chronos folder has no use for.
_UNUSED_OPTIONS = frozenset(
    "_commit_hash _from_auto _from_pipeline adapter_kwargs attn_implementation code_revision"
    " experts_implementation low_cpu_mem_usage proxies trust_remote_code use_safetensors"
    " weights_only".split()
)


class ChronosConfig(PreTrainedConfig):
    """A `ModelConfig` as Transformers keeps configs: one attribute per key of config.json.

    Raises ConfigError for a geometry that Chronos refuses.
    """

    model_type = "chronos"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    auto_map: ClassVar[dict[str, str]] = {}  # no code beside the weights; TRL asks

    def __init__(self, **kwargs: Any) -> None:
        names = (*_FIELDS, "torch_dtype", "rope_scaling")
        own = {key: kwargs.pop(key) for key in names if key in kwargs}
        for key in ("dtype", "torch_dtype"):
            if key in own:
                own[key] = _dtype_name(own[key])
        values = ModelConfig.from_json(own | {"model_type": self.model_type}).to_json()
        for key in ("model_type", "num_local_experts"):
            del values[key]  # constant, or a second spelling of a value that stays
        values.pop("rope_scaling", None)  # of one that is a property
        self._rope: dict[str, Any] = values.pop("rope_parameters")
        values["architectures"] = own.get("architectures", values["architectures"])
        dtype = values.pop("dtype")
        self.rope_theta: float = values.pop("rope_theta")
        for key, value in values.items():
            setattr(self, key, value)
        super().__init__(dtype=dtype, architectures=values["architectures"], **kwargs)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The newer spelling of `rope_theta`, and how positions are scaled."""
        return self._rope | {"rope_theta": self.rope_theta}

    @rope_parameters.setter
    def rope_parameters(self, value: dict[str, Any]) -> None:
        self.rope_theta = value.get("rope_theta", self.rope_theta)
        if "rope_type" in value:
            self._rope = dict(value)

    def native(self) -> ModelConfig:
        """The geometry as the backends know it. Raises ConfigError."""
        values = {key: getattr(self, key) for key in _FIELDS}
        return ModelConfig.from_json(values | {"dtype": _dtype_name(self.dtype)})

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: Chronos' own keys, in both spellings, and no others."""
        return self.native().to_json()


class ChronosCache:
    """One native cache per row; `seen` counts columns, padding included."""

    is_compileable = is_croppable = False

    def __init__(self, rows: list[Cache]) -> None:
        self.rows, self.seen = rows, 0

    def get_seq_length(self, layer: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beams: Tensor) -> None:
        """Row i goes on from what was row beams[i]."""
        old, taken = self.rows, set[int]()
        self.rows = []
        for beam in beams.tolist():
            self.rows.append(copy.deepcopy(old[beam]) if beam in taken else old[beam])
            taken.add(beam)


class ChronosForCausalLM(PreTrainedModel, GenerationMixin):
    """A native model, `self.native`, with the inputs, outputs and `generate` of Transformers."""

    config_class = ChronosConfig
    base_model_prefix = "native"
    main_input_name = "input_ids"
    _is_stateful = True  # the ring of a window cannot be rolled back

    def __init__(self, config: ChronosConfig) -> None:
        super().__init__(config)
        self.native = _without_misses(Model(config.native()))
        self.register_load_state_dict_pre_hook(_names_of_a_folder)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: ChronosConfig | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> ChronosForCausalLM:
        """Read a native folder, packed or not, an id of the hub or "demo"; in evaluation mode.

        dtype: of all weights; without one the experts stay as stored and, on a CPU, the dense part
        is widened to float32, in which `chronos generate` computes too. device_map: a device.
        Raises UsageError for options that do not apply, ConfigError, CorruptFileError or
        ShapeMismatch.
        """
        dtype = options.pop("torch_dtype", None) if dtype is None else dtype
        if odd := sorted(options.keys() - _UNUSED_OPTIONS - {*_HUB_OPTIONS}):
            raise UsageError(f"ChronosForCausalLM.from_pretrained takes no {', '.join(odd)}")
        folder = _folder(os.fspath(pretrained_model_name_or_path), options)
        if config is None:
            config = ChronosConfig(**ModelConfig.from_json(folder).to_json())
        _refuse_coded(folder, ModelConfig.from_json(folder))
        weights = load_model(folder, _device(device_map), True, as_stored=False).state_dict()
        with torch.device("meta"):
            model = cls(config)
        model.native = _without_misses(_filled(config.native(), weights, str(folder)))
        if dtype not in (None, "auto"):
            config.dtype = getattr(torch, _dtype_name(dtype))
            model.to(config.dtype)
        model.name_or_path = config.name_or_path = str(pretrained_model_name_or_path)
        model.generation_config = _generation_config(folder)
        model.eval()
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write an unpacked native folder: what `chronos generate` and `chronos pack` take.

        state_dict: the whole model's weights, in place of its own. Options about shards and file
        formats do not apply. Raises UsageError for a packed folder, ShapeMismatch for weights of
        another geometry.
        """
        folder = Path(save_directory)
        if push_to_hub:
            raise UsageError("push_to_hub is not supported", fix=f"hf upload NAME {folder}")
        if is_packed(folder):
            raise UsageError("the folder holds a packed model", str(folder), "save into another")
        if not is_main_process:
            return
        state = self.state_dict() if state_dict is None else state_dict
        weights = {name.removeprefix("native."): value for name, value in state.items()}
        native = _filled(self.config.native(), weights, "state_dict")
        (folder / "lookahead.safetensors").unlink(missing_ok=True)  # an earlier model's
        save_model(native, folder)
        self.generation_config.save_pretrained(folder)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: ChronosCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Logits [B, T, V] of input_ids [B, T]; zeros where a row is padded and cached.

        attention_mask: 1 for text and 0 for padding, [B, T] or [B, S] with a cache; text is in one
        piece, and at the right end where there is a cache. use_cache: off unless asked for.
        labels: -100 is left out; the loss is the mean cross entropy of the next token alone, or
        the sum over `num_items_in_batch`, the labels of all micro-batches of an update.
        logits_to_keep: the last so many positions, or their indices. output_router_logits: log
        probabilities [B * T, E] of each layer, without a cache only. options: what other libraries
        pass along; UsageError for one that is set.
        """
        _refuse_set(options)
        if past_key_values is None and not use_cache:
            last = labels is None and isinstance(logits_to_keep, int) and logits_to_keep == 1
            out = self._whole(input_ids, attention_mask, last_only=last)
            logits_BTV, routing = out.logits, out.routing
        else:
            if past_key_values is None:
                past_key_values = ChronosCache([self.native.new_cache() for _ in input_ids])
            rows = _rows(input_ids, attention_mask, past_key_values)
            last = isinstance(logits_to_keep, int) and logits_to_keep == 1
            logits_BTV, routing = self._cached(rows, past_key_values, last), None
            past_key_values.seen += input_ids.shape[1]
        loss = None
        if labels is not None:
            V = logits_BTV.shape[-1]
            loss = self.loss_function(logits_BTV, labels, V, num_items_in_batch=num_items_in_batch)
        if isinstance(logits_to_keep, Tensor):
            logits_BTV = logits_BTV[:, logits_to_keep]
        elif logits_to_keep:
            logits_BTV = logits_BTV[:, -logits_to_keep:]
        scores = None
        if output_router_logits and routing is not None:
            scores = _router_logits(routing)
        result = MoeCausalLMOutputWithPast(
            loss=loss, logits=logits_BTV, past_key_values=past_key_values, router_logits=scores
        )
        return result.to_tuple() if return_dict is False else result

    def _whole(self, ids_BT: Tensor, mask_BT: Tensor | None, **options: bool) -> Output:
        """The batch at once, without a cache."""
        segments_BT = None if mask_BT is None else _segments(mask_BT, ids_BT)
        out: Output = self.native(ids_BT, segments_BT=segments_BT, **options)
        return out

    def _cached(self, rows: list[Tensor], cache: ChronosCache, last: bool) -> Tensor:
        """Each row behind its own cache, in the pieces of `Session`, aligned at the right."""
        logits = []
        for ids_T, own in zip(rows, cache.rows, strict=True):
            chunks: list[Output] = [
                self.native(ids_C[None], cache=own, last_only=last) for ids_C in ids_T.split(PIECE)
            ]
            logits.append(
                chunks[-1].logits[0] if last else torch.cat([c.logits[0] for c in chunks])
            )
        width = max(map(len, logits))
        return torch.stack(
            [nn.functional.pad(x_TV, (0, 0, width - len(x_TV), 0)) for x_TV in logits]
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.native.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.native.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """The head as a layer, made when asked for: its weight is the embedding's, stored once."""
        weight = self.native.model.embed_tokens.weight
        with torch.device("meta"):
            head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        head.weight = weight
        return head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Raises UsageError for a head that is not the embedding, to which it is tied."""
        if value.weight is not self.native.model.embed_tokens.weight:
            raise UsageError("the head is the embedding; set the input embeddings")

    @property
    def base_model(self) -> Any:
        """The model without its head, to be called."""
        return self._states

    def _states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_router_logits: bool = False,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """`last_hidden_state` [B, T, D], of which the output embeddings make logits."""
        _refuse_set(options)
        if use_cache:
            raise UsageError("hidden states come without a cache", fix="use_cache=False")
        out = self._whole(input_ids, attention_mask, want_logits=False)
        result = MoeModelOutputWithPast(
            last_hidden_state=out.hidden,
            router_logits=_router_logits(out.routing) if output_router_logits else None,
        )
        return result.to_tuple() if return_dict is False else result

    def init_weights(self) -> None:
        """Random weights as in training; `torch.manual_seed` decides which."""
        if self.device.type != "meta":
            self.native.initialize(int(torch.randint(1 << 31, (), device="cpu")))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own


def _folder(name: str, options: dict[str, Any]) -> Path:
    """The folder itself, or an id's snapshot in the hub's cache, asked for as Transformers does."""
    if Path(name).exists() or not hub.is_model_id(name):
        return resolve_model(name)
    passed = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*hub.PATTERNS], **passed))


def _refuse_coded(folder: Path, config: ModelConfig) -> None:
    """Experts that are no parameters as they are stored: Transformers has no place for them."""
    layout = packed_experts(folder, config, checked=False)
    if odd := set(() if layout is None else layout.encodings.values()) - {SWIGLU}:
        raise UsageError(
            f"the experts are encoded as {min(odd)}, which Transformers does not hold",
            str(folder),
            "run it with chronos.load, or load the folder it was packed from",
        )


def _filled(config: ModelConfig, weights: dict[str, Tensor], where: str) -> Model:
    """A native model around these very tensors. Raises ShapeMismatch."""
    with torch.device("meta"):
        model = Model(config)
    if not any(name.startswith("lookahead.") for name in weights):
        model.lookahead = None
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ShapeMismatch(str(error), where, "the config is of another geometry") from None
    return model


def _names_of_a_folder(
    model: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any
) -> None:
    """Take the names a folder has, too: a Trainer that resumes loads its checkpoint's file."""
    own = f"{prefix}native."
    for name in [n for n in state if n.startswith(prefix) and not n.startswith(own)]:
        state[own + name.removeprefix(prefix)] = state.pop(name)


def _refuse_set(options: dict[str, Any]) -> None:
    """Libraries pass what a model might have, unset; one that is set would have no effect."""
    if odd := sorted(
        name for name, value in options.items() if value is not None and value is not False
    ):
        raise UsageError(f"a native model takes no {', '.join(odd)}")


def _without_misses(model: Model) -> Model:
    """Trained without simulated misses: no other library's trainer could switch them off, and a
    policy must not differ from its reference by chance. The config keeps their probability."""
    for block in model.model.layers:
        block.mlp.mask_prob = 0.0
    return model


def _router_logits(routing: list[Routing]) -> tuple[Tensor, ...]:
    """Log probabilities [B * T, E] of each layer."""
    return tuple(decision.probs_TE.log() for decision in routing)


def _segments(mask_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """0 for text, -1 for padding. Raises UsageError where text is not in one piece."""
    if mask_BT.shape != ids_BT.shape:
        raise UsageError(
            f"attention_mask is {list(mask_BT.shape)}, input_ids {list(ids_BT.shape)}",
            fix="give one number a token, 1 for text and 0 for padding",
        )
    text_BT = mask_BT != 0
    starts = text_BT[:, :1].sum(1) + (text_BT[:, 1:] & ~text_BT[:, :-1]).sum(1)
    if bool((starts > 1).any()):
        raise UsageError("attention_mask has a hole inside a text; pad at one end")
    return text_BT.long() - 1


def _rows(ids_BT: Tensor, mask_BS: Tensor | None, cache: ChronosCache) -> list[Tensor]:
    """The new tokens of each row without its padding, which must be on the left."""
    if len(cache.rows) != len(ids_BT):
        raise UsageError(f"the cache has {len(cache.rows)} rows, input_ids has {len(ids_BT)}")
    if mask_BS is None:
        return list(ids_BT)
    T = ids_BT.shape[1]
    if mask_BS.shape[1] not in (T, T + cache.seen):
        raise UsageError(f"attention_mask has {mask_BS.shape[1]} columns, not {T + cache.seen}")
    new_BT = mask_BS[:, -T:] != 0
    if bool((new_BT[:, 1:] < new_BT[:, :-1]).any()) or not bool(new_BT[:, -1].all()):
        raise UsageError(
            "with a cache, padding must be on the left, and no row may be padding alone",
            fix='tokenizer.padding_side = "left"',
        )
    if cache.seen and bool((new_BT != 1).any()):
        raise UsageError("padding after the first tokens of a cached row is not supported")
    return [ids_T[-int(count) :] for ids_T, count in zip(ids_BT, new_BT.sum(1), strict=True)]


def _dtype_name(dtype: str | torch.dtype | None) -> str:
    return str(dtype or "float32").removeprefix("torch.")


def _device(device_map: Any) -> torch.device:
    """The one device of a device_map. Raises UsageError where a map names modules."""
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map in (None, "auto"):
        return pick_device(None if device_map else "cpu")
    if isinstance(device_map, dict):
        raise UsageError("device_map cannot spread a Chronos model", fix="name one device")
    return pick_device(f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map))


def _generation_config(folder: Path) -> GenerationConfig:
    """The folder's own, else one that stops where `Engine` does."""
    if (folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        return GenerationConfig()
    tokenizer = Tokenizer.load(folder)
    return GenerationConfig(eos_token_id=sorted(tokenizer.stop_ids), pad_token_id=tokenizer.pad_id)


AutoConfig.register(ChronosConfig.model_type, ChronosConfig, exist_ok=True)
AutoModelForCausalLM.register(ChronosConfig, ChronosForCausalLM, exist_ok=True)
