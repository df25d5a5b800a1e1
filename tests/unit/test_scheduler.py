"""Which sequences a pass has, and with what: values in, values out."""

from __future__ import annotations

import pytest

from chronos.common.errors import UsageError
from chronos.common.text.sampling import AGAIN, PIECE, SamplingParams, Work
from chronos.run.scheduler import BESIDE_TOKENS, Scheduler

GREEDY = SamplingParams()


def shape(work: list[Work]) -> list[tuple[int, int, bool]]:
    """(sequence, tokens, whether the next is sampled) of each."""
    return [(each.seq, len(each.tokens), each.last) for each in work]


def passes(scheduler: Scheduler, replies: dict[int, int]) -> list[list[tuple[int, int, bool]]]:
    """All passes until every sequence has made so many tokens; they are numbered from 100 on."""
    seen, made = [], dict.fromkeys(replies, 0)
    while work := scheduler.next():
        seen.append(shape(work))
        for each in work:
            if not each.prompt:
                assert list(each.tokens) == [100 + made[each.seq] - 1]  # the one drawn last
            scheduler.took(each, 100 + made[each.seq] if each.last else None)
            made[each.seq] += each.last
            if made[each.seq] == replies[each.seq]:
                scheduler.drop(each.seq)
    assert made == replies
    return seen


def test_one_slot_is_a_prompt_in_pieces_then_token_by_token() -> None:
    scheduler = Scheduler()
    scheduler.add(0, range(2 * PIECE + 3), GREEDY)
    assert passes(scheduler, {0: 3}) == [
        [(0, PIECE, False)], [(0, PIECE, False)], [(0, 3, True)], [(0, 1, True)], [(0, 1, True)],
    ]  # fmt: skip


def test_pieces_name_the_whole_prompt_and_its_tokens_in_order() -> None:
    scheduler, prompt = Scheduler(), list(range(PIECE + 5))
    scheduler.add(4, prompt, GREEDY)
    found = []
    for _ in range(2):
        [work] = scheduler.next()
        assert work.prompt == len(prompt)
        found += work.tokens
        scheduler.took(work, 7 if work.last else None)
    assert found == prompt
    [work] = scheduler.next()
    assert (work.prompt, list(work.tokens)) == (0, [7])


def test_pieces_of_one_join_the_tokens_of_others() -> None:
    scheduler = Scheduler(slots=2)
    scheduler.add(0, [1], GREEDY)
    scheduler.add(1, range(PIECE + 1), GREEDY)
    assert passes(scheduler, {0: 3, 1: 1}) == [
        [(0, 1, True), (1, PIECE, False)], [(0, 1, True), (1, 1, True)], [(0, 1, True)],
    ]  # fmt: skip


def test_a_pass_has_so_many_tokens_of_prompts_the_earliest_first() -> None:
    scheduler = Scheduler(slots=4, pass_tokens=PIECE + 2)
    for seq, length in enumerate([PIECE, 3, 2, 2]):
        scheduler.add(seq, range(length), GREEDY)
    assert passes(scheduler, dict.fromkeys(range(4), 1)) == [
        [(0, PIECE, True), (2, 2, True)], [(1, 3, True), (3, 2, True)],
    ]  # fmt: skip


def test_a_piece_goes_on_for_a_few_layers_beside_tokens() -> None:
    """As many as make a few tokens through all of them; where nobody waits, to its end."""
    scheduler = Scheduler(slots=3, layers=24)
    scheduler.add(0, [1], GREEDY)
    scheduler.took(scheduler.next()[0], 100)
    scheduler.add(1, range(PIECE + 40), GREEDY)
    scheduler.add(2, range(3), GREEDY)
    token, long, short = scheduler.next()
    assert (token.layers, long.layers, len(long.tokens)) == (0, 1, PIECE)
    assert short.layers >= 24  # which is all of them
    scheduler.took(short, 7)
    scheduler.took(long, AGAIN)
    assert scheduler.next()[2] == long  # in every pass until it is over
    scheduler.took(long, None)
    long = scheduler.next()[2]
    assert (len(long.tokens), long.layers) == (40, 24 * BESIDE_TOKENS // 40)
    scheduler.took(long, AGAIN)
    scheduler.drop(0)
    scheduler.drop(2)
    [alone] = scheduler.next()
    assert (alone.tokens, alone.layers) == (long.tokens, 0)


def test_a_piece_above_the_limit_goes_alone() -> None:
    scheduler = Scheduler(slots=2, pass_tokens=4)
    scheduler.add(0, range(9), GREEDY)
    scheduler.add(1, range(9), GREEDY)
    assert passes(scheduler, {0: 1, 1: 1}) == [[(0, 9, True)], [(1, 9, True)]]


def test_others_wait_for_a_slot() -> None:
    scheduler = Scheduler(slots=2)
    for seq in range(3):
        scheduler.add(seq, [1, 2], GREEDY)
    assert passes(scheduler, {0: 2, 1: 1, 2: 1}) == [
        [(0, 2, True), (1, 2, True)], [(0, 1, True), (2, 2, True)],
    ]  # fmt: skip


def test_a_sequence_is_dropped_while_it_waits_runs_or_is_unknown() -> None:
    scheduler = Scheduler(slots=1)
    for seq in range(3):
        scheduler.add(seq, range(PIECE + 1), GREEDY)
    [work] = scheduler.next()
    scheduler.took(work, None)
    for seq in (1, 0, 7):
        scheduler.drop(seq)
    assert shape(scheduler.next()) == [(2, PIECE, False)]


def test_a_prompt_whose_beginning_is_there_goes_on_behind_it() -> None:
    scheduler = Scheduler()
    scheduler.add(0, range(PIECE + 4), GREEDY, start=PIECE)
    [work] = scheduler.next()
    assert (list(work.tokens), work.prompt) == (list(range(PIECE, PIECE + 4)), PIECE + 4)


def test_a_prompt_that_is_there_to_its_end_is_refused() -> None:
    """No pass would ever draw the token behind it."""
    with pytest.raises(UsageError, match="nothing is left"):
        Scheduler().add(0, range(2 * PIECE), GREEDY, start=2 * PIECE)


def test_nothing_to_do() -> None:
    assert Scheduler(slots=3).next() == []
