"""Having Transformers build a model: which class, from which files, without its experts' weights.

Whatever the library raises over a config, and whatever it says of the tensors it was given, is told
in our words. Not known here: how the model runs (`model`) and where its experts are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from chronos.backends.torch.checkpoint import from_bytes
from chronos.backends.torch.guest.experts import is_experts, parameters
from chronos.backends.torch.quantised import dequantised
from chronos.common.disk.header import TensorEntry
from chronos.common.disk.tensors import locate_tensors
from chronos.common.errors import ConfigError, ShapeMismatch
from chronos.common.layout.finite import check_below
from chronos.common.layout.quantised import VALUES, grouped, index_limits, is_coded, shape_of
from chronos.common.model.guest import GuestConfig

_ALIGN = 64  # of everything torch allocates


def text_model(config: GuestConfig, folder: Path) -> tuple[Any, Any]:
    """The settings and the class of the model that writes text, as AutoModelForCausalLM finds
    them: of a multimodal file's, the text model's own where it has a class for that."""
    settings = built(
        lambda: transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ),
        config,
        folder,
    )
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
    if kind is None:
        raise ConfigError(
            f"{config.model_type} is no model that writes text",
            str(folder),
            f"Transformers {transformers.__version__} has no causal language model for it: use a"
            " checkpoint of its text model, or try --backend mlx",
        )
    for part in (settings, settings.get_text_config(decoder=True)):
        for key in ("quantization_config", "quantization"):  # Chronos dequantises
            if hasattr(part, key):
                delattr(part, key)
    text = settings.sub_configs.get("text_config")
    if text is not None and kind.config_class is text:
        settings = settings.get_text_config()
    return settings, kind


def check_files(folder: Path) -> None:
    """Of a folder that Transformers reads itself. A truncated file is an error here and a signal
    under mmap."""
    locate_tensors(folder)
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / name).exists() for name in names):
        raise ConfigError(
            "Transformers does not find shards without model.safetensors.index.json",
            str(folder),
            f"pack it, which does: chronos pack {folder} -o {folder}-packed",
        )


def check_report(report: Mapping[str, Any], folder: Path) -> None:
    """What the library says of its loading, in our words."""
    if missing := sorted(report["missing_keys"]):
        raise ShapeMismatch(f"tensor {missing[0]} is missing ({len(missing)} in all)", str(folder))
    for name, found, wanted in sorted(report["mismatched_keys"], key=lambda item: str(item[0])):
        raise ShapeMismatch(
            f"tensor {name} is {list(found)}, config.json implies {list(wanted)}",
            str(folder),
            "config.json must be that of these weights: was the vocabulary resized since?",
        )


def built(step: Callable[[], Any], config: GuestConfig, folder: Path) -> Any:
    """The library's answer; whatever it raises over a config, in our words."""
    try:
        return step()
    except Exception as error:  # anything a hostile or unknown config.json can cause
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"Transformers {transformers.__version__} cannot build {config.model_type}: "
            f"{reason[0][:200]}",
            str(folder),
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of the library's loader: errors are raised here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def without_experts(kind: Any) -> Any:
    """A model class whose experts modules hold no parameters, only the shapes of an expert.

    The library looks its renames up by the class's name and module, so those stay.
    """

    def __init__(self: Any, config: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, config, *args, **options)
        empty_experts(self)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def empty_experts(core: Any) -> None:
    """Take the parameters from a model's experts modules, which then know the shapes of one."""
    for module in filter(is_experts, core.modules()):
        held = parameters(module)
        module.chronos_shapes = {name: tuple(p.shape[1:]) for name, p in held.items()}
        for name in held:
            del module._parameters[name]
        module._is_hf_initialized = True  # nothing to initialise


def dense_tensors(
    found: Iterable[tuple[TensorEntry, memoryview]],
    encoding_of: Callable[[str], str],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The dense part, quantised matrices dequantised; encoding_of: theirs, by their names.

    Copied: what was read lies wherever the file had it, products want 64. Raises ShapeMismatch.
    """
    tensors, entries = {}, {}
    for entry, data in found:
        tensors[entry.name] = from_bytes(data, entry.dtype, entry.shape).clone()
        entries[entry.name] = entry
    for matrix, kinds in grouped((e.name, e.dtype, e.shape) for e in entries.values()).items():
        if is_coded(kinds) and not kinds.keys().isdisjoint(VALUES):
            encoding = encoding_of(matrix)
            shape_of(encoding, kinds, matrix)
            for name, limit in index_limits(entries[f"{matrix}.{k}"] for k in kinds).items():
                check_below(tensors[name].numpy().data, limit, name)
            parts = {k: tensors.pop(f"{matrix}.{k}") for k in kinds if k != "bias"}
            tensors[f"{matrix}.weight"] = dequantised(encoding, parts, dtype)
    return tensors


def align(core: Any) -> None:
    """Copy what the library left in its files' pages: at odd addresses products differ in the last
    bit, and a page of a file that was cut short ends the process."""
    for tensor in (*core.parameters(), *core.buffers()):
        if tensor.data_ptr() % _ALIGN:
            tensor.data = tensor.data.clone()
