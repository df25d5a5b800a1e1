"""`--report-to`: the lines of metrics.jsonl to TensorBoard, Trackio or Weights & Biases too.

Their packages are imported when a run begins that names one, and by nothing else. What they are
told are the numbers of the log, at its steps; a value that is not finite is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chronos.common.errors import MissingBackendError, UsageError

_PROJECT = "chronos"


class Reporter(NamedTuple):
    """log: takes a line of the log, which has a `step`. close: sends what is left."""

    log: Callable[[Mapping[str, Any]], None]
    close: Callable[[], None]


def check(name: str) -> None:
    """Raises UsageError for a name that is not known, MissingBackendError without its package."""
    if name not in _OPEN:
        raise UsageError(
            f"nothing to report to is called {name!r}", "--report-to", f"use {', '.join(_OPEN)}"
        )
    package = _OPEN[name][0]
    if importlib.util.find_spec(package) is None:
        raise MissingBackendError(
            f"reporting to {name} needs {package}",
            "--report-to",
            f"pip install {package}, or all of them: pip install 'chronos-moe[report]'",
        )


def open_reporter(name: str, out: Path, recipe: Mapping[str, Any], first: int) -> Reporter:
    """Begin or go on with the run called like its folder. first: updates done by then, after which
    what was reported is reported anew."""
    check(name)
    package, make = _OPEN[name]
    return make(importlib.import_module(package), out.absolute(), recipe, first)


def _tensorboard(package: Any, out: Path, recipe: Mapping[str, Any], first: int) -> Reporter:
    """In the folder `tensorboard` of the run: `tensorboard --logdir runs`."""
    # A file is called by the second: one that goes on at once must not take its name.
    writer = package.SummaryWriter(
        str(out / "tensorboard"), purge_step=first + 1, filename_suffix=f".{first}"
    )

    def log(event: Mapping[str, Any]) -> None:
        for name, value in _numbers(event).items():
            writer.add_scalar(name, value, event["step"])

    return Reporter(log, writer.close)


def _wandb(package: Any, out: Path, recipe: Mapping[str, Any], first: int) -> Reporter:
    known = out / "wandb" / "id"  # what the run is called there: a name is not its own
    if not (first and known.exists()):
        known.parent.mkdir(exist_ok=True)
        known.write_text(secrets.token_hex(4), "utf-8")
    run = package.init(
        project=_PROJECT,
        name=out.name,
        id=known.read_text("utf-8"),
        dir=str(out),
        config=recipe,
        resume="allow" if first else None,
    )
    return Reporter(lambda event: run.log(_numbers(event), step=event["step"]), run.finish)


def _trackio(package: Any, out: Path, recipe: Mapping[str, Any], first: int) -> Reporter:
    resume = "allow" if first else "never"
    run = package.init(project=_PROJECT, name=out.name, config=recipe, resume=resume)
    return Reporter(lambda event: run.log(_numbers(event), step=event["step"]), run.finish)


def _numbers(event: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in event.items() if k != "step" and isinstance(v, int | float)}


_OPEN: dict[str, tuple[str, Callable[..., Reporter]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "trackio": ("trackio", _trackio),
    "wandb": ("wandb", _wandb),
}
