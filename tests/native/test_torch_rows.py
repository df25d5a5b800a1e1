"""Rows of several sequences times one weight: each has the bits it has alone, in any company."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from chronos import kernels as native  # noqa: E402
from chronos.backends.torch import kernels, products  # noqa: E402
from chronos.common.experts.together import together  # noqa: E402
from chronos.common.layout import open_layout, pack  # noqa: E402
from chronos.common.text.sampling import SamplingParams, Work  # noqa: E402
from chronos.kernels import library  # noqa: E402
from chronos.run.engine import load  # noqa: E402
from chronos.testing.tiny import CONFIG, tiny_model  # noqa: E402
from tests.support import company  # noqa: E402

compiled = pytest.mark.skipif(
    not native.wide(), reason="no kernels: not compiled, or a CPU without vectors they are for"
)
GREEDY = SamplingParams()
# Multiples of what is computed at once, one more and one less, and less than one vector.
SHAPES = [(32, 64), (96, 1024), (33, 288), (31, 17), (100, 1001), (7, 3), (1, 5)]
PROMPTS = [[5], [80, 41, 7], [3, 1, 4, 1, 5, 9, 2, 6], [12, 13]]


def drawn(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fresh() -> Iterator[None]:
    """Whether there are kernels is found out anew, in the test and behind it."""
    kernels.multiplies_wide.cache_clear()
    yield
    kernels.multiplies_wide.cache_clear()


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights are computed as large ones are."""
    worth = dict.fromkeys(products._WORTH_A_KERNEL, 1)
    monkeypatch.setattr(products, "_WORTH_A_KERNEL", worth)


@compiled
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N,K", SHAPES)
def test_a_row_has_its_bits_in_any_company(N: int, K: int, dtype: Any, threads: int) -> None:
    weight, x = drawn(N, K).to(dtype), drawn(native.MOST_ROWS, K, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = torch.cat([kernels.multiply_wide(row, weight) for row in x.split(1)])
        for count in range(1, len(x) + 1):
            for first in range(len(x) - count + 1):
                found = kernels.multiply_wide(x[first : first + count], weight)
                assert torch.equal(found, alone[first : first + count])
        some = [*x.split(1), *x.flip(0).view(len(x), 1, 1, K)]  # more than one call takes
        found = kernels.in_company(lambda x: kernels.multiply_wide(x, weight), some)
        for row, y in zip(some, found, strict=True):
            assert torch.equal(y, kernels.multiply_wide(row, weight))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(alone.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


@compiled
@pytest.mark.parametrize("special", [1e-39, torch.inf, torch.nan, 3e38, -0.0])
def test_numbers_that_are_none_and_tiny_ones(special: float) -> None:
    weight, x = drawn(40, 70).bfloat16(), drawn(1, 70, seed=1)
    x[0, 3::31] = special
    found, expected = kernels.multiply_wide(x, weight), F.linear(x, weight.float())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@compiled
def test_forwards_that_come_to_a_weight_multiply_at_once(
    monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    """In the order of their rows, whatever each computes in between."""
    weight, other = drawn(300, 256).bfloat16(), drawn(256, 300, seed=3).bfloat16()
    rows = drawn(5, 256, seed=2).split(1)
    calls: list[int] = []
    real = native.multiply_wide

    def counted(matrix: Any, x: int, y: int, count: int, *rest: Any) -> None:
        calls.append(count)
        real(matrix, x, y, count, *rest)

    def forward(row: Any) -> Any:
        return products.linear(products.linear(row[None], weight).tanh(), other)

    with torch.inference_mode():
        expected = [forward(row) for row in rows]
        monkeypatch.setattr(native, "multiply_wide", counted)
        found = together(None, [lambda _, row=row: forward(row) for row in rows])
    assert calls == [5, 5]
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    pack(tiny_model(folder / "model", dtype="bfloat16"), folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("kernel", ["on", "off"])
@pytest.mark.parametrize("budget", ["resident", "all", "25%", CONFIG.num_experts_per_tok])
def test_logits_of_company_are_those_of_each_alone(
    folder: Path,
    budget: str | int,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
    fresh: None,
    every_size: None,
) -> None:
    """At every budget those of the resident model that has one sequence."""
    monkeypatch.setenv("CHRONOS_KERNEL", kernel)
    if isinstance(budget, int):
        budget *= open_layout(folder).record_nbytes
    tokens = [9, 8, 7, 6]
    with load(folder, backend="torch", budget="resident") as engine:
        expected = [company.alone(engine.session, prompt, tokens) for prompt in PROMPTS]
    with load(folder, backend="torch", budget=budget) as engine:
        for found, alone in zip(
            company.together(engine.session, PROMPTS, tokens), expected, strict=True
        ):
            np.testing.assert_array_equal(found, alone)
    assert kernels.multiplies_wide() == (kernel == "on" and native.wide())


@compiled
@pytest.mark.parametrize("budget", ["resident", "all"])
def test_company_takes_each_weight_once(
    folder: Path, budget: str, monkeypatch: pytest.MonkeyPatch, fresh: None, every_size: None
) -> None:
    """Four times the same sequence need as many products as one."""
    calls, real = [0], native.multiply_wide

    def counted(*args: Any) -> None:
        calls[0] += 1
        real(*args)

    with load(folder, backend="torch", budget=budget) as engine:
        session, found = engine.session, []
        for seq in range(4):
            session.run([Work(seq, [5, 6], GREEDY, prompt=2)])
        monkeypatch.setattr(native, "multiply_wide", counted)
        for seqs in ([0], [1, 2, 3]):
            session.run([Work(seq, [9], GREEDY) for seq in seqs])
            found.append(calls[0])
    assert found[0] > 10 and found[1] == 2 * found[0]


@compiled
@pytest.mark.parametrize("wrong", ["order", "company"])
def test_a_wrong_kernel_is_found_and_not_used(
    wrong: str, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    real = kernels.multiply_wide

    def other(x: Any, weight: Any) -> Any:
        if wrong == "order":  # of rows
            return real(x, weight).flip(-1)
        return F.linear(x, weight.float()) if len(x) > 1 else real(x, weight)  # of sums

    monkeypatch.setattr(kernels, "multiply_wide", other)
    assert not kernels.multiplies_wide()
    x, weight = drawn(1, 1024), drawn(700, 1024).bfloat16()
    with torch.inference_mode():
        found, expected = products.linear(x, weight), F.linear(x, weight.float())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_without_them_products_are_the_librarys(
    monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    monkeypatch.setattr(library, "EXTENSION_SUFFIXES", [])
    library._library.cache_clear()
    x, weight = drawn(1, 1024), drawn(700, 1024)
    try:
        assert not kernels.multiplies_wide()
        with torch.inference_mode():
            found, expected = products.linear(x, weight), F.linear(x, weight)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    finally:
        library._library.cache_clear()
