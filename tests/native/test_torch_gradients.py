"""Gradients through experts of a store on torch: the same bits at every budget, and the resident
model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from chronos.backends import torch as backend
from chronos.backends.torch import moe
from chronos.backends.torch.guest import experts
from chronos.backends.torch.products import PackedLinear
from chronos.backends.torch.streamed import Streamed
from chronos.common.errors import UsageError
from chronos.common.experts.feed import FeedOptions, open_feed
from chronos.common.experts.passes import UpAndDown
from chronos.common.layout import open_layout, pack
from chronos.testing.tiny import tiny_packed
from tests.support.guests import ARCHITECTURES, BASE

IDS = torch.tensor([[5, 40, 41, 7, 9, 33, 2, 60, 17, 5], [9, 3, 4, 62, 5, 44, 2, 1, 1, 8]])
BUDGETS = (1.0, 0.5, 0.25, 0.0)  # the last: what one token needs in a layer
KINDS = ("native", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "olmoe-bfloat16")
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            home = tmp_path_factory.mktemp(kind)
            made[kind] = tiny_packed(home / "packed") if kind == "native" else guest(home, kind)
        return made[kind]

    return make


def guest(home: Path, kind: str) -> Path:
    model_type, _, dtype = kind.partition("-")
    torch.manual_seed(1)
    settings = BASE | {"initializer_range": 0.3} | ARCHITECTURES[model_type]
    if dtype:  # wide enough for packed products
        settings |= {"hidden_size": 128, "intermediate_size": 192}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    kinds = {"dtype": getattr(torch, dtype or "float32")}
    model = transformers.AutoModelForCausalLM.from_config(config, **kinds)
    model.save_pretrained(home / "source")
    pack(home / "source", home / "packed")
    return home / "packed"


def by(model: Any) -> list[tuple[str, torch.Tensor]]:
    """What gradients are taken by: norms lie below and above experts, and gates."""
    found = getattr(model, "core", model).named_parameters()
    return [(n, p.requires_grad_()) for n, p in found if "norm" in n or "gate.weight" in n]


def gradients(model: Any, called: Any, ids: torch.Tensor = IDS) -> Gradients:
    parameters = by(model)
    logits = called(ids).logits
    logits.float().square().mean().backward()
    return {"logits": logits.detach()} | {
        n: p.grad.clone() for n, p in parameters if p.grad is not None
    }


def streamed(folder: Path, share: float, ids: torch.Tensor = IDS) -> Gradients:
    layout = open_layout(folder)
    capacity = max(int(layout.total_bytes * share), 2 * layout.record_nbytes)
    model = backend.load(folder, resident=False)
    order = UpAndDown(layout.moe_layers, (layout.num_layers, layout.num_experts))
    options = FeedOptions(top_k=2)
    with open_feed(backend.open_arena, layout, capacity, options, policy=order) as feed:
        found = gradients(model, Streamed(model, feed), ids)
        assert feed.stats().peak_expert_bytes <= capacity
    return found


def same(one: Gradients, other: Gradients) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_bits_at_every_budget(
    kind: str, folder: Callable[[str], Path]
) -> None:
    resident = backend.load(folder(kind), resident=True)
    expected = gradients(resident, resident)
    found = [streamed(folder(kind), share) for share in BUDGETS]
    assert len(expected) > 6 and all(g.any() for g in expected.values())
    for each in found:
        assert same(each, found[0])
    for name, value in found[0].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0]["logits"], expected["logits"])


def test_a_single_token_has_them_too(folder: Callable[[str], Path]) -> None:
    for kind in ("native", "mixtral"):
        found = [streamed(folder(kind), share, IDS[:1, :1]) for share in BUDGETS]
        assert all(same(each, found[0]) for each in found)


@pytest.mark.parametrize("kind", KINDS)
def test_without_acquiring_again_they_are_wrong(
    kind: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: slots are read in the backward pass as they are by then."""
    right = streamed(folder(kind), 0.0)
    for module in (moe, experts):
        monkeypatch.setattr(module, "recording", lambda *inputs: False)
    wrong = streamed(folder(kind), 0.0)
    assert torch.equal(right["logits"], wrong["logits"])
    assert not same(right, wrong)


def test_a_packed_layer_has_its_gradient(folder: Callable[[str], Path]) -> None:
    model = backend.load(folder("olmoe-bfloat16"), resident=True)
    packed = [m for m in model.core.modules() if isinstance(m, PackedLinear)]
    if not packed:
        pytest.skip("this CPU packs no bfloat16 weight")
    x = torch.randn(3, packed[0].in_features).bfloat16().requires_grad_()
    packed[0](x).float().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3, packed[0].out_features).bfloat16() @ packed[0].weight)


def test_experts_that_may_be_missing_have_none(tmp_path: Path) -> None:
    layout = open_layout(tiny_packed(tmp_path / "packed", num_shared_experts=1))
    options = FeedOptions(top_k=2, miss="fallback")
    with open_feed(backend.open_arena, layout, layout.total_bytes, options) as feed:
        model = backend.load(layout.folder, resident=False)
        by(model)
        with pytest.raises(UsageError, match="need every expert"):
            Streamed(model, feed)(IDS)
        with torch.no_grad():
            assert Streamed(model, feed)(IDS).logits.isfinite().all()
