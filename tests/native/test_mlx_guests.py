"""Guests on MLX: streamed against MLX-LM's own resident run, whatever library wrote the folder.

What they compute is here; how their experts come and what is refused have files of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="tests of the MLX backend")
pytest.importorskip("mlx_lm.utils", reason="guests of the MLX backend")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import chronos.backends.mlx as backend  # noqa: E402
from chronos.backends import sequences  # noqa: E402
from chronos.common.layout import open_layout, pack  # noqa: E402
from chronos.common.text import sampling  # noqa: E402
from chronos.run.engine import load  # noqa: E402
from chronos.testing.tolerances import assert_close  # noqa: E402
from tests.support import company  # noqa: E402
from tests.support.mlx_guests import (  # noqa: E402
    BUDGETS,
    COMMON,
    HUB,
    PROMPT,
    QUANTISED,
    SAVED,
    changed,
    needs,
    open_feed,
    packed,
    run,
    values,
)

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("name", [*HUB, *SAVED, *QUANTISED])
def test_streamed_is_resident_bit_for_bit(folder: Callable[[str], Path], name: str) -> None:
    """Resident: MLX-LM's own switches, over the weights of the same pack."""
    layout = open_layout(packed(folder(name)))
    resident, routing = run(backend.load(layout.folder, resident=True))
    model = backend.load(layout.folder, resident=False)
    for share in BUDGETS:
        for ahead in (False, True):
            with open_feed(layout, share) as feed:
                logits, found = run(model, feed, ahead)
                stats = feed.stats()
            np.testing.assert_array_equal(logits, resident, f"{share} {ahead}")
            np.testing.assert_array_equal(found, routing)
            assert stats.hits + stats.late + stats.misses == needs(routing)
            assert stats.peak_expert_bytes <= stats.capacity_bytes


@pytest.mark.parametrize("name", [name for name in [*HUB, *SAVED, *QUANTISED] if name != "gpt_oss"])
def test_the_packed_model_is_the_one_mlx_lm_loads(folder: Callable[[str], Path], name: str) -> None:
    """MLX-LM reads the folder with its own reader and renames. gpt-oss it reads as MXFP4 only."""
    ids = mx.array([PROMPT])
    own = backend.load(folder(name), resident=True)
    ours = backend.load(packed(folder(name)), resident=True)
    np.testing.assert_array_equal(values(ours(ids).logits), values(own(ids).logits))


@pytest.mark.parametrize("name", [name for name in HUB if name != "qwen3_next"])
def test_logits_are_those_of_transformers(folder: Callable[[str], Path], name: str) -> None:
    """One pack for both: MLX-LM and Transformers agree on what it computes."""
    reference = AutoModelForCausalLM.from_pretrained(folder(name)).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits.numpy()
    layout = open_layout(packed(folder(name)))
    model = backend.load(layout.folder, resident=False)
    with open_feed(layout, 0.5) as feed:
        logits = values(model(mx.array([PROMPT]), source=feed.step()).logits)
    assert_close(logits, expected, "logits", name)


