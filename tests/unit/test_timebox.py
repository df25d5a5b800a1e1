"""Time limits by a clock that is a number."""

from __future__ import annotations

import math

from chronos.measure.timebox import Count, Pace, Timebox


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_time_passes_and_is_up() -> None:
    clock = Clock()
    box = Timebox(10, clock)
    clock.now += 4
    assert (box.elapsed_s, box.left_s, box.over) == (4, 6, False)
    clock.now += 7
    assert (box.elapsed_s, box.left_s, box.over) == (11, 0, True)


def test_a_part_is_a_share_of_what_is_left() -> None:
    clock = Clock()
    box = Timebox(10, clock)
    clock.now += 4
    part = box.part(0.5)
    clock.now += 2
    assert (part.seconds, part.left_s) == (3, 1)
    clock.now += 90
    late = box.part(0.5, least_s=7)
    assert (late.seconds, late.over) == (7, False)


def test_what_fits_follows_from_the_pace() -> None:
    clock = Clock()
    box = Timebox(100, clock)
    assert box.fitting(0, 20, 200) == 200
    clock.now += 10
    assert box.fitting(10, 20, 200) == 100
    assert box.fitting(1, 20, 200) == 20
    assert box.fitting(90, 20, 200) == 200
    clock.now += 1000
    assert box.fitting(150, 20, 200) == 150  # what is done is done


def test_without_a_limit_all_fits() -> None:
    clock = Clock()
    box = Timebox(clock=clock)
    clock.now += 1e9
    assert math.isinf(box.left_s) and not box.over
    assert box.fitting(1, 1, 200) == 200
    assert math.isinf(box.part(0.5).seconds)


def test_a_group_warms_up_for_a_third_and_counts_until_the_time_is_up() -> None:
    clock = Clock()
    pace = Pace(Count(10, 100), Count(20, 200), Timebox(90, clock))
    parts, expected = [0, 0], []
    for counted in (False, True):
        while length := pace.next(counted, 10):
            clock.now += 5  # half a second a token
            parts[counted] += length
            pace.done(length)
            expected.append(pace.expected)
    assert parts == [60, 120]
    assert clock.now == 50 + 90
    assert expected[0] == 180 and expected[-1] == pace.tokens == 180


def test_a_group_with_time_does_what_is_wanted() -> None:
    clock = Clock()
    pace = Pace(Count(10, 25), Count(20, 48), Timebox(1e6, clock))
    lengths = []
    for counted in (False, True):
        while length := pace.next(counted, 10):
            clock.now += 5
            lengths.append(length)
            pace.done(length)
    assert lengths == [10, 10, 5, 10, 10, 10, 10, 8]
    assert pace.expected == pace.tokens == 73


def test_what_is_asked_for_is_done_however_late() -> None:
    clock = Clock()
    pace = Pace(Count(10, 100), Count(55, 55), Timebox(90, clock))
    parts = [0, 0]
    for counted in (False, True):
        while length := pace.next(counted, 10):
            clock.now += 50
            parts[counted] += length
            pace.done(length)
    assert parts == [10, 55]


def test_no_warm_up_where_none_is_wanted() -> None:
    pace = Pace(Count(0, 0), Count(20, 200), Timebox())
    assert pace.next(False, 10) == 0
    assert pace.next(True, 10) == 10
