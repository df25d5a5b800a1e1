"""How a model runs here: fast or plain steps, threads of products, and who else wants the cores.

CHRONOS_PLAIN is for whoever looks for the cause of a wrong token. Set, every step runs as its model
is written: no CUDA graphs, no recorded steps, no packed weights, no products but torch's own. A
token that is then another one points at one of these. CHRONOS_KERNEL=off leaves out the compiled
products alone. Read here and nowhere else, when a model is loaded. It knows nothing of what it
turns off.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from chronos.common.errors import UsageError

PLAIN, KERNEL = "CHRONOS_PLAIN", "CHRONOS_KERNEL"
_WORDS = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


def plain() -> bool:
    """Returns whether the environment asks for plain steps. Raises UsageError for other words."""
    word = os.environ.get(PLAIN, "")
    if word.lower() not in _WORDS:
        raise UsageError(f"{PLAIN} cannot be {word!r}", "the environment", f"set {PLAIN}=1 or 0")
    return _WORDS[word.lower()]


def kernels_on() -> bool:
    """Returns whether compiled products may be used. Raises UsageError for other words."""
    word = os.environ.get(KERNEL, "").lower()
    if word not in ("", "auto", "on", "off"):
        raise UsageError(f"{KERNEL} cannot be {word!r}", "the environment", f"set {KERNEL}=off")
    return word != "off" and not plain()


_THREADS_A_CORE = 16  # more gain nothing on any machine


def threads_for(asked: int | None) -> int | None:
    """Threads that products on a CPU take; None leaves as many as the framework takes by itself.

    asked: what the user said, who wins. The framework's number stays otherwise, since another one
    could round sums otherwise: beside other work its threads wait asleep for each other instead
    (`backends.startup`). `python -m bench.runs.neighbour` measures it. Raises UsageError.
    """
    most = _THREADS_A_CORE * (os.cpu_count() or 1)
    if asked is not None and not 1 <= asked <= most:
        # OpenMP ends the process where it cannot make that many.
        raise UsageError(f"{asked} threads", "--threads", f"give 1 to {most}")
    return asked


class Load(NamedTuple):
    """How many threads wanted a core, on the average of the last minute."""

    average: float
    cores: int

    @property
    def busy(self) -> bool:
        """Whether some had to wait for one."""
        return self.average > self.cores


def machine_load() -> Load | None:
    """The present load of the whole machine; None where the system does not say (Windows)."""
    try:
        return Load(os.getloadavg()[0], os.cpu_count() or 1)
    except (AttributeError, OSError):
        return None
