"""The processes that share an update, started by `torchrun`: torch.distributed's collectives.

Each has the whole model and some of the micro-batches. Gradients are summed as they are, since
losses are divided by counts of the whole update. DistributedDataParallel averages instead, and
wants every weight used in every pass, which experts are not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """This one among them; alone where no launcher started it."""

    def __init__(self) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
        if launched and not dist.is_initialized():
            gpus = torch.cuda.is_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)

    def total(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """Sums over all processes, in one message."""
        if self.count == 1:
            return list(arrays)
        flat_N = torch.cat([array.flatten() for array in arrays])
        dist.all_reduce(flat_N)
        parts = flat_N.split([array.numel() for array in arrays])
        return [part.view_as(array) for part, array in zip(parts, arrays, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it is true for one of them."""
        return bool(self.total([torch.tensor([float(flag)])])[0])
