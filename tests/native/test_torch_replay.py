"""Recorded steps: what is replayed, what is refused, and where a program ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chronos.backends.torch.capture import opaque
from chronos.backends.torch.replay import Steps, integers

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


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
