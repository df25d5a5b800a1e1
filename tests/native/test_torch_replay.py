"""Recorded steps: what is replayed, what is refused, and where a program ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chronos.backends.torch.fast import capture
from chronos.backends.torch.fast.capture import opaque
from chronos.backends.torch.fast.steps import Steps, integers

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
OUTSIDE = torch.zeros(8)


class Toy:
    """A step over a state that only `opaque` touches, and the calls of its Python."""

    def __init__(self, change: Callable[[Tensor, int], Tensor]) -> None:
        self.change, self.state, self.position, self.calls = change, torch.zeros(8), 0, 0

    def remember(self, x: Tensor) -> Tensor:
        self.state = self.state * 0.5 + x
        return self.state

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = WEIGHT[ids[0, 0]] + torch.arange(8) * self.position
        x = self.change(x, self.position)
        return opaque(self.remember, x) @ WEIGHT


def run(toy: Toy, steps: Steps | None, count: int) -> list[Tensor]:
    found = []
    for position in range(1, count + 1):
        toy.position = position
        ids = torch.tensor([[position % 8]])
        found.append(toy.forward(ids) if steps is None else steps.run(ids, position, toy.forward))
    return found


def same_as_unrecorded(
    change: Callable[[Tensor, int], Tensor], edges: set[int], count: int = 12
) -> tuple[Toy, Steps]:
    toy, steps = Toy(change), Steps(edges)
    for found, expected in zip(run(toy, steps, count), run(Toy(change), None, count), strict=True):
        assert torch.equal(found, expected)
    return toy, steps


def test_three_tokens_are_recorded_and_the_rest_replayed() -> None:
    toy, steps = same_as_unrecorded(
        lambda x, position: x.to(torch.float64).float() + position, set()
    )
    assert (toy.calls, steps.replayed) == (3, 9)


def test_a_program_ends_at_an_integer_of_the_config() -> None:
    toy, steps = same_as_unrecorded(lambda x, position: x * min(position, 8), {8}, 20)
    assert steps.replayed > 5
    assert toy.calls > 6  # recorded on both sides of the edge


@pytest.mark.parametrize(
    "change",
    [
        lambda x, position: x if x.sum() > 0 else -x,
        lambda x, position: x * float(x[0]),
        lambda x, position: x * (position % 3),
        lambda x, position: x + torch.rand(8) * 0,
        lambda x, position: x + torch.tensor(float(position)),
        lambda x, position: (x.view(8), x.add_(1))[0],
        lambda x, position: x + WEIGHT[0].mul_(1),
    ],
    ids=["branch", "value", "no count", "random", "made outside", "two names", "outlives"],
)
def test_what_cannot_be_replayed_stays_as_it_is(change: Callable[[Tensor, int], Tensor]) -> None:
    toy, steps = same_as_unrecorded(change, set())
    assert (toy.calls, steps.replayed) == (12, 0)


def test_writing_into_what_the_step_made_is_replayed() -> None:
    _, steps = same_as_unrecorded(lambda x, position: x.mul(2).add_(position).view(8), set())
    assert steps.replayed == 9


def test_integers_of_a_config_are_found_however_deep() -> None:
    assert integers({"a": 4, "b": {"c": [7, True, 2.5, "9"]}, "d": None}) == {4, 7}


def grown(x: Tensor, y: Tensor) -> Tensor:
    F.relu(x, inplace=True)
    return y


@pytest.mark.parametrize(
    "change",
    [
        lambda x, position: grown(OUTSIDE, x),
        lambda x, position: grown(OUTSIDE, torch.add(OUTSIDE, 1, out=OUTSIDE) + x),
        lambda x, position: grown(OUTSIDE, torch.ops.aten.add_.Tensor(OUTSIDE, WEIGHT[0]) + x),
        lambda x, position: (x + torch.vmap(lambda row: row * 2)(WEIGHT)[0]).add_(1),
    ],
    ids=["inplace", "out", "overload", "no memory of its own"],
)
def test_what_writes_without_telling_by_its_name_is_refused(
    change: Callable[[Tensor, int], Tensor],
) -> None:
    toy, steps = Toy(change), Steps(())
    run(toy, steps, 12)
    assert (toy.calls, steps.replayed) == (12, 0)


def test_what_the_step_made_is_written_into_before_an_opaque_call() -> None:
    _, steps = same_as_unrecorded(lambda x, position: F.relu(x.clone(), inplace=True), set())
    assert steps.replayed == 9


def test_arguments_of_opaque_calls_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call gave when it was recorded would hide that it is now given something else."""
    monkeypatch.setattr(capture, "_CONVERSIONS", frozenset({"relu"}))  # a write goes unnoticed
    toy, steps = same_as_unrecorded(lambda x, position: F.relu(x.neg(), inplace=True), set())
    assert (toy.calls, steps.replayed) == (12, 0)


def test_large_constants_are_computed_and_not_kept() -> None:
    wide = torch.ones(300, 300, dtype=torch.bfloat16)
    _, steps = same_as_unrecorded(lambda x, position: x + wide.float().sum(), {20, 40}, 60)
    for program in steps._programs.values():
        kept = program._constants.values() if program else []
        assert sum(tensor.nbytes for tensor in kept) < 1000
    assert steps.replayed > 30


def test_a_period_that_no_integer_tells_is_found_in_the_end() -> None:
    toy = Toy(lambda x, position: x * (position % 100))
    steps = Steps(())
    run(toy, steps, 140)
    assert steps.replayed == 128  # two times 64 in, the second behind the period
    assert toy.calls == 3 + 2 + (140 - 3 - 128)
    toy, steps = same_as_unrecorded(lambda x, position: x * position, set(), 140)
    assert (toy.calls, steps.replayed) == (3 + 2, 137)


def test_an_error_in_a_step_leaves_no_recorder_behind() -> None:
    def change(x: Tensor, position: int) -> Tensor:
        if position == 2 and not failed:
            failed.append(position)
            raise OSError("a read")
        return x

    failed: list[int] = []
    toy, steps = Toy(change), Steps(())
    with pytest.raises(OSError, match="a read"):
        run(toy, steps, 12)
    assert getattr(capture._here, "recorder", None) is None
    toy.state = torch.zeros(8)
    for found, expected in zip(
        run(toy, steps, 12), run(Toy(lambda x, _: x), None, 12), strict=True
    ):
        assert torch.equal(found, expected)
    assert steps.replayed == 9


@pytest.mark.parametrize("period", [8, 24])
def test_a_number_that_starts_anew_at_an_integer_of_the_config(period: int) -> None:
    """Chunks: the first multiple alone is an edge of the position."""
    _, steps = same_as_unrecorded(lambda x, position: x * (position % period), {period}, 100)
    assert steps.replayed > 5
