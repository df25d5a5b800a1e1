"""The limit of a streamed run, and how much of it was reached. Plain floats in and out.

    T_busy = T - stall                              this run's own computing
    T*     = max(T_busy, R* S / B_slow, C* S / B_link)  perfect foresight, full overlap
    T_res  = max((D + L k S) / B_fast, T_kernels)   everything resident
    T_dem  = T_nonexpert + R* S / B_slow            perfect cache, no prediction
    eta_limit = T*/T      eta_res = T_res/T         eta_bytes = R*/R
    eta_policy = (R_ref - R) / (R_ref - R*)         eta_overlap = 1 - stall / (R S / B_slow)
    eta_ideal = max(T_res, T* without T_busy) / T

"% of the limit" is eta_limit wherever it is printed. It needs no resident run, so that a run has
the same share whoever measured it. That reads also slow the computing beside them is in eta_ideal,
which needs one, and in the speed beside the resident model's.
R is expert reads per token, prefetched ones and waste included; R* those of exact MIN with bypass
on the same routing (`simulate`). Behind an accelerator R* is that of its slots and the warm tier
behind them together, C* the copies per token of its slots alone. Shares are not clipped: above 1 or
below 0 says an input was wrong, or that prefetch waste made things worse. Lossy miss policies have
no place on this axis.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from chronos.common.errors import UsageError


@dataclass(frozen=True)
class LimitReport:
    """Seconds per token and shares of the limit; None where the inputs say nothing about it."""

    t_res_s: float  # T_res: everything resident
    t_limit_s: float  # T*: no other cache or schedule of reads can be faster at this computing
    t_demand_s: float  # T_dem: the best without prediction
    eta_limit: float
    eta_res: float
    eta_ideal: float | None  # None where no resident run was measured
    eta_bytes: float
    eta_policy: float | None
    eta_overlap: float | None

    def to_json(self) -> dict[str, float | None]:
        return dataclasses.asdict(self)


def limit_report(
    *,
    token_s: float,
    reads_per_token: float,
    min_reads_per_token: float,
    record_bytes: float,
    slow_bytes_per_s: float,
    fast_bytes_per_s: float,
    dense_bytes: float,
    layers: int,
    top_k: int,
    kernel_s: float | None = None,
    nonexpert_s: float | None = None,
    ref_reads_per_token: float | None = None,
    stall_s: float | None = None,
    min_copies_per_token: float = 0.0,
    link_bytes_per_s: float | None = None,
) -> LimitReport:
    """The limit for one measured run.

    token_s: T, measured seconds per token. reads_per_token: R. min_reads_per_token: R*.
    record_bytes: S, one expert. slow_bytes_per_s: B_slow, measured on reads of S bytes.
    fast_bytes_per_s: B_fast, memory. dense_bytes: D, bytes outside the experts read per token, KV
    cache included. layers: MoE layers. kernel_s: T_kernels, seconds per token of a resident run
    (None: not measured, T_busy stands for it; the roofline alone without stall_s). nonexpert_s:
    resident seconds per token outside the experts (default D / B_fast). ref_reads_per_token: R_ref,
    the better of LRU and decayed LFU on the same routing. stall_s: seconds per token spent
    waiting for experts (None: not known, T_res stands for T_busy). min_copies_per_token,
    link_bytes_per_s: C* and B_link, of an accelerator with memory of its own.
    Raises UsageError for a number that is negative, not finite, or a rate or time of 0.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    rates = ("slow_bytes_per_s", "fast_bytes_per_s", "link_bytes_per_s")
    _check_numbers(given, positive=("token_s", *rates))
    read_s = record_bytes / slow_bytes_per_s
    busy_s = None if stall_s is None else max(0.0, token_s - stall_s)
    kernels_s = kernel_s if kernel_s is not None else busy_s or 0.0
    resident_s = max((dense_bytes + layers * top_k * record_bytes) / fast_bytes_per_s, kernels_s)
    copy_s = record_bytes / link_bytes_per_s if link_bytes_per_s else 0.0
    moving_s = max(min_reads_per_token * read_s, min_copies_per_token * copy_s)
    limit_s = max(resident_s if busy_s is None else busy_s, moving_s)
    rest_s = dense_bytes / fast_bytes_per_s if nonexpert_s is None else nonexpert_s
    return LimitReport(
        t_res_s=resident_s,
        t_limit_s=limit_s,
        t_demand_s=rest_s + min_reads_per_token * read_s,
        eta_limit=limit_s / token_s,
        eta_res=resident_s / token_s,
        eta_ideal=None if kernel_s is None else max(resident_s, moving_s) / token_s,
        eta_bytes=min_reads_per_token / reads_per_token if reads_per_token else 1.0,
        eta_policy=eta_policy(reads_per_token, ref_reads_per_token, min_reads_per_token),
        eta_overlap=_eta_overlap(stall_s, reads_per_token * read_s),
    )


def eta_policy(reads: float, ref_reads: float | None, min_reads: float) -> float | None:
    """Share of the gap between the reference cache and MIN that is closed; None without a gap."""
    if ref_reads is None or ref_reads <= min_reads:
        return None
    return (ref_reads - reads) / (ref_reads - min_reads)


def _eta_overlap(stall_s: float | None, reading_s: float) -> float | None:
    if stall_s is None:
        return None
    return 1.0 - stall_s / reading_s if reading_s else 1.0


def _check_numbers(given: dict[str, float], positive: tuple[str, ...]) -> None:
    for name, value in given.items():
        if not math.isfinite(value) or value < 0 or (value == 0 and name in positive):
            raise UsageError(f"limit_report: {name} = {value} is no usable measurement")
