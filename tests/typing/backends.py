"""Read by mypy, never run: each backend module satisfies the protocol it is loaded as."""

from __future__ import annotations

from chronos.backends import mlx, torch
from chronos.backends.protocol import Backend

TORCH: Backend = torch
MLX: Backend = mlx
