"""Compiled products of a few rows with packed matrices, called with addresses: no framework here.

`describe` says what lies where, `multiply` computes, `dequantise` makes it plain. The library is
optional: where it was not compiled `loaded` is false, where the CPU has not the instructions
`available` is, and callers do without. Whether a product has the bits of a framework's own is for
the caller to try: see `backends.torch.kernels`.
"""

from chronos.kernels.library import (
    MOST_ROWS,
    ORDERS,
    Array,
    Matrix,
    available,
    dequantise,
    describe,
    loaded,
    multiply,
    multiply_wide,
    orders,
    wide,
)

__all__ = [
    "MOST_ROWS",
    "ORDERS",
    "Array",
    "Matrix",
    "available",
    "dequantise",
    "describe",
    "loaded",
    "multiply",
    "multiply_wide",
    "orders",
    "wide",
]
