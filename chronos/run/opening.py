"""What is decided and checked before a model is loaded, without a framework: its folder, where its
experts are to lie, within how many bytes, and what ranks them.

`plan_for` reads headers and JSON only, and refuses what cannot work before anything is allocated.
Not covered: loading itself (`engine.load`), and what only a backend can refuse.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronos.common.budget import parse_budget
from chronos.common.disk.io import FileIO
from chronos.common.errors import UsageError
from chronos.common.experts.feed import room_for
from chronos.common.experts.foresight.choose import check_predictor, choose_policy
from chronos.common.experts.known import known_ahead
from chronos.common.experts.residency import Policy
from chronos.common.layout import Layout, is_packed, open_layout
from chronos.common.layout.folder import refuse_unfinished, slots_within
from chronos.common.layout.source import open_source
from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import Geometry, GuestConfig, end_ids, read_config
from chronos.common.model.weights import dense_tensors
from chronos.common.text.generation_config import ReplyDefaults, read_defaults
from chronos.common.text.tokenizer import Tokenizer
from chronos.run.models import resolve_model

_log = logging.getLogger("chronos")
RESIDENT = "resident"  # as a budget: the model holds its own experts, there is no feed
_WARM = "a warm tier"


@dataclass(frozen=True)
class Plan:
    """How a folder's model is to be run.

    layout: its packed experts, None where the model holds its own. capacity_bytes, warm_bytes: what
    they may take, and in host memory behind a device. policy: what ranks them, None where all have
    room. ahead: whether experts are read before they are needed.
    """

    folder: Path
    config: ModelConfig | GuestConfig
    layout: Layout | None = None
    capacity_bytes: int = 0
    warm_bytes: int = 0
    policy: Policy | None = None
    ahead: bool = True

    @property
    def forecasts(self) -> bool:
        """Whether what is read ahead is chosen. Where every expert has room, forecasts have no
        use."""
        return self.ahead and self.policy is not None

    @property
    def preloads(self) -> bool:
        """Whether all experts are read at once, as all have room."""
        return self.ahead and self.layout is not None and self.policy is None


def plan_for(
    model: str | Path,
    *,
    budget: str | int,
    warm: str | int,
    miss: str,
    prefetch: str,
    predictor: str | Path,
    allow_missing: bool,
    context: int | None,
) -> Plan:
    """The options of `engine.load`, checked against each other and against the folder.

    Raises UsageError, ConfigError, CorruptFileError and BudgetError (naming the minimum).
    """
    check_choice("miss", miss, ("exact", "fallback"))
    check_choice("prefetch", prefetch, ("auto", "off"))
    check_predictor(predictor)
    if allow_missing and miss != "fallback":
        raise UsageError(
            "missing experts are allowed only where others can stand in",
            "--allow-missing",
            "add --miss fallback (miss='fallback')",
        )
    folder = resolve_model(model)
    config = read_config(folder)
    _check_context(context, config)
    if miss == "fallback" and config.num_shared_experts == 0:
        raise UsageError("miss=fallback needs shared experts, and this model has none", str(folder))
    layout = _open_layout(folder, config, budget, allow_missing)
    if layout is None:
        if str(warm) != "0":
            parse_budget(warm, 1, _WARM)  # refused if it makes no sense
            _log.warning("a warm tier of %s is not used: no experts are streamed", warm)
        return Plan(folder, config)
    top_k, capacity = config.num_experts_per_tok, parse_budget(budget, layout.total_bytes)
    policy: Policy | None = known_ahead(config, predictor)
    room_for(layout, capacity, top_k, policy)
    warm_bytes = _warm_bytes(warm, layout, top_k)
    if capacity >= layout.total_bytes:
        policy = None
    elif policy is None:
        policy = choose_policy(predictor, layout, top_k)
    return Plan(folder, config, layout, capacity, warm_bytes, policy, prefetch == "auto")


def replies_of(folder: Path, config: ModelConfig | GuestConfig) -> dict[str, Any]:
    """What the folder says of replies: tokenizer, ids that end one, a guest's own wishes."""
    known: dict[str, Any] = {}
    if (folder / "tokenizer.json").exists():
        known["tokenizer"] = Tokenizer.load(folder, config.vocab_size)
    if isinstance(config, GuestConfig):
        known |= {"stop_ids": end_ids(folder), "defaults": _defaults(folder)}
    return known


def _defaults(folder: Path) -> ReplyDefaults:
    """The model's own penalties and rules; says once which others have no effect."""
    defaults = read_defaults(folder)
    if defaults.ignored:
        names = ", ".join(defaults.ignored)
        _log.warning("generation_config.json: %s has no effect here", names)
    return defaults


def dense_names(folder: Path, config: ModelConfig | GuestConfig) -> list[str] | None:
    """Tensors to read while the framework is imported, None for all. A guest that is not packed is
    read by its own library."""
    if isinstance(config, ModelConfig):
        return [spec.name for spec in dense_tensors(config)]
    return None if is_packed(folder) else []


def experts_of(folder: Path, config: ModelConfig | GuestConfig) -> dict[str, Any]:
    """What a layout would say: bytes of all routed experts, and the layers that have some."""
    if isinstance(config, ModelConfig) and not is_packed(folder):
        nbytes = config.num_routed_experts * config.expert_parameters * config.dtype_bytes
        return {"expert_bytes": nbytes}
    source = open_source(folder, FileIO())
    return {"expert_bytes": source.expert_nbytes, "moe_layers": tuple(source.templates)}


def _open_layout(
    folder: Path, config: ModelConfig | GuestConfig, budget: str | int, allow_missing: bool
) -> Layout | None:
    """The packed experts, or None where the model is to hold them itself."""
    refuse_unfinished(folder)
    if str(budget).strip().lower() == RESIDENT:
        return None
    if is_packed(folder):
        return open_layout(folder, config=config, allow_missing=allow_missing)
    if str(budget).strip().lower() == "all":
        return None
    raise UsageError(
        f"a budget of {budget} needs a packed model folder",
        str(folder),
        f"pack it: chronos pack {folder} -o {folder}-packed",
    )


def _warm_bytes(warm: str | int, layout: Layout, top_k: int) -> int:
    """Bytes of the warm tier, 0 for none; refused here if they could not work."""
    nbytes = 0 if str(warm) == "0" else parse_budget(warm, layout.total_bytes, _WARM)
    if nbytes:
        slots_within(layout, nbytes, top_k, _WARM)
    return nbytes


def _check_context(context: int | None, config: Geometry) -> None:
    if context is None:
        return
    if context < 1:
        raise UsageError(f"a context of {context} tokens", "", "give at least 1")
    if context > config.max_position_embeddings:
        _log.warning(
            "a context of %d tokens is more than the %d this model was made for: what it writes"
            " beyond may make no sense",
            context,
            config.max_position_embeddings,
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} cannot be {value!r}", f"--{name}", f"use {' or '.join(choices)}")
