"""Rows times matrices on a CPU: a few by compiled kernels, many by the faster of torch's libraries.

A few rows in float32 are multiplied by our own kernels, which read a weight of 16 bits as it lies
(one row in 0.4 of oneDNN's time with a widened copy) and give a row the same bits in any company,
so sequences that come to a weight together are multiplied at once. Where there are no kernels, and
for more rows, the library is chosen by size.
In float32 `F.linear` goes to MKL, which uses one core for one row and no AVX-512 on AMD's CPUs.
oneDNN, which torch carries too, does both: on two cores of an EPYC one row takes 0.43 to 0.7 of the
time from 2**18 multiplications on, 512 rows 0.45, a training step's three products 0.5 to 0.6.
Below that a call costs 10 us more. What runs follows from shapes, dtypes and whether gradients are
wanted, so a model has the same bits resident and streamed.
In bfloat16 torch asks oneDNN by itself, which copies a weight's tiles in each product; the weights
of a model that is only run may be packed once instead, where a trial finds the same bits.
Not covered: float16 rows; second derivatives.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chronos.backends.torch import kernels
from chronos.common.experts.together import jointly
from chronos.common.tuning import plain
from chronos.kernels import MOST_ROWS

# Multiplications from which on oneDNN is worth its call, for one row, and the code that it makes
# for each new number of rows, in 0.4 ms; where the same numbers come again at each update, less is.
_WORTH_A_CALL, _WORTH_CODE, _WORTH_TRAINING = 1 << 18, 1 << 24, 1 << 21
# Numbers of a weight from which on a compiled kernel is: those of 16 bits would be widened.
_WORTH_A_KERNEL = {torch.bfloat16: 1 << 15, torch.float32: 1 << 18}
_WIDENED = 1 << 20  # numbers widened at once
_ROWS_TRIED = (1, 2, 3, 7, 16, 33, 64, 200, 512)
# Numbers of a weight. Fewer or one row: torch multiplies by itself, in an order of its own. More:
# trying them takes half a second and longer.
_LIBRARYS_OWN, _TRIED_AT_MOST = 1 << 12, 1 << 25
Product = Callable[[Tensor, Tensor], Tensor]  # rows [N, I] and a weight [O, I] to [N, O]
_NUMBERS = 65_537  # a prime: no two rows of a weight made of them begin alike


class Linear(nn.Linear):
    """`nn.Linear` without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x [..., I] times the transposed weight; one of fewer bits is widened to the dtype of x."""
    rows = x.numel() // x.size(-1)
    if rows <= MOST_ROWS and _by_kernel(x, weight_OI):
        if rows == 1:
            return jointly(id(weight_OI), x, partial(_in_company, weight_OI))
        return kernels.multiply_wide(x, weight_OI)
    multiplications = x.numel() * weight_OI.size(0)
    if (
        multiplications < _WORTH_A_CALL
        or x.dtype != torch.float32
        or not x.is_cpu
        or not _has_onednn()
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight_OI.to(x.dtype))
    if torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad):
        weight_OI = weight_OI.to(x.dtype)
        if rows == 1 or multiplications < _WORTH_TRAINING:
            return F.linear(x, weight_OI)
        y_NO: Tensor = _Linear.apply(_padded(x), weight_OI)  # type: ignore[no-untyped-call]
        return _unpadded(y_NO, x)
    if rows == 1:
        return _in_blocks(onednn_linear, x, weight_OI)
    if multiplications < _WORTH_CODE:
        return _in_blocks(F.linear, x, weight_OI)
    return _unpadded(_in_blocks(onednn_linear, _padded(x), weight_OI), x)


def linear_rows(weight_OI: Tensor, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """`linear` of one row [..., I] of each of several sequences, which has the bits it has alone:
    at once, if that is so."""
    if _by_kernel(rows[0], weight_OI):
        return _in_company(weight_OI, rows)
    return [linear(x, weight_OI) for x in rows]


def _in_company(weight_OI: Tensor, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    return kernels.in_company(lambda x: kernels.multiply_wide(x, weight_OI), rows)


def _by_kernel(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether a few rows are multiplied by the compiled kernels."""
    return (
        weight_OI.numel() >= _WORTH_A_KERNEL.get(weight_OI.dtype, sys.maxsize)
        and x.dtype == torch.float32
        and kernels.multiplies_wide()
        and x.is_cpu
        and not (torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad))
        and weight_OI.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def _in_blocks(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight_OI: Tensor) -> Tensor:
    """Widened where it has to be, in blocks that stay in a cache: all of a head of 150,000 x 2,048
    would take 1.2 GB more."""
    if weight_OI.dtype == x.dtype:
        return product(x, weight_OI)
    if weight_OI.numel() <= _WIDENED:
        return product(x, _widened(weight_OI))
    rows = max(1, _WIDENED // weight_OI.size(1))
    blocks = weight_OI.chunk(-(-weight_OI.size(0) // rows))
    return torch.cat([product(x, _widened(block)) for block in blocks], dim=-1)


def _padded(x: Tensor) -> Tensor:
    """As rows [N, I], with rows of zeros up to a `_round` number."""
    rows = x.numel() // x.size(-1)
    missing = _round(rows) - rows
    x_NI = x.reshape(rows, -1)
    return F.pad(x_NI, (0, 0, 0, missing)) if missing else x_NI


def _round(rows: int) -> int:
    """The next number of four leading bits: experts get another number of rows at each step, and
    there are few such numbers."""
    return rows + -rows % (1 << max(0, rows.bit_length() - 4))


def _unpadded(y_NO: Tensor, x: Tensor) -> Tensor:
    rows = x.numel() // x.size(-1)
    return (y_NO[:rows] if len(y_NO) > rows else y_NO).view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """Rows [N, I] to [N, O]. Transposed views go in as they are: oneDNN packs what it takes as the
    weight anyway, which for a gradient of a weight is best the larger of the two (1.8 times as fast
    for a head)."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return onednn_linear(x_NI, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        dx_NI = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx_NI = onednn_linear(dy_NO, weight_OI.t())
        if ctx.needs_input_grad[1]:
            dweight_OI = _by_weight(x_NI, dy_NO, onednn_linear)
        return dx_NI, dweight_OI


def _by_weight(x_NI: Tensor, dy_NO: Tensor, product: Product) -> Tensor:
    """The gradient of a product by its weight [O, I]."""
    if dy_NO.size(1) > x_NI.size(1):
        return product(x_NI.t(), dy_NO.t()).t().contiguous()
    return product(dy_NO.t(), x_NI.t())


def trains_experts(x_TD: Tensor, weight: Tensor) -> bool:
    """Whether `routed_experts` computes with these: with a gradient by the weights, unless products
    are made in another precision."""
    wanted = x_TD.is_cpu and torch.is_grad_enabled() and weight.requires_grad
    autocast = hasattr(torch, "get_autocast_dtype") and torch.is_autocast_enabled("cpu")
    return wanted and x_TD.dtype == weight.dtype == torch.float32 and not autocast


def routed_experts(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """The weighted sum [T, D] of SwiGLU experts in float32 on a CPU, to be differentiated by all
    but the ids.

    experts: gate_up [2F, D] and down [D, F] of each. Each is computed while its rows are in a
    cache, in the backward pass too, and what comes to a token is summed in the order of its
    routing.
    """
    flat = [matrix for expert in experts for matrix in expert]
    out: Tensor = _Experts.apply(x_TD, ids_TK, weights_TK, *flat)  # type: ignore[no-untyped-call]
    return out


class _Experts(torch.autograd.Function):
    """Autograd over the same calls goes through memory some thirty times for each routed row."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *matrices: Tensor
    ) -> Tensor:
        places_TK, pairs_M, sizes = _places(ids_TK, len(matrices) // 2)
        rows = (pairs_M // ids_TK.size(1)).split(sizes)
        x_SD = _with_zeros(x_TD)
        before, y = list[Tensor](), list[Tensor]()
        for rows_m, up_GD, down_DF in zip(rows, matrices[::2], matrices[1::2], strict=True):
            if len(rows_m):
                before.append(_product(x_SD.index_select(0, rows_m), up_GD))
                gate_mF, up_mF = before[-1].chunk(2, dim=-1)
                y.append(_product(F.silu(gate_mF).mul_(up_mF), down_DF))
        ctx.sizes = sizes
        ctx.save_for_backward(x_TD, weights_TK, places_TK, pairs_M, *matrices, *before)
        y_MD = torch.cat(y)
        return F.embedding_bag(places_TK, y_MD, per_sample_weights=weights_TK, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, places_TK, pairs_M, *saved = ctx.saved_tensors
        matrices, before = saved[: 2 * len(ctx.sizes)], iter(saved[2 * len(ctx.sizes) :])
        rows = (pairs_M // weights_TK.size(1)).split(ctx.sizes)
        weights = F.pad(weights_TK.flatten(), (0, 1))[pairs_M, None].split(ctx.sizes)
        x_SD, dy_SD = _with_zeros(x_TD), _with_zeros(dy_TD)
        dx, dweights, found = list[Tensor](), list[Tensor](), list[Tensor | None]()
        for rows_m, weights_m1, up_GD, down_DF in zip(
            rows, weights, matrices[::2], matrices[1::2], strict=True
        ):
            if not len(rows_m):
                found += [None, None]
                continue
            dy_mD, before_mG = dy_SD.index_select(0, rows_m), next(before)
            gate_mF, up_mF = before_mG.chunk(2, dim=-1)
            silu_mF = F.silu(gate_mF)
            h_mF, dh_mF = silu_mF * up_mF, _product(dy_mD, down_DF.t())
            # dy y = dy (down h) = (dy down) h: the outputs need not be kept.
            dweights.append((dh_mF * h_mF).sum(-1))
            h_mF *= weights_m1
            dh_mF *= weights_m1
            dbefore_mG = torch.empty_like(before_mG)
            dgate_mF, dup_mF = dbefore_mG.chunk(2, dim=-1)
            torch.mul(dh_mF, silu_mF, out=dup_mF)
            torch.ops.aten.silu_backward(dh_mF.mul_(up_mF), gate_mF, grad_input=dgate_mF)
            dx.append(_product(dbefore_mG, up_GD.t()))
            found.append(_by_weight(x_SD.index_select(0, rows_m), dbefore_mG, _product))
            found.append(_by_weight(h_mF, dy_mD, _product))
        dx_TD = F.embedding_bag(places_TK, torch.cat(dx), mode="sum")
        return dx_TD, None, torch.cat(dweights)[places_TK], *found


def _places(ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Where each routed pair lies [T, K], the pair t * K + k at each place [M], T * K where there
    is none, and how many places each expert has."""
    flat_N, every_N = ids_TK.flatten(), torch.arange(ids_TK.numel())
    counts_E = flat_N.bincount(minlength=experts)
    sizes = [_round(count) for count in counts_E.tolist()]
    spare_E = torch.tensor(sizes) - counts_E
    order_N = flat_N.argsort(stable=True)
    at_N = every_N + (spare_E.cumsum(0) - spare_E).repeat_interleave(counts_E)
    places_N, pairs_M = torch.empty_like(at_N), at_N.new_full((sum(sizes),), len(at_N))
    places_N[order_N], pairs_M[at_N] = at_N, order_N
    return places_N.view_as(ids_TK), pairs_M, sizes


def _with_zeros(x_TD: Tensor) -> Tensor:
    """And a row of zeros, for places that are nobody's."""
    return F.pad(x_TD, (0, 0, 0, 1))


def _product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """By oneDNN where it is worth its code in training."""
    large = x_NI.numel() * weight_OI.size(0) >= _WORTH_TRAINING
    return (onednn_linear if large and _has_onednn() else F.linear)(x_NI, weight_OI)


class PackedLinear(nn.Linear):
    """A layer in bfloat16 whose weight lies as oneDNN reads it: each product copies its tiles
    otherwise, which makes 45 GB/s into 28 (one row, 2,048 x 2,048, two cores of an EPYC). It is
    only run: its weight is no parameter, is not saved and does not move to another device."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self._held = linear.bias, packed(linear.weight.detach())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """As it was. A layer whose weight somebody reads is a plain one from then on: unpacking it
        again and again (Jamba, at each token) would cost more than products gain."""
        if self._held.is_mkldnn:
            self._held = self._held.to_dense()
        return self._held

    def forward(self, x: Tensor) -> Tensor:
        held = self._held  # once: another thread may be reading the weight
        if torch.is_grad_enabled() and x.requires_grad:  # a packed product has no gradient
            held = self.weight
        product = _packed_linear if held.is_mkldnn else F.linear
        return product(x, held, self.bias)


def pack_linears(model: nn.Module) -> None:
    """Pack the linear layers of a model that is only run, one by one, where that keeps their bits;
    not a head that is the embedding too, nor large ones."""
    held = Counter(map(id, (p for _, p in model.named_parameters(remove_duplicate=False))))
    places = [
        (parent, name)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and held[id(layer.weight)] == 1
    ]
    for parent, name in places:  # no list of layers: each is freed as it is packed
        layer = getattr(parent, name)
        if packs(layer.weight, layer.bias):
            setattr(parent, name, PackedLinear(layer))


def packs(weight: Tensor, bias_O: Tensor | None = None, *, transposed: bool = False) -> bool:
    """Whether products with this weight packed exist here and have the bits of the others.

    weight: [O, I] as `F.linear` takes it; transposed: [I, O], and rows are multiplied by `@`.
    """
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    if bias_O is not None and bias_O.dtype != torch.bfloat16:
        return False
    rows, columns = weight.t().shape if transposed else weight.shape
    if rows == 1 or not _LIBRARYS_OWN < rows * columns <= _TRIED_AT_MOST:
        return False
    return _packs(rows, columns, bias_O is not None, transposed)


@cache
def _packs(rows: int, columns: int, bias: bool, transposed: bool) -> bool:
    """Tried: products of rows * columns with few, some and many tokens."""
    if not _onednn_enabled():
        return False
    try:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported and _same_bits(rows, columns, bias, transposed)
    except (AttributeError, RuntimeError):  # the calls are not public
        return False


def _same_bits(rows: int, columns: int, bias: bool, transposed: bool) -> bool:
    """Of one shape, as `_packs` asks."""
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(_NUMBERS, generator=random).bfloat16()
    weight_OI = torch.empty((rows, columns), dtype=torch.bfloat16)
    for piece in weight_OI.view(-1).split(_NUMBERS):
        piece.copy_(numbers[: len(piece)])
    # Half of the terms of a sum undo the others: what is left is its rounding, and shows any other
    # order. Of sums of random numbers one in 10,000 and fewer shows it.
    one, other = torch.randperm(columns, generator=random)[: columns // 2 * 2].view(2, -1)
    weight_OI[:, other] = -weight_OI[:, one]
    bias_O = torch.randn(rows, generator=random).mul_(1e-6).bfloat16() if bias else None
    ready = packed(weight_OI)
    plain = weight_OI.t().contiguous() if transposed else weight_OI
    for tokens in _ROWS_TRIED:
        x_1TI = torch.randn((1, tokens, columns + 1), generator=random).bfloat16()
        x_1TI[..., other] = x_1TI[..., one]
        view_1TI = x_1TI[..., :columns]
        for x in [view_1TI[0].contiguous(), view_1TI] if bias else [view_1TI[0].contiguous()]:
            y = x @ plain if transposed else F.linear(x, plain, bias_O)
            if not torch.equal(_packed_linear(x, ready, bias_O), y):
                return False
    return True


def _packed_linear(x: Tensor, packed_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`F.linear` with a packed weight: where it adds the bias to rounded products, so does this."""
    if bias_O is None or x.dim() == 2 or x.is_contiguous():
        return onednn_linear(x, packed_OI, bias_O)
    return onednn_linear(x, packed_OI).add_(bias_O)


def packed(weight_OI: Tensor) -> Tensor:
    """A weight in bfloat16 as oneDNN's products read it; `to_dense` gives it back. A transposed one
    is copied first, which oneDNN would do more slowly (0.6 ms beside 2 for 512 x 1,536)."""
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), 1)
    return out


def onednn_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The product by oneDNN; the weight may be `packed`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight_OI, bias_O, "none", [], "")
    return out


def _onednn_enabled() -> bool:
    """CHRONOS_PLAIN counts as of the first product of a process."""
    if plain():
        return False
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


@cache
def _has_onednn() -> bool:
    """On x86 only: elsewhere torch has other libraries. Tried once, as the call is not public;
    before 2.4 torch knows no device of autocast."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    if not _onednn_enabled():
        return False
    x, weight = torch.ones(1, 8), torch.ones(8, 8)
    try:
        torch.is_autocast_enabled("cpu")
        return torch.equal(onednn_linear(x, weight), F.linear(x, weight))
    except (AttributeError, RuntimeError, TypeError):
        return False


class _Scratch(threading.local):
    """One thread's memory for a widened weight: fresh memory costs page faults, three times the
    time of widening."""

    def __init__(self) -> None:
        self.flat = torch.empty(0)
        self.by_shape: dict[torch.Size, Tensor] = {}

    def take(self, shape: torch.Size) -> Tensor:
        """float32 of that shape, valid until the next call."""
        found = self.by_shape.get(shape)
        if found is None:
            if shape.numel() > len(self.flat):
                self.by_shape.clear()
                with torch.inference_mode(False):  # else no use outside of that mode
                    self.flat = torch.empty(max(_WIDENED, shape.numel()))
            found = self.by_shape[shape] = self.flat[: shape.numel()].view(shape)
        return found


_scratch = _Scratch()


def _widened(weight_OI: Tensor) -> Tensor:
    """In float32, valid until this thread's next call."""
    return _scratch.take(weight_OI.shape).copy_(weight_OI)
