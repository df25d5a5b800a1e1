"""One token's step of a guest: recorded as the library runs it, replayed without its Python.

Around the products of a token the library spends as long again on module calls, decorators and
masks. So three tokens run under a recorder of torch's functions. Where the recordings agree in all
but the numbers that count with the position, what they called is a program: the same functions on
the same arguments, hence the same bits, less what nothing uses and what never changes. Experts and
caches are calls of the program that run as ever. A step that looks at a tensor's values, takes one
of unknown origin or disagrees with itself stays the library's. A program ends where the position,
or a number that counts with it, comes to an integer of the config: a window, a length. Every 64th
token is the library's again and must have called what the program calls.
Not covered: prompts, batches.
"""

from __future__ import annotations

import logging
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from chronos.backends.torch.fast.capture import (
    CallRecorder,
    RecordedCall,
    Ref,
    Refused,
    flat,
    mapped,
    storage,
)

_RECORDINGS = 3
_CHECK_EVERY = 64  # replayed tokens
# A constant of more bytes is computed at every token, as the library does: weights widened by each
# router, times the programs, would outgrow the experts' budget.
_LARGE = 1 << 16
_log = logging.getLogger("chronos")


@dataclass(frozen=True)
class Counted:
    """A number that grows with the position."""

    offset: int


class Program:
    """The calls that three recordings share, in order, each with a way to its arguments."""

    def __init__(self, recordings: Sequence[tuple[list[RecordedCall], Ref]], position: int) -> None:
        """position: that of the last recording. Raises Refused."""
        self._values: list[Any] = [None]  # 0: the ids
        self._place: dict[int, int] = {0: 0}  # slots of the recordings to places in `_values`
        self._constants: dict[int, Any] = {}  # slots that are the same at every token
        self._counted: dict[int, int] = {}
        self._steps: list[tuple[Callable[..., Any], Any, int, int]] = []
        self._given: dict[int, tuple[list[tuple[Any, Tensor]], Any]] = {}
        calls = _common([calls for calls, _ in recordings], position)
        # Watched steps are compared with these.
        self._template = [replace(c, given=None if c.given is None else True) for c in calls]
        logits = recordings[-1][1]
        written = {call.args[0].slot for call in calls if call.in_place}
        for call in _kept(calls, logits):
            self._add(call, written)
        self._logits = self._place[logits.slot]
        self._offsets = set(self._counted.values())
        self._recorded_at = position

    def run(self, ids: Tensor, position: int, given: bool = False) -> Tensor:
        """The logits. given: with what opaque calls gave when they were recorded."""
        values = self._values.copy()
        values[0] = ids
        for place, offset in self._counted.items():
            values[place] = position + offset
        for i, (call, take, place, end) in enumerate(self._steps):
            if given and i in self._given:
                seen, out = self._given[i]
                self._compare(seen, values)
            else:
                out = call(*take(values))
            if end:
                values[place:end] = out
            else:
                values[place] = out
        logits: Tensor = values[self._logits]
        return logits

    def agrees(self, calls: list[RecordedCall], position: int) -> bool:
        """Whether a later step that was watched is what this program runs."""
        try:
            _common([[_at_position(call, position) for call in self._template], calls], None)
        except Refused:
            return False
        return True

    def covers(self, position: int, edges: list[int]) -> bool:
        """Whether no number that counts is past an edge that it was before: it may start anew there
        and at every multiple."""
        then = self._recorded_at
        return all(
            bisect(edges, position + offset) == bisect(edges, then + offset)
            for offset in self._offsets
        )

    def forget(self) -> None:
        """Free what was kept to check the program."""
        self._given.clear()

    def _compare(self, seen: list[tuple[Any, Tensor]], values: list[Any]) -> None:
        """Whether an opaque call would get what it got. Raises Refused."""
        for leaf, expected in seen:
            found = values[self._at(leaf)] if isinstance(leaf, Ref) else leaf
            if not torch.equal(found, expected):
                raise Refused("the replay gives an opaque call something else")

    def _add(self, call: RecordedCall, written: set[int]) -> None:
        args, kwargs = self._resolved(call.args), self._resolved(call.kwargs)
        leaves = list(_leaves((args, kwargs)))
        if not leaves and not call.must_run and not written & set(call.slots):
            out = call.function(*args, **kwargs)
            outs = out if call.many else [out]
            if _small(outs, flat((args, kwargs))):
                self._constants |= dict(zip(call.slots, outs, strict=True))
                return
        place = len(self._values)
        self._place |= {slot: place + i for i, slot in enumerate(call.slots)}
        self._values += [None] * len(call.slots)
        if call.given is not None:
            seen, out = call.given
            pairs = zip(flat(args), flat(seen), strict=True)
            checks = [(leaf, copy) for leaf, copy in pairs if isinstance(copy, Tensor)]
            self._given[len(self._steps)] = checks, out
        function, wanted = self._applied(call.function, args, kwargs)
        end = place + len(call.slots) if call.many else 0
        self._steps.append((function, _taker(wanted), place, end))

    def _resolved(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self._constants.get(value.slot, value)
        return mapped(self._resolved, value)

    def _applied(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Any], list[int]]:
        """A function of values alone, and the places of those."""
        plain = not list(_leaves(kwargs))
        if plain and all(isinstance(a, Ref | Counted) or not list(_leaves(a)) for a in args):
            bound = partial(function, **kwargs) if kwargs else function
            return bound, [self._at(a) for a in args]
        first, rest = args[0] if args else None, args[1:]
        if plain and isinstance(first, tuple | list) and not list(_leaves(rest)):
            bound = partial(_of_list, partial(function, **kwargs), rest)
            return bound, [self._at(a) for a in first]
        wanted = [self._at(leaf) for leaf in _leaves((args, kwargs))]
        return partial(_of_template, function, args, kwargs), wanted

    def _at(self, leaf: Any) -> int:
        if isinstance(leaf, Ref):
            return self._place[leaf.slot]
        place = len(self._values)
        if isinstance(leaf, Counted):
            self._counted[place] = leaf.offset
        self._values.append(leaf)
        return place


