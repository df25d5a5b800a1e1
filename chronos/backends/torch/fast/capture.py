"""Noting what a forward pass calls of torch, and under which names its tensors reach each call.

A recording is a list of calls in which tensors that the pass made are replaced by their slots; all
else is as it was given. What `opaque` runs counts as one call. Values of tensors are never looked
at: a pass that looks at them, or writes into what outlives it, cannot be a program.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What may be asked of a tensor without looking at its values.
_METADATA = frozenset(
    "__get__ __len__ size dim ndimension numel nelement stride storage_offset is_contiguous"
    " element_size is_floating_point is_complex is_tensor get_device data_ptr"
    " _set_grad_enabled".split()  # nothing is differentiated here
)
# What gives its first argument back where there is nothing to do; all else has written into it.
_CONVERSIONS = frozenset(
    "to type type_as float half bfloat16 double long int bool contiguous flatten expand reshape"
    " squeeze cpu cuda dropout".split()
)
_here = threading.local()  # a model may run in each of several threads


class Refused(Exception):
    """A step that cannot be replayed."""


@dataclass(frozen=True)
class Ref:
    """An argument that an earlier call gave."""

    slot: int


@dataclass
class RecordedCall:
    """A function, its arguments with `Ref`s in them, and the slots of what it gives."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slots: range
    many: bool
    in_place: bool
    # Of an opaque call, when it was recorded: its arguments and what it gave. None: of torch.
    given: Any

    @property
    def must_run(self) -> bool:
        return self.in_place or self.given is not None


class CallRecorder(TorchFunctionMode):
    """Notes the calls of torch's functions, and of `opaque` ones, while it is entered."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []
        self.reason = ""  # why there can be no program
        self._slots = {id(ids): 0}
        self._next = 1
        self._alive: list[Any] = []  # an id means its tensor for as long as that lives

    def __enter__(self) -> CallRecorder:
        _here.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _here.recorder = None
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._try_note(func, args, kwargs or {}, out, None)
        return out

    def opaque(self, function: Any, args: tuple[Any, ...]) -> Any:
        with torch._C.DisableTorchFunction():
            seen = () if self.reason else self._copied(args)
            out = function(*args)
            kept = out.clone() if isinstance(out, Tensor) else out  # others may add to the output
            self._try_note(function, args, {}, out, (seen, kept))
        return out

    def finish(self, logits: Tensor) -> Ref:
        """What the logits are called. Raises Refused."""
        self._alive.clear()
        found = self._named(logits)
        if self.reason or not isinstance(found, Ref):
            raise Refused(self.reason or "the logits come from elsewhere")
        return found

    def _try_note(self, function: Any, *rest: Any) -> None:
        """No recording is worth an error: some tensors have no memory of their own to look at."""
        if self.reason:
            return
        try:
            self._note(function, *rest)
        except Exception as error:
            self.reason = f"{getattr(function, '__name__', function)}: {error!r}"

    def _note(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, given: Any
    ) -> None:
        name, many = getattr(function, "__name__", ""), isinstance(out, tuple | list)
        tensors = list(out) if many else [out]
        if not any(isinstance(t, Tensor) for t in tensors):
            if name not in _METADATA:
                self.reason = f"{name} gives no tensor"
            return
        same = bool(args) and out is args[0]
        if same and given is None and name in _CONVERSIONS:
            return
        in_place = given is None and (same or _writes(name))
        self._alive.append((args, kwargs, out))
        call_args, call_kwargs = self._named(args), self._named(kwargs)
        outside = in_place and not (call_args and isinstance(call_args[0], Ref))
        if outside or "out" in kwargs or (kwargs.get("inplace") and not same):
            self.reason = f"{name} writes into what outlives the step"
        if in_place and _shown(self._alive, out):
            self.reason = f"{name} writes into what has two names"
        slots = range(self._next, self._next + len(tensors))
        self._next = slots.stop
        self._slots |= {id(t): s for t, s in zip(tensors, slots, strict=True)}
        self.calls.append(
            RecordedCall(function, call_args, call_kwargs, slots, many, in_place, given)
        )

    def _copied(self, value: Any) -> Any:
        """Arguments of an opaque call; a tensor that the step did not make is itself or nothing."""
        if isinstance(value, Tensor):
            return value.clone() if id(value) in self._slots else None
        return mapped(self._copied, value)

    def _named(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            slot = self._slots.get(id(value))
            return value if slot is None else Ref(slot)
        return mapped(self._named, value)


def opaque(function: Callable[..., Any], *args: Any) -> Any:
    """Call what a program calls whole, whatever it does inside."""
    recorder: CallRecorder | None = getattr(_here, "recorder", None)
    if recorder is None:
        return function(*args)
    return recorder.opaque(function, args)


def _writes(name: str) -> bool:
    """Whether a function of torch changes its first argument, by its name."""
    name = name.partition(".")[0]  # of an overload
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__invert__", "__index__", "__int__")
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def storage(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for one whose memory only oneDNN knows."""
    return 0 if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


def _shown(alive: list[Any], written: Tensor) -> bool:
    """Whether another tensor shows bytes of the one that was written into."""
    place = storage(written)
    return any(t is not written and storage(t) == place for t in _tensors(alive))


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A copy of nested arguments with every leaf changed; a leaf that `change` gives back stays."""
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(change(value.start), change(value.stop), change(value.step))
    if isinstance(value, list):
        return [change(item) for item in value]
    if isinstance(value, tuple):  # torch.Size too
        return tuple(change(item) for item in value)
    return value


def flat(value: Any) -> Iterator[Any]:
    """The leaves of nested arguments."""
    if isinstance(value, dict):
        value = tuple(value.values())
    elif isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, tuple | list):
        for item in value:
            yield from flat(item)
    else:
        yield value


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in flat(value) if isinstance(leaf, Tensor))
