"""Adapters against peft, which nobody here wrote: files both ways, DoRA, and what they compute."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="peft runs on torch")
transformers = pytest.importorskip("transformers", reason="peft's models are Transformers'")
peft = pytest.importorskip("peft", reason="peft is the oracle of these tests")

from chronos.common.experts.feed import FeedOptions, open_feed  # noqa: E402
from chronos.common.experts.passes import UpAndDown  # noqa: E402
from chronos.common.layout import open_layout, pack  # noqa: E402
from chronos.common.training.lora import LoraRecipe, read_adapter, write_adapter  # noqa: E402
from chronos.common.training.objectives import NextToken  # noqa: E402
from chronos.common.training.recipe import OptimizerRecipe  # noqa: E402
from chronos.train.merge import merge  # noqa: E402
from tests.conformance.test_lora import batches  # noqa: E402
from tests.support.guests import ARCHITECTURES, BASE  # noqa: E402

NEEDS = ("peft", "torch", "transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = np.random.default_rng(3).integers(3, 60, (2, 14))
RECIPES = {
    "lora": LoraRecipe(rank=4, alpha=6.0),
    "dora": LoraRecipe(rank=4, alpha=6.0, targets=("q_proj", "o_proj"), dora=True),
    "shared": LoraRecipe(rank=2, targets=("attention", "shared")),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen2_moe as Transformers saves it, and packed."""
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(1)
    settings = BASE | {"initializer_range": 0.3, "vocab_size": 300} | ARCHITECTURES["qwen2_moe"]
    config = transformers.AutoConfig.for_model("qwen2_moe", **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "hub")
    pack(folder / "hub", folder / "packed")
    return folder


def by_library(home: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(home / "hub").eval()


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
    return found


def ours(backend: Any, home: Path, recipe: LoraRecipe, adapter: Path, train: bool) -> np.ndarray:
    """Logits of the streamed model with an adapter: trained here and written, or read."""
    layout = open_layout(home / "packed")
    order = UpAndDown(layout.moe_layers, (layout.num_layers, layout.num_experts))
    capacity = layout.total_bytes // 2
    with open_feed(
        backend.open_arena, layout, capacity, FeedOptions(top_k=2), policy=order
    ) as feed:
        model = backend.streamed(backend.load(layout.folder, resident=False), feed)
        made = backend.attach(model, recipe, seed=5)
        if train:
            step = backend.train_step(model, OptimizerRecipe(), made)
            for number in range(3):
                step.step(batches(number), NextToken(), 1e-2, number)
            write_adapter(adapter, recipe, made.tensors(), base="hub", fingerprint="")
        else:
            made.load(read_adapter(adapter).tensors())
        found = backend.forward(model.bare, IDS, source=feed.step())
    return np.asarray(found.logits_BTV)


@pytest.mark.parametrize("kind", sorted(RECIPES))
def test_peft_loads_what_was_trained_here(
    backend: Any, kind: str, home: Path, tmp_path: Path
) -> None:
    recipe = RECIPES[kind]
    found = ours(backend, home, recipe, tmp_path, train=True)
    model = peft.PeftModel.from_pretrained(by_library(home), tmp_path).eval()
    expected = logits(model)
    assert np.abs(expected - logits(by_library(home))).max() > 1e-3  # the adapter does something
    tolerance = 1e-6 if backend.name == "torch" else 1e-4
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    merged = logits(model.merge_and_unload())
    merge(home / "hub", tmp_path, tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(logits(again), merged, rtol=0, atol=3e-6 * np.abs(merged).max())


def test_what_peft_trained_is_read_here(backend: Any, home: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(by_library(home), config).eval()
    model.save_pretrained(tmp_path)
    recipe = read_adapter(tmp_path).recipe
    assert (recipe.rank, recipe.alpha) == (3, 5.0) and len(recipe.targets) == 6
    found = ours(backend, home, recipe, tmp_path, train=False)
    expected = logits(model)
    tolerance = 1e-6 if backend.name == "torch" else 1e-4
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_gradients_are_pefts(home: Path) -> None:
    """The same loss, the same adapter: the gradient of every tensor."""
    from chronos.backends import torch as backend

    recipe = dataclasses.replace(RECIPES["lora"], targets=("q_proj", "v_proj"))
    model = backend.load(home / "packed", resident=True)
    made = backend.attach(model, recipe, seed=5)
    config = peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(by_library(home), config).eval()
    names = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in made.parameters.items():
            parameter.add_(0.05 * torch.randn_like(parameter))
            names[name.replace(".weight", ".default.weight")].copy_(parameter)
    ids = torch.from_numpy(IDS)
    for called in (lambda: model(ids), lambda: theirs(input_ids=ids)):
        called().logits.square().mean().backward()
    assert len(made.parameters) == 12
    for name, parameter in made.parameters.items():
        expected = names[name.replace(".weight", ".default.weight")].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)