class Steps:
    """Single tokens behind a cache: the library's, watched at first, then the programs'."""

    def __init__(self, edges: Iterable[int]) -> None:
        """edges: positions at which the library may do something else."""
        self._edges = sorted({e + d for e in edges for d in (-1, 0, 1)})
        self._programs: dict[int, Program | None] = {}  # by the gap between two edges
        self._recordings: list[tuple[list[RecordedCall], Ref]] = []
        self._next = -1
        self.replayed = 0

    def run(self, ids: Tensor, position: int, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """The logits of one token at `position`."""
        gap = bisect(self._edges, position)
        program = self._programs.get(gap)
        if program is not None and not program.covers(position, self._edges):
            del self._programs[gap]
        if gap in self._programs:
            if program is None:
                return forward(ids)
            self.replayed += 1
            if self.replayed % _CHECK_EVERY:
                return program.run(ids, position)
            recorder = CallRecorder(ids)
            with recorder:
                logits = forward(ids)
            if recorder.reason or not program.agrees(recorder.calls, position):
                _log.warning("the step at %d is no longer what was recorded", position)
                self._programs[gap] = None
            return logits
        if position != self._next or gap != bisect(self._edges, position - 1):
            self._recordings.clear()
        self._next = position + 1
        recorder, chance = CallRecorder(ids), torch.get_rng_state()
        with recorder:
            logits = forward(ids)
        try:
            self._recordings.append((recorder.calls, recorder.finish(logits)))
            if not torch.equal(chance, torch.get_rng_state()):
                raise Refused("the step draws numbers")
            if len(self._recordings) < _RECORDINGS:
                _lighten(recorder.calls)
            else:
                program = Program(self._recordings, position)
                if not torch.equal(program.run(ids, position, given=True), logits):
                    raise Refused("the replay gives other logits")
                program.forget()
                if program.covers(position - _RECORDINGS + 1, self._edges):
                    self._programs[gap] = program
                else:
                    del self._recordings[0]
                    _lighten(recorder.calls)
        except Exception as refused:  # Refused, or what no step has met so far: the logits are here
            _log.debug("tokens from %d on are the library's: %s", position, refused)
            self._programs[gap] = None
        if gap in self._programs:
            self._recordings.clear()
        return logits


def _lighten(calls: list[RecordedCall]) -> None:
    """Not a cache per recording."""
    for call in calls:
        call.given = None if call.given is None else True


def _small(outs: Iterable[Any], args: Iterable[Any]) -> bool:
    """Whether to keep what a call gave: views of what is there anyway, and little else."""
    there = {storage(a) for a in args if isinstance(a, Tensor)}
    tensors = [out for out in outs if isinstance(out, Tensor)]
    return all(t.nbytes <= _LARGE or storage(t) in there for t in tensors)


def _leaves(value: Any) -> list[Ref | Counted]:
    return [leaf for leaf in flat(value) if isinstance(leaf, Ref | Counted)]


def _at_position(call: RecordedCall, position: int) -> RecordedCall:
    """A call of a template with its numbers as they are at a position."""

    def fill(value: Any) -> Any:
        return position + value.offset if isinstance(value, Counted) else mapped(fill, value)

    return replace(call, args=fill(call.args), kwargs=fill(call.kwargs))


def _common(recordings: Sequence[list[RecordedCall]], position: int | None) -> list[RecordedCall]:
    """The calls of the last recording, with the numbers that count told apart from constants.
    Without a position none may count."""
    if len({len(calls) for calls in recordings}) > 1:
        raise Refused("the steps have different lengths")
    common = []
    for calls in zip(*recordings, strict=True):
        last = calls[-1]
        if any(
            (c.function, c.slots, c.many) != (last.function, last.slots, last.many) for c in calls
        ):
            raise Refused("the steps call different functions")
        args = _merged([call.args for call in calls], position)
        kwargs = _merged([call.kwargs for call in calls], position)
        common.append(replace(last, args=args, kwargs=kwargs))
    return common


def _merged(values: Sequence[Any], position: int | None) -> Any:
    """One template of what an argument was at consecutive positions, the last one `position`."""
    last = values[-1]
    if any(type(value) is not type(last) for value in values):
        raise Refused("an argument changes its type")
    if isinstance(last, dict | slice | list | tuple):
        parts = [list(_parts(value)) for value in values]
        if len({len(part) for part in parts}) > 1:
            raise Refused("an argument changes its length")
        merged = iter([_merged(column, position) for column in zip(*parts, strict=True)])
        return mapped(lambda _: next(merged), last)
    if isinstance(last, Tensor) or callable(last):
        same = all(value is last for value in values)
    else:
        same = all(value == last for value in values)
    if same:
        return last
    steps = {b - a for a, b in pairwise(values)} if type(last) is int else set()
    if position is None or steps != {1}:
        raise Refused("an argument changes from token to token")
    return Counted(last - position)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return (value.start, value.stop, value.step) if isinstance(value, slice) else value


def _kept(calls: Sequence[RecordedCall], logits: Ref) -> list[RecordedCall]:
    """The calls that the logits or the caches depend on."""
    needed, kept = {logits.slot}, []
    for call in reversed(calls):
        wanted = call.given is not None or not needed.isdisjoint(call.slots)
        if wanted or (call.in_place and call.args[0].slot in needed):
            needed |= {
                leaf.slot for leaf in _leaves((call.args, call.kwargs)) if isinstance(leaf, Ref)
            }
            kept.append(call)
    return kept[::-1]


def _taker(wanted: list[int]) -> Any:
    """From all values a sequence of those at some places, at the speed of C."""
    if len(wanted) > 1:
        return itemgetter(*wanted)
    return itemgetter(slice(wanted[0], wanted[0] + 1) if wanted else slice(0))


def _of_list(function: Callable[..., Any], rest: tuple[Any, ...], *items: Any) -> Any:
    return function(items, *rest)


def _of_template(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *values: Any
) -> Any:
    found = iter(values)

    def fill(value: Any) -> Any:
        return next(found) if isinstance(value, Ref | Counted) else mapped(fill, value)

    return function(*fill(args), **fill(kwargs))


def integers(config: Any) -> set[int]:
    """All integers of a config, however deep."""
    return {leaf for leaf in flat(config) if type(leaf) is int and leaf > 0}
