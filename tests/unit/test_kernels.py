"""What the compiled kernels are told, without a framework: descriptions, refusals, the switch."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chronos import kernels
from chronos.common.errors import ShapeMismatch, UsageError
from chronos.kernels import Array, library

MXFP4 = {"blocks": Array(1 << 20, "U8", (48, 2, 16)), "scales": Array(2 << 20, "U8", (48, 2))}


def test_a_description_has_sizes_and_addresses() -> None:
    found = kernels.describe("mxfp4", MXFP4)
    assert found is not None
    assert (found.rows, found.columns, found.across, found.groups) == (48, 64, 32, 2)
    assert (found.values, found.scales, found.zeros) == (1 << 20, 2 << 20, None)


@pytest.mark.parametrize(
    "changed",
    [
        {"scales": Array(0, "U8", (48, 3))},
        {"scales": Array(0, "U8", (47, 2))},
        {"blocks": Array(0, "U8", (48, 2, 15))},
        {"blocks": Array(0, "U8", (1 << 62, 2, 16))},
        {"scales": Array(0, "F32", (48, 2))},
        {"more": Array(0, "U8", (1,))},
    ],
)
def test_sizes_that_do_not_fit_are_refused(changed: dict[str, Array]) -> None:
    with pytest.raises(ShapeMismatch, match="is no matrix as mxfp4 stores them"):
        kernels.describe("mxfp4", MXFP4 | changed)


@pytest.mark.parametrize("shape", [(3,), (0, 64), (2, 3, 4)])
def test_plain_numbers_are_a_matrix_too(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch, match="a matrix of shape"):
        kernels.describe("bf16", {"weight": Array(0, "BF16", shape)})


def test_what_no_kernel_is_for() -> None:
    words = {"weight": Array(0, "U32", (8, 9)), "scales": Array(0, "BF16", (8, 3))}
    assert kernels.describe("mlx-affine3", words | {"biases": words["scales"]}) is None
    odd = {"weight": Array(0, "F8_E4M3", (8, 40)), "weight_scale_inv": Array(0, "F32", (1, 1))}
    assert kernels.describe("fp8-128x128", odd) is None
    assert kernels.describe("bf16", {"weight": Array(0, "F32", (8, 64))}) is None


@pytest.mark.parametrize("opened", [None, -1])
def test_a_library_of_another_version_is_not_used(
    opened: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a function that is called, or with other sizes of what it is told."""
    older: Any = SimpleNamespace()
    if opened is not None:
        names = ("multiply", "multiply_wide", "dequantise")
        older = SimpleNamespace(**{f"chronos_{name}": SimpleNamespace() for name in names})
        older.chronos_open = lambda product_bytes: opened
    if library._library() is None:
        pytest.skip("no kernels are compiled")
    library._library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(library.ctypes, "CDLL", lambda path: older)
        with pytest.warns(RuntimeWarning, match="of another version"):
            assert library._library() is None
    library._library.cache_clear()


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHRONOS_KERNEL", raising=False)
    here = kernels.available()
    assert here == (library._library() is not None)
    for name, value in (("CHRONOS_KERNEL", "off"), ("CHRONOS_PLAIN", "1")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            assert not kernels.available()
    monkeypatch.setenv("CHRONOS_KERNEL", "fast")
    with pytest.raises(UsageError, match="CHRONOS_KERNEL cannot be 'fast'"):
        kernels.available()


def test_calls_that_no_kernel_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = kernels.describe("mxfp4", MXFP4)
    assert matrix is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_library", lambda: None)
        with pytest.raises(UsageError, match="no kernels on this machine"):
            kernels.multiply([(matrix, 0, 0)], 1, 1, None)
    if not kernels.available():
        pytest.skip("no kernels: not compiled, or none for this CPU")
    for products, count in (([], 1), ([(matrix, 0, 0)] * 65, 1), ([(matrix, 0, 0)], 0)):
        with pytest.raises(UsageError, match="in one call"):
            kernels.multiply(products, count, 1, None)
    matrix.order = len(kernels.ORDERS)
    with pytest.raises(UsageError, match="an order of sums without kernels"):
        kernels.multiply([(matrix, 0, 0)], 1, 1, None)


@pytest.mark.skipif(not kernels.available(), reason="no kernels on this machine")
@pytest.mark.parametrize("order", kernels.ORDERS)
def test_numpy_can_call_them(order: str) -> None:
    number = kernels.ORDERS.index(order)
    if number not in kernels.orders():
        pytest.skip(f"no kernels on this CPU that add by {order}")
    random = np.random.default_rng(0)
    weight, x = (
        random.integers(0x3F00, 0x3F80, shape, dtype=np.uint16) for shape in ((70, 96), (3, 96))
    )
    y = np.zeros((3, 70), dtype=np.uint16)
    matrix = kernels.describe("bf16", {"weight": Array(weight.ctypes.data, "BF16", weight.shape)})
    assert matrix is not None
    matrix.order = number
    kernels.multiply([(matrix, x.ctypes.data, y.ctypes.data)], 3, 2, (weight, x))
    wide = [(array.astype(np.uint32) << 16).view(np.float32) for array in (x, weight, y)]
    np.testing.assert_allclose(wide[2], wide[0] @ wide[1].T, rtol=2**-8)


@pytest.mark.skipif(not kernels.available(), reason="no kernels on this machine")
def test_a_child_process_has_threads_of_its_own() -> None:
    code = """
import os, numpy as np
from chronos import kernels
weight = np.full((512, 96), 0x3F80, dtype=np.uint16)
x, y = weight[:1].copy(), np.zeros((1, 512), dtype=np.uint16)
array = kernels.Array(weight.ctypes.data, "BF16", weight.shape)
matrix = kernels.describe("bf16", {"weight": array})
call = [(matrix, x.ctypes.data, y.ctypes.data)]
kernels.multiply(call, 1, 3, weight)
first = y.copy()
y[:] = 0
if (child := os.fork()) == 0:
    kernels.multiply(call, 1, 3, weight)
    os._exit(not (y == first).all())
assert first.all() and os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
