"""The formulas of the limit, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from chronos.common.errors import UsageError
from chronos.common.traces.limits import eta_policy, limit_report

# 1 GB dense, 10 layers x 4 experts of 10 MB; memory 100 GB/s, disk 1 GB/s.
RUN: dict[str, Any] = {
    "token_s": 0.25,
    "reads_per_token": 16.0,
    "min_reads_per_token": 10.0,
    "record_bytes": 10e6,
    "slow_bytes_per_s": 1e9,
    "fast_bytes_per_s": 100e9,
    "dense_bytes": 1e9,
    "layers": 10,
    "top_k": 4,
}


def test_a_run_worked_out_by_hand() -> None:
    report = limit_report(**RUN, ref_reads_per_token=20.0, stall_s=0.12, kernel_s=0.05)
    assert report.to_json() == pytest.approx(
        {
            "t_res_s": 0.05,  # 1.4 GB at 100 GB/s would take 14 ms
            "t_limit_s": 0.13,  # 10 reads of 10 ms are hidden behind its own computing
            "t_demand_s": 0.11,  # and 10 ms of dense weights before them
            "eta_limit": 0.52,
            "eta_res": 0.2,
            "eta_ideal": 0.4,  # and are not behind that of the resident run
            "eta_bytes": 0.625,
            "eta_policy": 0.4,
            "eta_overlap": 0.25,
        }
    )


def test_the_share_of_the_limit_is_the_same_whether_a_resident_run_was_measured_or_not() -> None:
    alone = limit_report(**RUN, stall_s=0.12)
    beside = limit_report(**RUN, stall_s=0.12, kernel_s=0.05)
    assert alone.eta_limit == beside.eta_limit == pytest.approx(0.52)
    assert (alone.t_res_s, alone.eta_ideal) == (pytest.approx(0.13), None)


def test_measured_kernels_and_rest_replace_the_roofline() -> None:
    report = limit_report(**RUN, kernel_s=0.2, nonexpert_s=0.05)
    assert report.t_res_s == report.t_limit_s == 0.2
    assert report.t_demand_s == pytest.approx(0.15)


def test_copies_to_an_accelerator_are_a_limit_of_their_own() -> None:
    """10 reads of 10 ms are hidden behind 30 copies of 5 ms, or hide 30 of 2 ms."""
    slow = limit_report(**RUN, min_copies_per_token=30.0, link_bytes_per_s=2e9)
    fast = limit_report(**RUN, min_copies_per_token=30.0, link_bytes_per_s=5e9)
    assert (slow.t_limit_s, fast.t_limit_s) == pytest.approx((0.15, 0.1))
    assert slow.eta_limit == pytest.approx(0.6)


def test_nothing_known_about_policy_and_overlap_is_none() -> None:
    report = limit_report(**RUN)
    assert report.eta_policy is None
    assert report.eta_overlap is None


def test_a_run_without_reads_is_at_the_limit_of_bytes() -> None:
    quiet = RUN | {"reads_per_token": 0.0, "min_reads_per_token": 0.0}
    report = limit_report(**quiet, stall_s=0.0, ref_reads_per_token=0.0)
    assert (report.eta_bytes, report.eta_overlap, report.eta_policy) == (1.0, 1.0, None)
    assert report.t_limit_s == report.t_res_s


def test_shares_are_not_clipped() -> None:
    report = limit_report(**RUN | {"reads_per_token": 30.0}, ref_reads_per_token=20.0, stall_s=0.6)
    assert report.eta_policy == pytest.approx(-1.0)
    assert report.eta_overlap == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("reads", "ref", "least", "expected"),
    [(5.0, 9.0, 5.0, 1.0), (9.0, 9.0, 5.0, 0.0), (7.0, 9.0, 5.0, 0.5), (5.0, 5.0, 5.0, None)],
)
def test_eta_policy(reads: float, ref: float, least: float, expected: float | None) -> None:
    assert eta_policy(reads, ref, least) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("token_s", 0.0), ("slow_bytes_per_s", 0.0), ("reads_per_token", -1.0), ("stall_s", math.nan)],
)
def test_impossible_measurements_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        limit_report(**RUN | {name: value})
