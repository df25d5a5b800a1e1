"""The learning rate as a function of the step: linear warm-up, then cosine decay to a floor."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    """Rate of update `step` (from 0) out of `total`.

    Rises to `peak` at step `warmup`, reaches `floor` at the last step and stays there. The first
    step already learns, at peak / (warmup + 1).
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    last = max(total - 1, warmup + 1)
    progress = min((step - warmup) / (last - warmup), 1.0)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def mask_seed(seed: int, step: int, part: int) -> int:
    """What dropout and masks of one micro-batch follow from, below 2^63: on a whole update and on
    a share of it alike. The first micro-batch has seed and step alone, as runs of before had."""
    return (seed * 1_000_003 + step + part * 0x9E3779B97F4A7C15) % (1 << 63)
