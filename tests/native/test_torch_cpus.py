"""Kernels of CPUs that are not here, under QEMU: `make cpus`.

Products are compared with a formula in NumPy, ATen's orders of sums as written in its sources, and
with torch itself on an emulated Haswell. Skipped by name where an emulator or a compiler is absent
(Debian: apt-get install qemu-user gcc gcc-aarch64-linux-gnu libc6-dev-arm64-cross).

Shape legend: N rows out, K columns in, S rows of x, L lanes of a vector.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from chronos import kernels as native  # noqa: E402
from chronos.backends.torch import kernels  # noqa: E402
from chronos.backends.torch.quantised import by_torch  # noqa: E402
from tests.native.test_torch_kernels import FORMATS, matrix_of  # noqa: E402

pytestmark = pytest.mark.skipif(
    not os.environ.get("CHRONOS_TEST_CPUS"), reason="other CPUs are emulated by `make cpus`"
)
C, SUPPORT = Path(native.__file__).parent / "c", Path(__file__).parents[1] / "support"
# Compiler, how its programs are run, lanes of a vector.
CPUS = {
    "avx2": ("gcc", ["qemu-x86_64", "-cpu", "Haswell"], 8),
    "neon": ("aarch64-linux-gnu-gcc", ["qemu-aarch64"], 4),
}
FIELDS = (
    "format bits scale_type rows columns down across groups order codes_lie scales_lie more".split()
)


@pytest.fixture(scope="module", params=CPUS)
def cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What runs a product, and the lanes of the CPU's vectors."""
    compiler, emulator, lanes = CPUS[request.param]
    for program in (compiler, emulator[0]):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    made = tmp_path_factory.mktemp(request.param) / "product"
    sources = [str(SUPPORT / "product.c"), *map(str, sorted(C.glob("*.c")))]
    flags = ["-O3", "-std=gnu11", "-ffp-contract=off", "-pthread", "-static", f"-I{C}"]
    subprocess.run([compiler, *flags, *sources, "-o", str(made)], check=True)
    return [*emulator, str(made)], lanes


def run(command: list[str], matrix: Any, kinds: dict[str, Any], x: Any) -> Any:
    """The product [S, N] and the matrix [N, K]."""
    numbers = [getattr(matrix, name) for name in FIELDS] + [len(x)]
    given = [struct.pack(f"{len(numbers)}q", *numbers)]
    for field in ("values", "scales", "zeros", "divisor"):
        at = getattr(matrix, field)
        found = [t for t in kinds.values() if t.data_ptr() == at]
        given.append(bytes_of(found[0]) if found else b"")
    given.append(bytes_of(x))
    message = b"".join(struct.pack("q", len(part)) + part for part in given)
    out = subprocess.run(command, input=message, stdout=subprocess.PIPE, check=True).stdout
    raw = torch.frombuffer(bytearray(out), dtype=torch.bfloat16)
    y, plain = raw.split([len(x) * matrix.rows, matrix.rows * matrix.columns])
    return y.view(len(x), -1), plain.view(matrix.rows, -1)


def bytes_of(tensor: Any) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def summed(order: str, w_NK: NDArray[np.float32], x_K: NDArray[np.float32], L: int) -> Any:
    """Products [N] of a row, added as ATen does; of two bfloat16 they are exact in float32."""
    p_NK = w_NK * x_K
    if order == "fours":
        sums_N4 = np.zeros((len(w_NK), 4), np.float32)
        for k in range(0, len(x_K), 4):
            sums_N4 += p_NK[:, k : k + 4]
        return ((sums_N4[:, 0] + sums_N4[:, 1]) + sums_N4[:, 2]) + sums_N4[:, 3]
    whole = len(x_K) // (8 * L) * 8 * L
    sums_N8L = np.zeros((len(w_NK), 8, L), np.float32)
    for k in range(0, whole, 8 * L):
        sums_N8L += p_NK[:, k : k + 8 * L].reshape(-1, 8, L)
    for half in (4, 2, 1):
        sums_N8L = sums_N8L[:, :half] + sums_N8L[:, half:]
    last_NL = np.zeros((len(w_NK), L), np.float32)
    for k in range(whole, len(x_K), L):
        last_NL += p_NK[:, k : k + L]
    return across(sums_N8L[:, 0], L) + across(last_NL, L)


def across(sums_NL: NDArray[np.float32], L: int) -> Any:
    while sums_NL.shape[1] > 1:
        half = sums_NL.shape[1] // 2  # ARM adds neighbours, x86 halves
        first, second = (slice(0, None, 2), slice(1, None, 2)) if L == 4 else (
            slice(half), slice(half, None)
        )  # fmt: skip
        sums_NL = sums_NL[:, first] + sums_NL[:, second]
    return sums_NL[:, 0]


@pytest.mark.parametrize("order", ["dots", "fours"])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_added_as_the_formula_says(name: str, order: str, cpu: Any) -> None:
    command, lanes = cpu
    for N, K in ((33, 288), (40, 1056)):
        encoding, kinds = matrix_of(name, N, K)
        if name.startswith("affine"):  # denormal numbers too
            kinds["scales"].view(-1)[:2] = kinds["biases"].view(-1)[:2] = 3e-39
        matrix = kernels.describe(encoding, kinds)
        assert matrix is not None
        kernels.in_order(native.ORDERS.index(order), [matrix])
        weight = by_torch(encoding, kinds, torch.bfloat16)
        rows = kernels.cancelling(weight)[: native.MOST_ROWS]
        w_NK, x_SK = weight.float().numpy(), rows.float().numpy()
        expected = torch.from_numpy(np.stack([summed(order, w_NK, x, lanes) for x in x_SK]))
        for count in (1, len(rows)):
            y, plain = run(command, matrix, kinds, rows[:count])
            assert torch.equal(plain.view(torch.int16), weight.view(torch.int16))
            assert torch.equal(y, expected[:count].bfloat16())


@pytest.mark.timeout(1200)  # it imports torch in an emulator
def test_torch_on_a_haswell_adds_as_kernels_do() -> None:
    """The tests of products, by this Python and torch on a CPU that has AVX2 and no AVX-512."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None or not sysconfig.get_platform().endswith("x86_64"):
        pytest.skip("qemu-x86_64 is not installed, or this is no x86-64")
    path = os.pathsep.join([str(Path(native.__file__).parents[2]), *filter(None, sys.path)])
    python = [emulator, "-cpu", "Haswell", str(Path(sys.executable).resolve()), "-m", "pytest"]
    chosen = "finds_the_order or (one_row and (mxfp4 or fp8 or int4) and 288)"
    tests = [str(Path(__file__).with_name("test_torch_kernels.py")), "-k", chosen]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*python, "-q", "-p", "no:cacheprovider", *tests],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
