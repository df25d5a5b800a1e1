"""The processes that share an update, started by `mlx.launch`: mx.distributed's collectives.

Each has the whole model and some of the micro-batches. Gradients are summed as they are, since
losses are divided by counts of the whole update.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx


class Processes:
    """This one among them; alone where no launcher started it."""

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        if "MLX_RANK" in os.environ:
            group = mx.distributed.init(strict=True)
            self.rank, self.count = group.rank(), group.size()

    def total(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Sums over all processes, in one message."""
        if self.count == 1:
            return list(arrays)
        flat_N = mx.distributed.all_sum(mx.concatenate([array.flatten() for array in arrays]))
        ends = list(accumulate(array.size for array in arrays))
        parts = mx.split(flat_N, ends[:-1])
        return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it is true for one of them."""
        return bool(self.total([mx.array([float(flag)])])[0].item())
