"""Compiled products on torch: the bits of the library's product of the dequantised matrix."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ctypes import CFUNCTYPE, Structure, byref, c_int64, c_void_p
from functools import cache
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from chronos import kernels as native  # noqa: E402
from chronos.backends.torch import codecs, kernels  # noqa: E402
from chronos.backends.torch.quantised import by_torch, dequantised  # noqa: E402
from chronos.common.layout.quantised import split  # noqa: E402
from chronos.kernels import library  # noqa: E402

compiled = pytest.mark.skipif(
    not native.available(), reason="no kernels: not compiled, or none for this CPU"
)
orders = pytest.mark.parametrize("order", native.ORDERS)
SHAPES = [(96, 2048), (576, 192), (192, 576), (100, 1056), (33, 288)]
FORMATS = {
    "mxfp4": "mxfp4", "fp8": "fp8-128x128", "fp8-bf16": "fp8-128x128", "fp8-e8m0": "fp8-32x64",
    "int4": "compressed-int4", "int4-zeros": "compressed-int4", "int4-f16": "compressed-int4",
    "int8": "compressed-int8", "channel": "compressed-fp8", "ct-mxfp8": "compressed-mxfp8",
    "ct-nvfp4": "compressed-nvfp4", "affine4": "mlx-affine4", "affine8": "mlx-affine8",
    "affine4-f16": "mlx-affine4", "mlx-mxfp4": "mlx-mxfp4", "mlx-nvfp4": "mlx-nvfp4",
    "mlx-mxfp8": "mlx-mxfp8", "affine4-own": "transformers-affine4-g32",
    "affine8-own": "transformers-affine8-g32", "v4": "fp4", "fp8-v4": "fp8-128x128",
    "fp8-mx": "fp8-1x32", "gptq4": "gptq-int4", "gptq8": "gptq-int8", "gptq4-v2": "gptq2-int4",
    "awq4": "awq-int4", "gptq4-bf16": "gptq-int4",
}  # fmt: skip
SPECIAL = ("scales", "weight_scale", "biases", "weight_scale_inv")
FLOATS = {"bf16": torch.bfloat16, "f16": torch.float16}


def empty(name: str, N: int, K: int) -> dict[str, Any]:
    """Tensors of the shapes and dtypes of a format, whose values are to be drawn."""

    def of(dtype: Any, *shape: int) -> Any:
        return torch.zeros(shape, dtype=dtype)

    word, _, variant = name.partition("-")
    if word in ("gptq4", "gptq8", "awq4"):
        each, N = 32 // int(word[-1]), -(-N // 8) * 8
        words = (K, N // each) if word == "awq4" else (K // each, N)
        scales = of(FLOATS.get(variant, torch.float16), K // 32, N)
        kinds = {"qweight": of(torch.int32, *words), "scales": scales}
        kinds["qzeros"] = of(torch.int32, K // 32, N // each)
        return kinds if word == "awq4" else kinds | {"g_idx": of(torch.int32, K)}
    real = FLOATS.get(variant, torch.bfloat16)
    if name == "mxfp4":
        return {"blocks": of(torch.uint8, N, K // 32, 16), "scales": of(torch.uint8, N, K // 32)}
    if word == "fp8":
        down, across = {"e8m0": (32, 64), "mx": (1, 32)}.get(variant, (128, 128))
        exponents = dict.fromkeys(("e8m0", "mx", "v4"), torch.uint8)
        dtype = (exponents | {"bf16": torch.bfloat16}).get(variant, torch.float32)
        scale = of(dtype, -(-N // down), -(-K // across))
        called = "scale" if variant == "v4" else "weight_scale_inv"
        return {"weight": of(torch.float8_e4m3fn, N, K), called: scale}
    if name == "v4":
        return {"weight": of(torch.int8, N, K // 2), "scale": of(torch.uint8, N, K // 32)}
    if word in ("int4", "int8"):
        bits = int(word[-1])
        kinds = {
            "weight_packed": of(torch.int32, N, K * bits // 32),
            "weight_scale": of(real, N, K // 32),
            "weight_shape": torch.tensor([N, K]),
        }
        if variant == "zeros":
            kinds["weight_zero_point"] = of(torch.int32, -(-N // 8), K // 32)
        return kinds
    if name == "channel":
        return {"weight": of(torch.float8_e4m3fn, N, K), "weight_scale": of(torch.float32, N, 1)}
    if name == "ct-mxfp8":
        return {
            "weight": of(torch.float8_e4m3fn, N, K),
            "weight_scale": of(torch.uint8, N, K // 32),
        }
    if name == "ct-nvfp4":
        return {
            "weight_packed": of(torch.uint8, N, K // 2),
            "weight_scale": of(torch.float8_e4m3fn, N, K // 16),
            "weight_global_scale": of(torch.float32, 1),
        }
    bits, group = (8 if "8" in name else 4), (16 if variant == "nvfp4" else 32)
    kinds = {"weight": of(torch.int32, N, K * bits // 32)}
    if word == "affine4" or word == "affine8":
        return kinds | {k: of(real, N, K // group) for k in ("scales", "biases")}
    return kinds | {"scales": of(torch.uint8, N, K // group)}


def matrix_of(name: str, N: int, K: int) -> tuple[str, dict[str, Any]]:
    drawn = kernels.random_like({f"m.{kind}": like for kind, like in empty(name, N, K).items()})
    return FORMATS[name], {split(name).kind: tensor for name, tensor in drawn.items()}


def product(x: Any, matrix: Any, kinds: Any, threads: int = 1, order: str = "") -> Any:
    if order:
        kernels.in_order(native.ORDERS.index(order), [matrix])
    y = x.new_empty((len(x), matrix.rows))
    call = [(matrix, x.data_ptr(), y.data_ptr())]
    native.multiply(call, len(x), threads, (kinds, x))
    return y


@contextmanager
def onednn_is(on: bool) -> Iterator[None]:
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, on
    yield
    torch.backends.mkldnn.enabled = before


def of_library(order: str, x: Any, weight: Any) -> Any:
    """What torch adds in that order: oneDNN, or where that is off ATen itself, rows that lie one
    behind the other or columns. Skips on CPUs without kernels for it."""
    if native.ORDERS.index(order) not in native.orders():
        pytest.skip(f"no kernels on this CPU that add by {order}")
    with onednn_is(order == "pairs"):
        return x @ weight.t().contiguous() if order == "fours" else F.linear(x, weight)


def alike(found: Any, expected: Any) -> bool:
    """The same bits; of what is no number, that it is none."""
    return bool(torch.all((found == expected) | (found.isnan() & expected.isnan())))


@compiled
@orders
@pytest.mark.parametrize("N,K", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_one_row_has_the_bits_of_the_dequantised_product(
    name: str, N: int, K: int, order: str
) -> None:
    encoding, kinds = matrix_of(name, N, K)
    matrix = kernels.describe(encoding, kinds)
    assert matrix is not None
    weight = by_torch(encoding, kinds, torch.bfloat16)
    rows = kernels.cancelling(weight)
    expected = torch.cat([of_library(order, x, weight) for x in rows.split(1)])
    if order not in added(N, K):
        pytest.skip("torch sums in another order here, so no kernel is used")
    found = torch.cat([product(x, matrix, kinds, order=order) for x in rows.split(1)])
    assert torch.equal(found, expected)
    for count in range(2, native.MOST_ROWS + 1):  # together they are what each is alone
        assert torch.equal(product(rows[:count], matrix, kinds, order=order), expected[:count])
        assert torch.equal(product(rows[:count], matrix, kinds, 3, order), expected[:count])


@cache
def added(N: int, K: int) -> list[str]:
    """The orders in which the library sums as kernels do, by a matrix that nobody quantised."""
    weight = torch.randn((N, K), generator=torch.Generator().manual_seed(2)).bfloat16()
    matrix = kernels.describe("bf16", {"weight": weight})
    return [
        order
        for n, order in enumerate(native.ORDERS)
        if n in native.orders()
        and all(
            torch.equal(of_library(order, x, weight), product(x, matrix, weight, order=order))
            for x in kernels.cancelling(weight).split(1)
        )
    ]


@compiled
@pytest.mark.parametrize("N,K", [(32, 64), (64, 128), (64, 1024)])
def test_the_trial_tells_orders_apart_by_weights_of_few_bits_too(N: int, K: int) -> None:
    encoding, kinds = matrix_of("mxfp4", N, K)
    matrix = kernels.describe(encoding, kinds)
    rows = kernels.cancelling(by_torch(encoding, kinds, torch.bfloat16))
    here = [native.ORDERS[n] for n in native.orders()]
    sums = [product(rows[:8], matrix, kinds, order=order) for order in here]
    for one, other in combinations(sums, 2):
        assert (one != other).any(1).sum() >= 4


@compiled
@pytest.mark.parametrize(
    "onednn,transposed,order",
    [(True, False, "pairs"), (True, True, "pairs"), (False, False, "dots"), (False, True, "fours")],
)
def test_the_trial_finds_the_order(onednn: bool, transposed: bool, order: str) -> None:
    if order not in added(96, 2048):
        pytest.skip(f"torch does not add by {order} here")
    with torch.inference_mode(), onednn_is(onednn):
        like = expert("mxfp4", 512, 256)
        codecs.Quantised().forward(torch.randn((1, 512)).bfloat16(), like, block(transposed))
    tried = {native.ORDERS[m.order] for product in like.matrices.values() for m in product}
    assert tried == {order}


class Kernels(Structure):
    """As in c/kernels.h."""

    _fields_ = [
        ("block", c_void_p * len(native.ORDERS)),
        ("wide", c_void_p),
        ("decode", CFUNCTYPE(None, c_void_p, c_int64, c_int64, c_void_p)),
    ]


@pytest.mark.skipif(not native.loaded(), reason="kernels were not compiled")
@pytest.mark.parametrize("N,K", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_dequantised_matrix_is_that_of_torch(name: str, N: int, K: int) -> None:
    encoding, kinds = matrix_of(name, N, K)
    for scale in (kind for kind in kinds if kind in SPECIAL):
        if kinds[scale].dtype == torch.uint8:  # powers of two from the least to the largest
            kinds[scale].view(-1)[:7] = torch.tensor([0, 1, 2, 7, 120, 250, 253])
        elif kinds[scale].itemsize > 1:  # down to denormal numbers, where rounding is another
            special = torch.tensor([1e-39, -3e-38, 6e-8, 0.0])
            kinds[scale].view(-1)[:4] = special[: kinds[scale].numel()]
        if kinds[scale].dtype == torch.float32:  # rounding must not make a number of it
            kinds[scale].view(torch.int32).view(-1)[-1:] = 0x7FFFFFFF
    expected = by_torch(encoding, kinds, torch.bfloat16)
    found = kernels.dequantised(encoding, kinds)
    assert found is not None and alike(found, expected)
    matrix, plainly = kernels.describe(encoding, kinds), torch.empty_like(found)
    sizes = [
        c_int64(n) for n in (0, len(expected), 0, K)
    ]  # what CPUs without kernels of their own run
    library._library().chronos_decode(
        byref(matrix), *sizes, c_void_p(plainly.data_ptr()), c_int64(K)
    )
    assert alike(plainly, expected)
    for cpu in ("avx2", "avx512", "neon"):  # of which one is chosen
        its = Kernels()
        getattr(library._library(), f"chronos_{cpu}")(byref(its))
        if its.decode:
            its.decode(byref(matrix), 0, len(expected), plainly.zero_().data_ptr())
            assert alike(plainly, expected)
    assert alike(dequantised(encoding, kinds, torch.bfloat16), expected)


@compiled
@orders
@pytest.mark.parametrize("special", ["denormal", "inf", "nan", "huge", "zero"])
@pytest.mark.parametrize("name", ["mxfp4", "fp8", "int4", "affine4", "affine8"])
def test_numbers_that_are_none_and_tiny_ones(name: str, special: str, order: str) -> None:
    encoding, kinds = matrix_of(name, 64, 1024)
    matrix = kernels.describe(encoding, kinds)
    weight = by_torch(encoding, kinds, torch.bfloat16)
    x = torch.randn((1, 1024), generator=torch.Generator().manual_seed(5)).bfloat16()
    value = {"denormal": 1e-39, "inf": torch.inf, "nan": torch.nan, "huge": 3e38, "zero": -0.0}
    x[0, 7::31] = value[special]
    expected = of_library(order, x, weight)
    assert alike(product(x, matrix, kinds, order=order), expected)


@compiled
@orders
@pytest.mark.parametrize("scale", [0, 1, 2, 3, 60, 200, 252, 253, 254, 255])
def test_scales_at_the_ends_of_their_range(scale: int, order: str) -> None:
    encoding, kinds = matrix_of("mxfp4", 48, 512)
    kinds["scales"][::2, 3:7] = scale
    weight = by_torch(encoding, kinds, torch.bfloat16)
    matrix = kernels.describe(encoding, kinds)
    x = torch.randn((1, 512), generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = of_library(order, x, weight)
    assert alike(product(x, matrix, kinds, order=order), expected)


def test_columns_in_the_order_of_activations_are_dequantised_by_torch() -> None:
    encoding, kinds = matrix_of("gptq4", 64, 128)
    assert kernels.describe(encoding, kinds) is not None
    expected = by_torch(encoding, kinds, torch.bfloat16)
    kinds["g_idx"] = kinds["g_idx"].flip(0).contiguous()
    assert kernels.describe(encoding, kinds) is None
    found = dequantised(encoding, kinds, torch.bfloat16)
    assert torch.equal(found, by_torch(encoding, kinds, torch.bfloat16))
    assert not torch.equal(found, expected)


@compiled
def test_every_code_of_eight_bits() -> None:
    codes = torch.arange(256).to(torch.uint8)
    codes = torch.where(codes & 127 == 127, 0, codes).to(torch.uint8).repeat(16, 2)
    scale = torch.tensor([[0.37, 2.0**-9, 11.0, 1.0]])
    kinds = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scale}
    weight = by_torch("fp8-128x128", kinds, torch.bfloat16)
    matrix = kernels.describe("fp8-128x128", kinds)
    columns = torch.eye(512, dtype=torch.bfloat16)
    found = torch.cat([product(column, matrix, kinds) for column in columns.split(8)])
    assert torch.equal(found, weight.T)


@compiled
def test_several_matrices_in_one_call_and_several_callers() -> None:
    made = [matrix_of(name, 320, 1024) for name in ("mxfp4", "fp8", "int4", "affine4")]
    matrices = [kernels.describe(*each) for each in made]
    x = torch.randn((1, 1024), generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torch.cat([product(x, m, k) for m, (_, k) in zip(matrices, made, strict=True)], 1)
    assert torch.equal(kernels.multiply(x, matrices, made), expected)

    def many(_: int) -> bool:  # more threads than cores: some are left behind
        calls = [(m, x.data_ptr(), y[:, i * 320 :].data_ptr()) for i, m in enumerate(matrices)]
        for _ in range(150):
            y.zero_()
            native.multiply(calls, 1, 6, (made, x))
            if not torch.equal(y, expected):
                return False
        return True

    y = torch.empty((1, 1280), dtype=torch.bfloat16)
    assert many(0)

    def caller(_: int) -> bool:
        return all(torch.equal(kernels.multiply(x, matrices, made), expected) for _ in range(60))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(caller, range(4)))


def expert(name: str, D: int, H: int) -> Any:
    """A quantised expert and the module around it; H: its width."""
    tensors: dict[str, Any] = {}
    for matrix, (N, K) in {"gate_proj": (H, D), "up_proj": (H, D), "down_proj": (D, H)}.items():
        _, kinds = matrix_of(name, N, K)
        tensors |= {f"{matrix}.{kind}": tensor for kind, tensor in kinds.items()}
    encodings = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), FORMATS[name])
    return codecs.Coded(tensors, None, encodings)


def block(transposed: bool = False) -> Any:
    def gate(up: Any) -> Any:
        half, other = up.chunk(2, dim=-1)
        return F.silu(half) * other

    return SimpleNamespace(
        is_transposed=transposed,
        is_concatenated=not transposed,
        has_bias=False,
        has_gate=True,
        has_post_expert_norm=False,
        _apply_gate=gate,
    )


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["mxfp4", "fp8", "int4-zeros", "affine4", "gptq4", "awq4"])
def test_an_expert_has_the_same_bits_with_and_without_them(
    name: str, transposed: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, x = codecs.Quantised(), torch.randn((1, 256)).bfloat16()
    with torch.inference_mode(), onednn_is(onednn):
        with_them = expert(name, 256, 192)
        found = codec.forward(x, with_them, block(transposed))
        monkeypatch.setenv("CHRONOS_KERNEL", "off")
        off = expert(name, 256, 192)
        expected = codec.forward(x, off, block(transposed))
        assert off.matrices is None
        monkeypatch.delenv("CHRONOS_KERNEL")
        library._library.cache_clear()
        monkeypatch.setattr(library, "EXTENSION_SUFFIXES", [])
        absent = expert(name, 256, 192)
        assert torch.equal(codec.forward(x, absent, block(transposed)), expected)
        assert absent.matrices is None
    library._library.cache_clear()
    assert torch.equal(found, expected)


@compiled
def test_a_wrong_order_of_summation_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns from behind: the same product, but for its rounding."""
    real, x = kernels.multiply, torch.randn((1, 512)).bfloat16()

    def from_behind(x_1K: Any, matrices: Any, owners: Any) -> Any:
        y = []
        for matrix in ("gate_proj", "up_proj") if len(matrices) == 2 else ("down_proj",):
            kinds = {split(n).kind: t for n, t in owners.items() if n.startswith(matrix)}
            y.append(F.linear(x_1K.flip(1), dequantised("mxfp4", kinds, x.dtype).flip(1)))
        return torch.cat(y, 1)

    with torch.inference_mode():
        right = expert("mxfp4", 512, 256)
        expected = codecs.Quantised().forward(x, right, block())
        monkeypatch.setattr(kernels, "multiply", from_behind)
        wrong = expert("mxfp4", 512, 256)
        assert torch.equal(codecs.Quantised().forward(x, wrong, block()), expected)
    assert wrong.matrices == {}
    assert kernels.multiply is not real


@compiled
def test_kernels_are_for_one_row_in_bfloat16_without_gradients() -> None:
    row = torch.zeros((1, 64), dtype=torch.bfloat16)
    with torch.no_grad():
        assert kernels.usable(row)
        assert not kernels.usable(row.float())
        assert not kernels.usable(row.expand(2, -1))
    assert not kernels.usable(row)
