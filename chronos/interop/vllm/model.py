"""The model that vLLM runs: its Transformers backend, with routed experts streamed by Chronos.

Attention, paged cache, scheduler, sampling and HTTP are vLLM's. The experts modules of the model
are emptied before vLLM would fuse them, and their place in Transformers' experts interface is taken
by the torch backend's guest experts, which read them within a budget. A step of vLLM is a pass of
the feed: a layer acquires the union of what the step's tokens need, as many at a time as have
slots. Nothing is read ahead, since a step does not say whose tokens it has.

Options come by vLLM's --additional-config: {"budget": "25%", "predictor": "auto", "warm": "0"}.
Refused by name: more than one device, compiled steps, another dtype than the checkpoint's,
quantised checkpoints, native Chronos models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM

from chronos.backends.torch import open_arena
from chronos.backends.torch.guest.build import dense_tensors, empty_experts
from chronos.backends.torch.guest.experts import CALL, ExpertsCall
from chronos.backends.torch.guest.model import connect_experts
from chronos.backends.torch.model import DTYPES
from chronos.common.disk.tensors import read_checkpoint
from chronos.common.errors import ConfigError, UsageError
from chronos.common.experts.feed import FeedOptions, open_feed
from chronos.common.layout.codecs import dense_encoding
from chronos.common.model.config import load_config
from chronos.common.model.guest import GuestConfig
from chronos.run.opening import Plan, plan_for

_log = logging.getLogger("chronos")
_OPTIONS = {"budget": "25%", "predictor": "auto", "warm": "0"}


class ChronosGuest(TransformersForCausalLM):
    """A packed guest under vLLM. `feed` has its experts, and their counters."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self.plan = _plan(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        plan, layout = self.plan, self.plan.layout
        assert layout is not None
        options = FeedOptions(
            plan.config.num_experts_per_tok, plan.warm_bytes, vllm_config.device_config.device
        )
        self.feed = open_feed(open_arena, layout, plan.capacity_bytes, options, policy=plan.policy)
        if plan.preloads:
            self.feed.preload(sorted(layout.records))
        _log.info(
            "%s: %d of %d experts have room (%.1f MB)", plan.folder, self.feed.slots,
            len(layout.records), plan.capacity_bytes / 1e6,
        )  # fmt: skip

    def recursive_replace(self) -> None:
        """vLLM's own layers for all but the experts, which have no parameters by then: those that
        have are fused."""
        assert self.plan.layout is not None and isinstance(self.plan.config, GuestConfig)
        empty_experts(self.model)
        connect_experts(self.model, self.plan.config, self.plan.layout)
        super().recursive_replace()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The dense part, as our strict reader has it. weights: vLLM's own reading of the folder,
        of which nothing is taken."""
        folder, config = self.plan.folder, self.plan.config
        assert isinstance(config, GuestConfig)
        encoding_of = partial(dense_encoding, load_config(folder)[0], coding=config.coding)
        dense = dense_tensors(read_checkpoint(folder), encoding_of, DTYPES[config.dtype])
        loaded: set[str] = super().load_weights(dense.items())
        return loaded

    def forward(self, *args: Any, **options: Any) -> Any:
        """One step of vLLM's scheduler: tokens of all requests in it."""
        with self.feed.step() as step:
            before = CALL.set(ExpertsCall(step))
            try:
                return super().forward(*args, **options)
            finally:
                CALL.reset(before)


def _plan(vllm_config: VllmConfig) -> Plan:
    """What was asked for, checked before anything is allocated. Raises UsageError, ConfigError,
    CorruptFileError, BudgetError."""
    _check_parallel(vllm_config)
    asked = dict(vllm_config.additional_config or {})
    if unknown := sorted(asked.keys() - _OPTIONS.keys()):
        raise UsageError(
            f"no option {unknown[0]!r}", "--additional-config", f"there are {', '.join(_OPTIONS)}"
        )
    model = vllm_config.model_config
    plan = plan_for(
        Path(model.model),
        **(_OPTIONS | asked),
        miss="exact",
        prefetch="auto",
        allow_missing=False,
        context=None,
    )
    where = str(plan.folder)
    if not isinstance(plan.config, GuestConfig):
        raise ConfigError("a native Chronos model", where, "vLLM runs guests only: chronos serve")
    if plan.layout is None:
        raise UsageError("its experts are not packed", where, f"chronos pack {where} -o PACKED")
    if plan.config.quantization:
        raise ConfigError(
            f"the checkpoint is quantised ({plan.config.quantization})",
            where,
            "this plugin runs plain ones only: chronos unpack --dequantize, or chronos serve",
        )
    if model.dtype != DTYPES[plan.config.dtype]:
        wanted = str(DTYPES[plan.config.dtype]).removeprefix("torch.")
        raise UsageError(f"--dtype {model.dtype} of {wanted} experts", where, f"--dtype {wanted}")
    return plan


def _check_parallel(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for name in ("tensor", "pipeline", "data"):
        if (count := getattr(parallel, f"{name}_parallel_size")) > 1:
            raise UsageError(
                f"{count} devices", f"--{name}-parallel-size", "experts are streamed to one device"
            )
    if parallel.enable_expert_parallel:
        raise UsageError("expert parallelism", "--enable-expert-parallel", "leave it out")
    if not vllm_config.model_config.enforce_eager:
        raise UsageError(
            "compiled steps, which cannot wait for experts", "vLLM", "add --enforce-eager"
        )
