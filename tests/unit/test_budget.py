"""Reading budgets, and refusing those that cannot work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chronos.common.budget import parse_budget, parse_size
from chronos.common.errors import BudgetError, UsageError
from chronos.common.experts.stats import StoreStats
from chronos.common.layout.folder import minimum_bytes, slots_within

TOTAL = 96 * 4096


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("all", TOTAL),
        (" ALL ", TOTAL),
        ("25%", 24 * 4096),
        ("12.5 %", 12 * 4096),
        ("100%", TOTAL),
        ("29%", TOTAL * 29 // 100),
        ("2GiB", 2 << 30),
        ("1.5 gib", 3 << 29),
        ("2g", 2 << 30),
        ("500MB", 500_000_000),
        ("64k", 65536),
        ("4096", 4096),
        ("4096B", 4096),
        (4096, 4096),
    ],
)
def test_a_budget_is_read(text: str | int, nbytes: int) -> None:
    assert parse_budget(text, TOTAL) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "0", "0%", "-1", -5, "101%", "1e9", "nan", "inf", "0.25", "2 XiB", "GiB", "%", "half",
     "1_000", "٣%", "9" * 5000, "1/2%", True, "2GiB 3", "1.%"],
)  # fmt: skip
def test_nonsense_is_refused_with_examples(text: Any) -> None:
    with pytest.raises(UsageError, match="for example 25%, 2GiB"):
        parse_budget(text, TOTAL)


def test_a_size_is_no_share() -> None:
    assert parse_size("1.5GB", "a rate") == 1_500_000_000
    for text in ("50%", "all", "0", "fast", "1GB/s"):
        with pytest.raises(UsageError, match="a rate cannot be .*\n.* example 2GiB, 500MB"):
            parse_size(text, "a rate")


def test_a_share_never_rounds_up() -> None:
    for share in range(1, 101):
        nbytes = parse_budget(f"{share}%", TOTAL)
        assert nbytes * 100 <= share * TOTAL < (nbytes + 1) * 100


def layout(records: int) -> Any:
    keys = dict.fromkeys(range(records))
    return SimpleNamespace(
        records=keys, record_nbytes=4096, total_bytes=records * 4096, folder=Path("model")
    )


def test_slots_are_whole_and_no_more_than_there_are_records() -> None:
    assert slots_within(layout(8), 4096 * 3 + 4095) == 3
    assert slots_within(layout(8), 1 << 40) == 8
    assert slots_within(layout(8), 4096 * 2, top_k=2) == 2


def test_too_small_a_budget_names_the_least() -> None:
    assert minimum_bytes(layout(8), 4) == 16384
    with pytest.raises(BudgetError, match=r"at least 16384 bytes \(50.0 %\)") as caught:
        slots_within(layout(8), 16383, top_k=4)
    assert caught.value.exit_code == 4


def test_stats_subtract_counters_and_keep_gauges() -> None:
    earlier = StoreStats(hits=2, misses=1, bytes_read=100, peak_expert_bytes=7, capacity_bytes=9)
    now = StoreStats(5, late=1, misses=1, bytes_read=150, peak_expert_bytes=8, capacity_bytes=9)
    change = now.minus(earlier)
    assert (change.hits, change.misses, change.late, change.routed) == (3, 0, 1, 4)
    assert (change.bytes_read, change.peak_expert_bytes, change.capacity_bytes) == (50, 8, 9)
    assert change.to_json()["routed"] == 4
