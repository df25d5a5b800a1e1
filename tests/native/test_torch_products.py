"""Products of the torch backend: those of `F.linear`, whichever library computes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from chronos.backends.torch import kernels, products  # noqa: E402

SHAPES = [(1, 8, 16), (1, 512, 768), (3, 700, 400), (64, 300, 520)]  # rows, out, in
onednn = pytest.mark.skipif(not products._has_onednn(), reason="torch has no oneDNN here")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows,out,width", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widened_at_once", [1, 1000, 1 << 20])
@pytest.mark.parametrize("worth_code", [0, 1 << 40])
def test_without_gradients(monkeypatch, rows, out, width, dtype, widened_at_once, worth_code):
    monkeypatch.setattr(kernels, "multiplies_wide", lambda: False)
    monkeypatch.setattr(products, "_WORTH_A_CALL", 0)
    monkeypatch.setattr(products, "_WORTH_CODE", worth_code)
    monkeypatch.setattr(products, "_WIDENED", widened_at_once)
    monkeypatch.setattr(products, "_scratch", products._Scratch())
    x, weight = drawn(rows, width), drawn(out, width, seed=1).to(dtype)
    with torch.inference_mode():
        y = products.linear(x, weight)
        again = products.linear(x[None, :, None], weight)
    expected = x.double() @ weight.double().T
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(again[0, :, 0], y)
    with torch.no_grad():  # memory taken in one mode serves the other
        assert torch.equal(products.linear(x, weight), y)


@pytest.mark.parametrize("threshold", [0, 1 << 18])  # widened into the scratch, and beside it
def test_one_number_of_each_byte_pattern_is_widened(monkeypatch, threshold):
    monkeypatch.setattr(products, "_WORTH_A_CALL", threshold)
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    weight = torch.where(weight.float().isnan(), torch.zeros(()), weight.float()).to(weight.dtype)
    x = torch.eye(16)
    with torch.no_grad():
        assert torch.equal(products.linear(x, weight), weight.float().T)


@pytest.mark.parametrize("rows,out,width", SHAPES)
def test_gradients(monkeypatch, rows, out, width):
    for threshold in ("_WORTH_A_CALL", "_WORTH_TRAINING"):
        monkeypatch.setattr(products, threshold, 0)
    results = []
    for product in (F.linear, products.linear):
        x = drawn(rows, width).requires_grad_()
        weight = drawn(out, width, seed=1).requires_grad_()
        y = product(x.view(1, rows, width), weight)
        (y * drawn(1, rows, out, seed=2)).sum().backward()
        results.append((y.detach(), x.grad, weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threshold", [0, 1 << 40])  # by either library
def test_routed_experts_are_the_sum_of_their_outputs(monkeypatch, threshold):
    """Value and every gradient; one expert has no rows, one all of them, one a single row."""
    monkeypatch.setattr(products, "_WORTH_TRAINING", threshold)
    T, D, F_, E = 37, 12, 10, 5
    ids_TK = torch.stack((torch.full((T,), 2), torch.arange(T) % 2 * 4), dim=-1)
    ids_TK[5, 1] = 3  # 1 is nobody's
    weights_TK = drawn(T, 2, seed=1).softmax(-1).requires_grad_()
    x_TD = drawn(T, D).requires_grad_()
    experts = [
        (drawn(2 * F_, D, seed=2 + e).requires_grad_(), drawn(D, F_, seed=9 + e).requires_grad_())
        for e in range(E)
    ]

    def one_by_one() -> torch.Tensor:
        total_TD = torch.zeros(T, D)
        for e, (up_GD, down_DF) in enumerate(experts):
            gate_TF, up_TF = F.linear(x_TD, up_GD).chunk(2, -1)
            share_T1 = ((ids_TK == e) * weights_TK).sum(-1, keepdim=True)
            total_TD = total_TD + share_T1 * F.linear(F.silu(gate_TF) * up_TF, down_DF)
        return total_TD

    leaves = [x_TD, weights_TK, *(matrix for expert in experts for matrix in expert)]
    results = []
    for y_TD in (one_by_one(), products.routed_experts(x_TD, ids_TK, weights_TK, experts)):
        grads = torch.autograd.grad(y_TD, leaves, drawn(T, D, seed=99), allow_unused=True)
        results.append((y_TD, *grads))
    for at, (one, other) in enumerate(zip(*results, strict=True)):
        if at in (5, 6):  # those of the expert without rows
            assert other is None and not one.any()
        else:
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_a_result_may_be_changed_in_place_and_has_no_second_derivative(monkeypatch):
    x, weight = drawn(40, 1024).requires_grad_(), drawn(700, 1024).requires_grad_()
    y = products.linear(x, weight)
    y.add_(1)
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=products._has_onednn())
    if products._has_onednn():
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (dx**2).sum().backward()


def test_without_a_wish_for_gradients_there_is_no_graph_and_the_same_bits():
    x, weight = drawn(1, 1024), drawn(700, 1024).bfloat16()
    with torch.inference_mode():
        expected = products.linear(x, weight)
    found = products.linear(x, weight)
    assert not found.requires_grad
    assert torch.equal(found, expected)


def test_autocast_decides_itself():
    x, weight = drawn(40, 1024), drawn(700, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16


def test_a_weight_of_16_bits_has_a_gradient_too():
    weight = drawn(300, 520).bfloat16().requires_grad_()
    products.linear(drawn(200, 520, seed=1), weight).sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.abs().sum() > 0


@onednn
def test_the_size_decides_which_library_computes(monkeypatch):
    monkeypatch.setattr(kernels, "multiplies_wide", lambda: False)
    calls = []
    real = products.onednn_linear
    monkeypatch.setattr(
        products, "onednn_linear", lambda x, weight: calls.append(1) or real(x, weight)
    )
    with torch.no_grad():
        products.linear(drawn(1, 64), drawn(64, 64))
        assert not calls
        products.linear(drawn(1, 1024), drawn(512, 1024))
        products.linear(drawn(1, 1024), drawn(512, 1024).bfloat16())
        assert len(calls) == 2
    products.linear(drawn(1, 1024), drawn(512, 1024).requires_grad_())
    assert len(calls) == 2
    products.linear(drawn(64, 1024), drawn(512, 1024).requires_grad_()).sum().backward()
    assert len(calls) == 4  # x wants no gradient


def test_without_onednn_products_are_those_of_torch(monkeypatch):
    monkeypatch.setattr(kernels, "multiplies_wide", lambda: False)
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    x, weight = drawn(2, 1024), drawn(512, 1024, seed=1)
    with torch.no_grad():
        assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))


def test_threads_do_not_share_what_they_widen_into(monkeypatch):
    monkeypatch.setattr(kernels, "multiplies_wide", lambda: False)
    weights = [drawn(400, 800, seed=n).bfloat16() for n in range(4)]
    x = drawn(1, 800, seed=9)

    def many(weight: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return [products.linear(x, weight) for _ in range(50)]

    with torch.no_grad():
        expected = [products.linear(x, weight) for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        for found, want in zip(pool.map(many, weights), expected, strict=True):
            assert all(torch.equal(y, want) for y in found)


packing = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bfloat16 here",
)


def linear_layer(out: int, width: int, bias: bool = False) -> torch.nn.Linear:
    layer = torch.nn.Linear(width, out, bias=bias, dtype=torch.bfloat16)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed))
    return layer.requires_grad_(False)


def compare_packed(bias, rows, out, width):
    model = torch.nn.Sequential(linear_layer(out, width, bias))
    plain, x = model[0], drawn(2, rows, 2, width + 3, seed=7).bfloat16()
    # Terms that undo each other leave a sum's rounding, which shows its order.
    plain.weight[:, 1::2] = -plain.weight[:, : width // 2 * 2 : 2]
    x[..., 1::2] = x[..., : (width + 3) // 2 * 2 : 2]
    whole = x[..., :width].contiguous()
    rows_of = [whole, whole[0], whole[0, :, 0], whole[:, :, 0], whole.mT.contiguous().mT]
    rows_of += [
        x[..., 1 : width + 1],
        x[0, :, :, :width].transpose(0, 1),
        whole[:1].expand(3, -1, -1, -1),
    ]
    if rows:
        rows_of += [whole[0, 0, 0], x[0, 0, 0, 3:], whole.mT.contiguous().mT[0, 0, 0]]
    expected = [plain(x) for x in rows_of]
    if not products.packs(plain.weight, plain.bias):
        pytest.skip("packed products have other bits on this CPU, so nothing is packed")
    products.pack_linears(model)
    assert isinstance(model[0], products.PackedLinear)
    assert all(torch.equal(model(x), y) for x, y in zip(rows_of, expected, strict=True))
    assert torch.equal(model[0].weight, plain.weight)
    assert sum(p.numel() for p in model.parameters()) == out * bias


@packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 64, 300])
@pytest.mark.parametrize("out,width", [(64, 65), (70, 101), (3, 2000), (700, 400), (1536, 512)])
def test_a_packed_layer_has_the_bits_of_a_plain_one(bias, rows, out, width):
    compare_packed(bias, rows, out, width)


@packing
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_packed_layer_has_them_on_two_threads_too(two_threads, rows):
    compare_packed(True, rows, 704, 416)  # a shape that no other test tries


@packing
def test_some_layers_are_packed_where_onednn_multiplies_bfloat16():
    assert any(products.packs(linear_layer(n, n).weight) for n in (96, 256, 512))


@packing
@pytest.mark.parametrize("out,width", [(1, 2048), (1, 70_000), (64, 64), (8, 512)])
def test_products_that_torch_computes_by_itself_stay(out, width):
    """It sums in an order of its own there: 9 of 40,000 results of 1 x 2,048 differ."""
    model = torch.nn.Sequential(torch.nn.Linear(width, out, dtype=torch.bfloat16))
    products.pack_linears(model)
    assert type(model[0]) is torch.nn.Linear


@packing
def test_a_trial_tells_another_order_of_a_sum(monkeypatch):
    monkeypatch.setattr(products, "_LIBRARYS_OWN", 0)
    assert not products._same_bits(1, 2048, False, False)
    assert not products._same_bits(64, 64, False, False)
    assert not products._same_bits(64, 64, False, True)


@packing
def test_a_packed_layer_whose_weight_is_read_is_a_plain_one():
    layer = linear_layer(96, 128, bias=True)
    packed, x = products.PackedLinear(layer), drawn(3, 128).bfloat16()
    assert packed.weight is packed.weight
    assert torch.equal(packed.weight, layer.weight)
    assert not packed._held.is_mkldnn
    assert torch.equal(packed(x), layer(x))


@onednn
def test_a_plain_run_has_torchs_own_products(monkeypatch):
    monkeypatch.setenv("CHRONOS_PLAIN", "1")
    monkeypatch.setattr(products, "onednn_linear", None)  # whoever calls it fails
    caches = products._has_onednn, products._packs, kernels.multiplies_wide
    for cached in caches:
        cached.cache_clear()
    x, weight = drawn(1, 1024), drawn(1024, 1024, seed=1)
    model = torch.nn.Sequential(linear_layer(96, 80))
    products.pack_linears(model)
    with torch.no_grad():
        same = torch.equal(products.linear(x, weight), F.linear(x, weight))
    for cached in caches:
        cached.cache_clear()
    assert same and type(model[0]) is torch.nn.Linear


@packing
def test_a_trial_that_fails_packs_nothing(monkeypatch):
    def fail(*_):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(products, "packed", fail)
    model = torch.nn.Sequential(linear_layer(97, 80))  # a shape that no other test tries
    products.pack_linears(model)
    products._packs.cache_clear()
    assert type(model[0]) is torch.nn.Linear


@packing
def test_layers_that_cannot_be_packed_stay(monkeypatch):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(96, 80, dtype=torch.bfloat16)
            self.head = torch.nn.Linear(80, 96, bias=False, dtype=torch.bfloat16)
            self.head.weight = self.embed.weight
            self.wide = torch.nn.Linear(80, 96, bias=False)
            self.large = linear_layer(300, 200)
            self.bias = linear_layer(96, 80, bias=True)
            self.bias.bias.data = self.bias.bias.float()

    monkeypatch.setattr(products, "_TRIED_AT_MOST", 50_000)
    model = Tied()
    products.pack_linears(model)
    assert not any(isinstance(m, products.PackedLinear) for m in model.modules())


@packing
def test_nothing_is_packed_where_that_changes_a_bit(monkeypatch):
    real = products.onednn_linear

    def off_by_a_bit(x, weight, bias=None):
        y = real(x, weight, bias)
        return y if len(x) < 200 else y.view(torch.int16).bitwise_xor(1).view(y.dtype)

    monkeypatch.setattr(products, "onednn_linear", off_by_a_bit)
    model = torch.nn.Sequential(linear_layer(96, 80))  # a shape that no other test tries
    products.pack_linears(model)
    products._packs.cache_clear()
    assert type(model[0]) is torch.nn.Linear
