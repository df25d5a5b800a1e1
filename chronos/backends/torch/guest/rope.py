"""Rotary embeddings that look at how long a sequence is, told the length of the whole prompt.

LongRoPE has one table of frequencies up to a length and another beyond it, for all positions;
dynamic NTK has a base that grows with the length. Transformers takes the length from the positions
of a call, so a piece of a prompt would be rotated otherwise than in one pass. It also keeps the
largest length in the module, where the next sequence would meet it. Not known here: caches, and
what a model does whose keys were rotated by another table.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# A sequence's length with its whole prompt, and its tokens after the pass under way: sequences take
# turns inside the library's code.
_LENGTHS: ContextVar[tuple[int, int]] = ContextVar("_LENGTHS", default=(0, 0))


class LengthRope:
    """The rotary embeddings of a model that look at the length; false where it has none."""

    def __init__(self, core: nn.Module) -> None:
        self._modules: list[Any] = [m for m in core.modules() if _is_dynamic(m) or _borders(m)]
        for module in self._modules:
            module.forward = partial(self._forward, module)

    def __bool__(self) -> bool:
        return bool(self._modules)

    def enter(self, length: int, seen: int) -> None:
        """length: of the sequence with its whole prompt. seen: its tokens after the next call."""
        _LENGTHS.set((length, seen))

    def table(self, length: int) -> list[int]:
        """Equal for two lengths that have the same frequencies."""
        starts = [int(m.original_max_seq_len) for m in self._modules if _is_dynamic(m)]
        borders = [border for m in self._modules for border in _borders(m)]
        return [max(length, start) for start in starts] + [length > border for border in borders]

    def _forward(self, module: Any, x: Tensor, position_ids: Tensor, *args: Any, **kw: Any) -> Any:
        """The library's own forward, with the prompt's last position behind those of the piece."""
        if _is_dynamic(module):
            _forget(module)
        forward = type(module).forward
        length, seen = _LENGTHS.get()
        if length <= seen:
            return forward(module, x, position_ids, *args, **kw)
        last = torch.full_like(position_ids[..., :1], length - 1)
        out = forward(module, x, torch.cat([position_ids, last], -1), *args, **kw)
        if isinstance(out, tuple):
            return tuple(table[..., :-1, :] for table in out)
        return out[..., :-1, :]


def _is_dynamic(module: Any) -> bool:
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and "dynamic" in kind for kind in kinds)


def _borders(module: Any) -> list[int]:
    """The lengths up to which LongRoPE has its short factors, one a kind of layer."""
    settings = getattr(getattr(module, "config", None), "rope_parameters", None)
    if not hasattr(module, "rope_type") or not isinstance(settings, dict):
        return []
    found = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    return [
        kind["original_max_position_embeddings"]
        for kind in found
        if kind.get("rope_type") == "longrope"
    ]


def _forget(module: Any) -> None:
    """Back to the state of a new model: the frequencies then follow from the length alone."""
    for name in {**vars(module), **module._buffers}:
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            setattr(module, f"{prefix}inv_freq", getattr(module, name))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
