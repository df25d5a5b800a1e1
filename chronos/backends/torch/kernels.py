"""Products by the compiled kernels: packed experts in the library's bits, rows of our own models.

One row times a quantised matrix, without the matrix in bfloat16 in between. A kernel is used for a
shape only after a trial: sums whose terms all but undo each other, so that what is left is their
rounding, which shows any other order of summation, compared with the library's product of the
dequantised matrix. Where none of the orders that kernels know has its bits, or there is no kernel,
an expert is dequantised as before.
A native model in float32 has no library's bits to keep, only its own: the resident model computes
with the same kernel as the streamed one.
In all of them a row has the bits it has alone, whatever rows are computed with it.

Shape legend: N rows out, K columns in, S samples, R rows in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from chronos import kernels
from chronos.common.layout.quantised import SCALES, split
from chronos.kernels import Array, Matrix

Kinds = Mapping[str, Tensor]
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
_SAMPLES, _CORRECTIONS, _SPREAD = 24, 16, 12


def usable(x: Tensor) -> bool:
    """Whether a kernel may compute with these rows at all."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.dim() == 2
        and len(x) == 1
        and not torch.is_grad_enabled()
        and kernels.available()
    )


def describe(encoding: str, kinds: Kinds) -> Matrix | None:
    """A matrix where its tensors lie; None where no kernel is for it. Raises ShapeMismatch."""
    arrays = {}
    if "g_idx" in kinds and not _in_turn(kinds["g_idx"], kinds["scales"].shape[0]):
        return None
    for kind, tensor in kinds.items():
        name = _NAMES.get(tensor.dtype)
        if name is None or not tensor.is_contiguous() or tensor.data_ptr() % tensor.itemsize:
            return None
        if encoding.startswith(("mlx", "transformers", "swiglu")) and name == "I32":
            name = "U32"  # which torch does not compute with: see `codecs.DTYPES`
        if kind in ("weight_scale_inv", "scale") and name == "U8":
            name = "F8_E8M0"
        arrays[kind] = Array(tensor.data_ptr(), name, tuple(tensor.shape))
    return kernels.describe(encoding, arrays)


def in_order(order: int, matrices: Sequence[Matrix]) -> Sequence[Matrix]:
    """The same, their products added in that order from now on."""
    for matrix in matrices:
        matrix.order = order
    return matrices


def _in_turn(group_K: Tensor, groups: int) -> bool:
    """Whether groups are of neighbouring columns, as they are but where GPTQ ordered columns by
    their activations."""
    K = len(group_K)
    return K % groups == 0 and torch.equal(group_K, _turns(K, groups, group_K.dtype))


