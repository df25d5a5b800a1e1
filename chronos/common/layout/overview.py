"""Looking at a model without reading it: what its headers say, and what a budget would hold.

Takes a model folder of any kind, packed or not, or a single safetensors or `.ctsr` file. Where one
is not packed, its records are laid out as `pack` would, so sizes are those of the packed model.
Not here: what this machine and its libraries can run (the command line asks them).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chronos.common.budget import held
from chronos.common.disk import foreign
from chronos.common.disk.header import read_header
from chronos.common.disk.io import FileIO, StrPath
from chronos.common.errors import UsageError
from chronos.common.layout.folder import is_packed, open_layout
from chronos.common.layout.source import ModelSource, open_source
from chronos.common.model.config import ModelConfig, load_config
from chronos.common.model.guest import GuestConfig

_SHARES = ("12.5%", "25.0%", "50.0%")


def inspect(path: StrPath, *, budgets: Iterable[str] = _SHARES) -> dict[str, Any]:
    """What a model folder or file holds, from its headers alone; sizes in bytes.

    budgets: what each would hold, under `budgets`, a list in their order of objects of `budget`,
    `bytes` (of whole experts), `experts`, `experts_per_layer`, `enough` and `least_bytes`. Raises
    what opening the model does.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_folder(path, budgets)
    if not path.exists():
        raise UsageError("there is no such file or folder", str(path), "check the spelling")
    foreign.refuse_other(path)
    header = read_header(path)
    tensors = [e for name, e in header.entries.items() if not name.startswith("pad.")]
    return {
        "kind": "cluster" if path.suffix == ".ctsr" else "tensors",
        "bytes": header.file_bytes,
        "tensors": len(tensors),
        "dtypes": sorted({entry.dtype for entry in tensors}),
        **{f"metadata.{key}": value for key, value in header.metadata.items()},
    }


def _inspect_folder(folder: Path, budgets: Iterable[str]) -> dict[str, Any]:
    source, packed = open_source(folder, FileIO()), is_packed(folder)
    data = {
        "kind": "packed" if packed else "unpacked",
        **_model(folder, source),
        "encoding": _encodings(source),
        "dense_bytes": source.dense_nbytes,
        "expert_bytes_total": source.expert_nbytes,
        "expert_bytes": max(template.nbytes for template in source.templates.values()),
        "expert_bytes_per_token": source.config.num_experts_per_tok
        * sum(template.nbytes for template in source.templates.values()),
    }
    if source.dense_memory_nbytes != source.dense_nbytes:
        data["dense_memory_bytes"] = source.dense_memory_nbytes
    if packed:
        layout = open_layout(folder)
        data["clusters"] = len(layout.files)
        data["order"] = layout.manifest.order.get("method", "unknown")
        data["fingerprint"] = layout.fingerprint
    if source.left_out:
        data["left_out_tensors"] = len(source.left_out)
    return data | {"budgets": [_held(source, budget) for budget in budgets]}


def _encodings(source: ModelSource) -> str:
    """How experts are coded, with their layers where these differ."""
    layers: dict[str, list[int]] = {}
    for layer, name in source.encodings.items():
        layers.setdefault(name, []).append(layer)
    if len(layers) == 1:
        return next(iter(layers))
    return ", ".join(f"{name} (layers {_ranges(at)})" for name, at in layers.items())


def _ranges(numbers: list[int]) -> str:
    """ "0-2 7": runs of numbers in order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)


def _model(folder: Path, source: ModelSource) -> dict[str, Any]:
    """The model's own numbers."""
    config = source.config
    raw, _ = load_config(folder)
    named = raw.get("architectures")
    first = str(named[0])[:80] if isinstance(named, list) and named else "unknown"
    data: dict[str, Any] = {
        "model_type": "chronos" if isinstance(config, ModelConfig) else config.model_type,
        "architecture": first,
        "dialect": source.dialect,
        "layers": config.num_hidden_layers,
        "layers_with_experts": len(source.templates),
        "experts_per_layer": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "shared_experts": config.num_shared_experts,
        "dtype": config.dtype,
    }
    if isinstance(config, GuestConfig):
        return data | ({"quantization": config.quantization} if config.quantization else {})
    return data | {
        "hidden_size": config.hidden_size,
        "expert_hidden_size": config.moe_intermediate_size,
    }


def _held(source: ModelSource, budget: str) -> dict[str, Any]:
    """Whole slots, each as large as the largest record."""
    return held(
        budget,
        record_bytes=max(template.nbytes for template in source.templates.values()),
        total_bytes=source.expert_nbytes,
        layers=len(source.templates),
        experts=source.config.num_experts,
        least=source.config.least_slots,
    )
