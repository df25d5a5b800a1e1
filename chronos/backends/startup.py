"""Starting fast: less work in a framework's import, and reads that go on meanwhile.

`import torch` is two seconds of Python on one core. Measured on two cores (CPU seconds, best of
four): 1.95 as it is, 1.70 without garbage collection, 1.18 with the Python kernels for meta tensors
deferred too. Those serve compilers and shape propagation; a process that only generates needs none.
Nothing here changes a number that a model computes.
"""

from __future__ import annotations

import gc
import importlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import ModuleType
from typing import Any, Generic, TypeVar

from chronos.common.tuning import machine_load

T = TypeVar("T")
# Imported for their side effect at the end of `import torch`; 0.5 s of its 2 s.
_DEFERRED = {"torch": ("torch._meta_registrations",)}
# What they would have imported and is needed: without it there is no torch.Generator. 0.1 s.
_NEEDED = {"torch": ("torch._prims.rng_prims",)}


# Any of these says how threads of products wait. OMP_WAIT_POLICY is OpenMP's own, the others are of
# GNU's and LLVM's libraries for it.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@cache
def wait_asleep() -> None:
    """Have the threads of a product sleep while they wait for each other, in this process, where
    other work runs on this machine now; unless the environment says how they wait.

    By default they spin, which takes the core from the thread that is waited for: on two cores with
    a load of six `demo` then made 3 to 9 tokens a second, and 260 to 300 asleep. Alone on a machine
    spinning is faster, 406 to 233 (`python -m bench.runs.neighbour`). No number changes by it.
    Without effect where the framework is imported already.
    """
    if not any(name in os.environ for name in _WAITING) and neighbours():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def waiting() -> str:
    """How threads of a product wait for each other in this process, in words."""
    said = {name: os.environ[name] for name in _WAITING if name in os.environ}
    if not said:
        return "asleep beside other work, else spinning"
    if said == {"OMP_WAIT_POLICY": "passive"}:
        return "asleep"
    return "as " + ", ".join(f"{name}={value}" for name, value in said.items()) + " says"


def neighbours(looks: int = 5) -> bool:
    """Whether other work is running: what Linux has running beside this thread in most of some
    looks, 4 ms apart; elsewhere the load of the last minute, from half of the cores on."""
    found = []
    for _ in range(looks):
        try:
            with open("/proc/stat", encoding="ascii") as file:
                words = file.read().split()
            found.append(int(words[words.index("procs_running") + 1]))
        except (OSError, ValueError):
            load = machine_load()
            return load is not None and load.average > load.cores / 2
        time.sleep(0.004)
    return sorted(found)[looks // 2] > 1


class _Deferred(ModuleType):
    """Stands for a module until one of its names is asked for; then it is imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def fast_import(backend: str, *, own_process: bool) -> Iterator[None]:
    """Import a backend's framework in the body, with less work.

    `own_process` leaves out what only compilers need, which other code here would miss.
    """
    collecting, first = gc.isenabled(), backend not in sys.modules
    gc.disable()  # hundreds of thousands of new objects, none of them garbage
    if own_process and first:
        for name in _DEFERRED.get(backend, ()):
            sys.modules[name] = _Deferred(name)
    try:
        yield
        if own_process and first:
            for name in _NEEDED.get(backend, ()):
                with suppress(ImportError):  # other versions need it not
                    importlib.import_module(name)
    finally:
        if own_process and first:
            # Modules live as long as the process: no later collection walks them. Not again: what a
            # second model's import would freeze is the first model, whose memory never came back.
            gc.freeze()
        if collecting:
            gc.enable()


class ReadAhead(Generic[T]):
    """An iterator run on a thread from now on; iterate over this for what it yields, or raises.

    Holds all that was not taken yet. Closing it, or leaving it as a context, stops the thread.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._ready: queue.SimpleQueue[tuple[T, ...] | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if self._stop.is_set():
                    break
                self._ready.put((item,))
            if hasattr(self._items, "close"):  # a generator left half-way ends its reads here
                self._items.close()
        except BaseException as error:
            self._ready.put(error)
        self._ready.put(())

    def __iter__(self) -> Iterator[T]:
        while found := self._ready.get():
            if isinstance(found, BaseException):
                raise found
            yield found[0]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> ReadAhead[T]:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
