"""Training: `from chronos import train; train.pretrain("recipe.toml", "runs/one")`.

A file a stage, over one loop. The functions are what the command line calls; no framework is
imported before one of them runs.
"""

from __future__ import annotations

from chronos.train.loop import DivergedError, Report
from chronos.train.pretrain import pretrain

__all__ = ["DivergedError", "Report", "pretrain"]