def test_experts_without_a_gate(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """As the hub spells nemotron_h: one by one, two matrices."""
    saved = folder("nemotron_h")
    weights = dict(mx.load(str(saved / "model.safetensors")))
    for name in [name for name in weights if "switch_mlp" in name]:
        one = "up_proj" if "fc1" in name else "down_proj"
        for expert, matrix in enumerate(weights.pop(name)):
            base = name.partition("switch_mlp")[0]
            weights[f"{base}experts.{expert}.{one}.weight"] = mx.contiguous(matrix)
    changed(saved, tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(tmp_path / "hub" / "model.safetensors"), weights)  # metadata: null
    pack(tmp_path / "hub", packed(tmp_path / "hub"))
    layout = open_layout(packed(tmp_path / "hub"))
    assert [tensor.name for tensor in layout.records[2, 0].tensors] == ["up_proj", "down_proj"]
    with open_feed(layout, 0.5) as feed:
        logits, _ = run(backend.load(layout.folder, resident=False), feed)
    np.testing.assert_array_equal(logits, run(backend.load(saved, resident=True))[0])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_bfloat16_on_a_cpu_is_widened(folder: Callable[[str], Path], home: Path, name: str) -> None:
    """gather_mm refuses 16 bits there, so MLX-LM cannot run it; widened weights are exact."""
    model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.bfloat16)
    model.save_pretrained(home / f"{name}-bf16")
    pack(home / f"{name}-bf16", home / f"{name}-bf16-packed")
    layout = open_layout(home / f"{name}-bf16-packed")
    assert {tensor.dtype for tensor in layout.records[0, 0].tensors} == {"BF16"}
    resident, _ = run(backend.load(layout.folder, device="cpu", resident=True))
    model = backend.load(layout.folder, device="cpu", resident=False)
    with open_feed(layout, 0.5) as feed:
        np.testing.assert_array_equal(run(model, feed)[0], resident)
    reference = AutoModelForCausalLM.from_pretrained(home / f"{name}-bf16", dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits[0, -1].numpy()
    assert_close(resident[0], expected, "logits")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_one_pack_writes_the_same_text_on_both_backends(
    folder: Callable[[str], Path], name: str
) -> None:
    written = []
    for on, budget, prefetch in (
        ("torch", "resident", "off"),
        ("mlx", "resident", "off"),
        ("mlx", "all", "auto"),
        ("mlx", "40%", "auto"),
        ("mlx", "40%", "off"),
    ):
        with load(packed(folder(name)), backend=on, budget=budget, prefetch=prefetch) as engine:
            engine.stop_ids = frozenset()
            written.append([step.token for step in engine.generate(PROMPT, max_tokens=16)])
    assert written[1:] == written[:1] * 4


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe-4bit"])
def test_a_folder_of_mlx_lm_writes_the_same_text_at_every_budget(
    folder: Callable[[str], Path], name: str
) -> None:
    written = []
    for at, budget, prefetch in (
        (folder(name), "all", "off"),
        (packed(folder(name)), "all", "auto"),
        (packed(folder(name)), "40%", "auto"),
        (packed(folder(name)), "40%", "off"),
    ):
        with load(at, backend="mlx", budget=budget, prefetch=prefetch) as engine:
            engine.stop_ids = frozenset()
            written.append([step.token for step in engine.generate(PROMPT, max_tokens=16)])
    assert written[1:] == written[:1] * 3


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_the_last_position_alone(folder: Callable[[str], Path], name: str) -> None:
    model = backend.load(packed(folder(name)), resident=True)
    whole = values(model(mx.array([PROMPT])).logits)
    last = values(model(mx.array([PROMPT]), last_only=True).logits)
    assert last.shape == (1, 1, COMMON["vocab_size"])
    assert_close(last[0, 0], whole[0, -1], "logits")


@pytest.mark.parametrize("name", [*HUB, *SAVED, *QUANTISED])
def test_sequences_together_have_the_bits_of_each_alone(
    folder: Callable[[str], Path], name: str
) -> None:
    layout = open_layout(packed(folder(name)))
    prompts, tokens = [PROMPT, PROMPT[:1], PROMPT[5:9], PROMPT[::-1]], [9, 8, 7]
    whole = backend.session(backend.load(layout.folder, resident=True))
    expected = [company.alone(whole, prompt, tokens) for prompt in prompts]
    model = backend.load(layout.folder, resident=False)
    for share in BUDGETS:
        with open_feed(layout, share) as feed:
            found = company.together(backend.session(model, feed), prompts, tokens)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs, f"{share}")


@pytest.mark.parametrize("name", [*HUB, *SAVED])
def test_a_guest_kept_or_forked_goes_on_as_a_cold_one(
    folder: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sampling, sequences):
        monkeypatch.setattr(module, "PIECE", 8)
    layout = open_layout(packed(folder(name)))
    model = backend.load(layout.folder, resident=False)
    with open_feed(layout, 0.5) as feed:
        kept, forked, restored = company.kept_and_forked(
            backend.session(model, feed), PROMPT[:20], 16
        )
    assert forked == 16
    caches = [type(cache).__name__ for cache in model.new_cache().layers]
    assert restored == (0 if "ArraysCache" in caches else 16), caches
    stuck = {"ArraysCache", "RotatingKVCache"}  # recurrent states; a window that is full by then
    assert kept == (0 if stuck & set(caches) else 16), caches