@cache
def _turns(K: int, groups: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(groups, dtype=dtype).repeat_interleave(K // groups)


def multiply(x_RK: Tensor, matrices: Sequence[Matrix], owners: Any) -> Tensor:
    """Rows, up to MOST_ROWS of them, times the transposed matrices, side by side: [R, sum of N].
    owners: what keeps their memory."""
    x_RK = x_RK.contiguous()
    count, sizes = len(x_RK), [matrix.rows for matrix in matrices]
    y = x_RK.new_empty(count * sum(sizes))
    at, products = y.data_ptr(), []
    for matrix in matrices:
        products.append((matrix, x_RK.data_ptr(), at))
        at += 2 * count * matrix.rows
    kernels.multiply(products, count, torch.get_num_threads(), (owners, x_RK))
    if count == 1 or len(matrices) == 1:
        return y.view(count, -1)
    return torch.cat([part.view(count, -1) for part in y.split([count * N for N in sizes])], 1)


def in_company(product: Callable[[Tensor], Tensor], rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """The products of rows [..., K] of any number, each a tensor, by one of [R, K] that gives each
    the bits it has alone, as many at once as it takes."""
    if len(rows) == 1:
        return [product(rows[0])]
    found: list[Tensor] = []
    for start in range(0, len(rows), kernels.MOST_ROWS):
        some = rows[start : start + kernels.MOST_ROWS]
        y_RN = product(torch.cat([x.reshape(1, -1) for x in some]))
        found += (y.view(*x.shape[:-1], -1) for x, y in zip(some, y_RN, strict=True))
    return found


@cache
def multiplies_wide() -> bool:
    """Whether there are products of float32 rows, and a trial finds that each is right and has the
    bits it has alone. CHRONOS_KERNEL counts as of the first product of a process, so that a model
    keeps its bits."""
    return kernels.wide() and all(map(_alone_and_together, (torch.float32, torch.bfloat16)))


def _alone_and_together(dtype: torch.dtype) -> bool:
    """Of one kind of weight; sizes that are no multiples of what a kernel takes at once."""
    random = torch.Generator().manual_seed(0)
    weight_NK = torch.randn((43, 77), generator=random).to(dtype)
    x_RK = torch.randn((kernels.MOST_ROWS, 77), generator=random)
    alone_RN = torch.cat([multiply_wide(x_1K, weight_NK) for x_1K in x_RK.split(1)])
    exact_RN = (x_RK.double() @ weight_NK.double().t()).float()
    return torch.allclose(alone_RN, exact_RN, rtol=1e-4, atol=1e-4) and all(
        torch.equal(multiply_wide(x_RK[:count], weight_NK), alone_RN[:count])
        for count in range(2, len(x_RK) + 1)
    )


def multiply_wide(x: Tensor, weight_NK: Tensor) -> Tensor:
    """Rows x [..., K] in float32, up to MOST_ROWS of them, times the transposed weight, which is
    contiguous and float32 or bfloat16: [..., N]."""
    x = x.contiguous()
    N, K = weight_NK.shape
    y = x.new_empty((*x.shape[:-1], N))
    weight = Array(weight_NK.data_ptr(), _NAMES[weight_NK.dtype], (N, K))
    kernels.multiply_wide(
        weight, x.data_ptr(), y.data_ptr(), x.numel() // K, torch.get_num_threads(), (weight_NK, x)
    )
    return y


def dequantised(encoding: str, kinds: Kinds) -> Tensor | None:
    """A quantised matrix in bfloat16 [N, K]; None where no kernel is for it."""
    if not kernels.loaded() or any(tensor.device.type != "cpu" for tensor in kinds.values()):
        return None
    matrix = describe(encoding, kinds)
    if matrix is None:
        return None
    out_NK = torch.empty((matrix.rows, matrix.columns), dtype=torch.bfloat16)
    kernels.dequantise(matrix, out_NK.data_ptr())
    return out_NK


def same_order(
    weight_NK: Tensor, library: Callable[[Tensor], Tensor], ours: Callable[[int, Tensor], Tensor]
) -> int | None:
    """The order of summation in which our products of rows with a weight have the library's bits of
    each row alone, alone and among others, in sums that nearly cancel; None where none has. ours:
    takes the order and the rows."""
    rows_SK = cancelling(weight_NK)
    expected_SN = torch.cat([library(x_1K) for x_1K in rows_SK.split(1)])
    for order in kernels.orders():
        if all(
            torch.equal(ours(order, x_RK), y_RN)
            for count in range(1, kernels.MOST_ROWS + 1)
            for x_RK, y_RN in zip(rows_SK.split(count), expected_SN.split(count), strict=True)
        ):
            return order
    return None


def random_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a quantised expert with random codes and scales around 2^-6, always the same."""
    random = torch.Generator().manual_seed(0)

    def draw(name: str, like: Tensor) -> Tensor:
        kind = split(name).kind
        if kind == "weight_shape":
            return like.clone()
        if kind == "g_idx":
            groups = tensors[name.removesuffix(kind) + "scales"].shape[0]
            return _turns(len(like), groups, like.dtype).clone()
        if kind in SCALES and like.dtype == torch.uint8:
            return torch.randint(119, 124, like.shape, dtype=torch.uint8, generator=random)
        if like.is_floating_point() and like.itemsize > 1:
            drawn = torch.rand(like.shape, generator=random) * 0.02 + 0.005
            return (-drawn if kind == "biases" else drawn).to(like.dtype)
        raw = torch.randint(0, 256, (like.nbytes,), dtype=torch.uint8, generator=random)
        if like.dtype == torch.float8_e4m3fn or kind == "weight":
            raw &= 0xFE  # no code of E4M3 that is no number
        return raw.view(like.dtype).view(like.shape)

    return {name: draw(name, tensor) for name, tensor in tensors.items()}


def cancelling(weight_NK: Tensor) -> Tensor:
    """Rows x [S, K] in bfloat16, each of which nearly cancels with a row of the weight: single
    numbers are changed, one after the other, by what the sum still is. Their sizes are far apart:
    a sum of few weights of few bits would else be exact in any order."""
    random = torch.Generator().manual_seed(1)
    N, K = weight_NK.shape
    powers_SK = torch.randint(-_SPREAD, _SPREAD + 1, (_SAMPLES, K), generator=random)
    x_SK = (torch.randn((_SAMPLES, K), generator=random) * torch.exp2(powers_SK)).bfloat16()
    rows_S = torch.randint(0, N, (_SAMPLES,), generator=random)
    rows_S[0], rows_S[1] = 0, N - 1
    for x_K, row in zip(x_SK, rows_S.tolist(), strict=True):
        w_K = weight_NK[row].double()
        left = float(w_K @ x_K.double())
        for k in torch.randperm(K, generator=random)[:_CORRECTIONS].tolist():
            if w := float(w_K[k]):
                before = float(x_K[k])
                x_K[k] = before - left / w
                left += w * (float(x_K[k]) - before)
    return x_SK
