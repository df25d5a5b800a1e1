"""How many bytes experts may take: reading a budget or size, and refusing one that cannot work.

A budget is a promise, so everything is rounded down: to whole bytes, then to whole slots.
Not covered: how much memory the machine has (`chronos.backends.probe`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from chronos.common.errors import UsageError

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
# Bounded digits: a fraction of a million digits would take seconds to convert.
_QUANTITY = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]{0,3}|%)", re.ASCII)
_SIZES = "2GiB, 500MB, a number of bytes"
_EXAMPLES = f"use for example 25%, {_SIZES}, or all"


def parse_budget(text: str | int, total_bytes: int, what: str = "a budget") -> int:
    """Bytes meant by `25%` (of total_bytes), `2GiB`, `500MB`, a byte count or `all`.

    what: names it in the UsageError for anything else, for 0, for more than 100 % and for so few
    bytes that a share was meant.
    """
    if isinstance(text, bool):
        raise UsageError(f"{what} cannot be {text!r}", "", _EXAMPLES)
    if str(text).strip().lower() == "all":
        return total_bytes
    return _parse(str(text), what, _EXAMPLES, _UNITS | {"%": Fraction(total_bytes, 100)})


def parse_size(text: str, what: str) -> int:
    """Bytes meant by `2GiB`, `500MB` or a byte count. what: names it in the UsageError."""
    return _parse(text, what, f"use for example {_SIZES}", _UNITS)


def held(
    budget: str, *, record_bytes: int, total_bytes: int, layers: int, experts: int, least: int
) -> dict[str, Any]:
    """What a budget holds of `layers` with so many experts each, in whole records: an object of
    `budget`, `bytes`, `experts`, `experts_per_layer`, `enough` and `least_bytes`. least: records
    without which the model does not run. Raises UsageError for what is no budget."""
    slots = min(parse_budget(budget, total_bytes) // record_bytes, experts * layers)
    return {
        "budget": budget,
        "bytes": slots * record_bytes,
        "experts": slots,
        "experts_per_layer": slots / layers,
        "enough": slots >= least,
        "least_bytes": least * record_bytes,
    }


def shown_size(nbytes: float) -> str:
    """Bytes for people, in decimal units as disks count them: 1.23 MB."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 1000 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def _parse(text: str, what: str, examples: str, units: Mapping[str, int | Fraction]) -> int:
    cleaned = text.strip().lower()
    match = _QUANTITY.fullmatch(cleaned)
    if match is None or match[2] not in units:
        raise UsageError(f"{what} cannot be {text[:40]!r}", "", examples)
    quantity, unit = Fraction(match[1]), match[2]
    if unit == "" and quantity.denominator != 1:
        raise UsageError(f"{cleaned} bytes is not a whole number", "", examples)
    if unit == "" and "%" in units and 0 < quantity <= 100:
        few = f"{what} of {cleaned} bytes holds nothing"
        raise UsageError(few, "", f"did you mean {cleaned}%?")
    if quantity == 0 or (unit == "%" and quantity > 100):
        raise UsageError(f"{what} cannot be {cleaned}", "", examples)
    return int(quantity * units[unit])
