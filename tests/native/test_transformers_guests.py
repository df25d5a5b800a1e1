"""Guests on torch: Transformers' models with streamed experts against the library's own run.

The library's model runs in its default way (`grouped_mm`), resident, as it was built; the streamed
one must give the same bits at every budget. Weights that the library loads by itself may lie at odd
addresses, where products differ in the last bit, so the reference is the model that was saved.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers

import chronos
from chronos.backends import sequences
from chronos.backends import torch as backend
from chronos.backends.libraries import who_runs
from chronos.backends.torch import products
from chronos.backends.torch.arena import Arena
from chronos.backends.torch.guest import experts
from chronos.backends.torch.guest.experts import is_experts
from chronos.backends.torch.products import PackedLinear, packs
from chronos.common.disk.header import read_header
from chronos.common.disk.tensors import read_checkpoint, write_tensors
from chronos.common.errors import (
    ConfigError,
    CorruptClusterError,
    MissingBackendError,
    ShapeMismatch,
    UsageError,
)
from chronos.common.layout import open_layout, pack
from chronos.common.text import sampling
from chronos.common.text.sampling import SamplingParams
from chronos.run.sequence import OneSequence
from tests.support import company
from tests.support.guests import ARCHITECTURES, BASE

GREEDY = SamplingParams()
PROMPT = np.random.default_rng(0).integers(3, 64, 40).tolist()
STEPS = 4
WIDTHS = {"hidden_size", "intermediate_size", "moe_intermediate_size"}
ANOTHER_WAY = ("llama4_text",)  # its experts are one product over all of them
OTHER_STATES = ("jamba", "minimax", "qwen3_next")  # caches of more than keys and values
WRITTEN_IN_PARTS = ("deepseek_v2", "deepseek_v3")  # keys, through two views
RUN = [name for name in ARCHITECTURES if name not in ANOTHER_WAY]


pytestmark = pytest.mark.usefixtures("no_flushing")


@dataclass
class Guest:
    """A tiny random model: the library's, saved and packed."""

    model: Any
    source: Path
    packed: Path

    def slots(self, count: int) -> int:
        return count * open_layout(self.packed).record_nbytes


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Guest]:
    made: dict[Any, Guest] = {}

    def make(model_type: str, dtype: torch.dtype = torch.float32) -> Guest:
        if (model_type, dtype) not in made:
            folder = tmp_path_factory.mktemp(model_type)
            model = build(model_type, dtype)
            model.save_pretrained(folder / "source")
            pack(folder / "source", folder / "packed")
            made[model_type, dtype] = Guest(model, folder / "source", folder / "packed")
        return made[model_type, dtype]

    return make


def build(model_type: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    settings = BASE | {"initializer_range": 0.3} | ARCHITECTURES[model_type]
    if dtype == torch.bfloat16:  # wide enough for packed products
        for name in settings.keys() & WIDTHS:
            settings[name] *= 4
    config = transformers.AutoConfig.for_model(model_type, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def by_library(model: Any, prompt: list[int], steps: int = STEPS) -> list[np.ndarray]:
    """Logits after the prompt and after each greedy token, by the library's own forward."""
    own = model.config.model_type == "minimax"  # it makes a cache of its own class
    cache = None if own else transformers.DynamicCache(config=model.config)
    found, ids = [], prompt
    with torch.inference_mode():
        for _ in range(steps + 1):
            out = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
            cache = out.past_key_values
            found.append(out.logits[0, -1].float().numpy())
            ids = [int(found[-1].argmax())]
    return found


def by_engine(engine: Any, prompt: list[int], steps: int = STEPS) -> list[np.ndarray]:
    return by_runner(OneSequence(engine.session), prompt, steps)


def by_runner(runner: OneSequence, prompt: list[int], steps: int = STEPS) -> list[np.ndarray]:
    token = runner.prefill(prompt, GREEDY)
    found = [runner.logits()]
    for _ in range(steps):
        token = runner.decode(token, GREEDY)
        found.append(runner.logits())
    return found


@pytest.mark.parametrize("model_type", RUN)
def test_streamed_is_the_librarys_own_run_bit_for_bit(
    model_type: str, guest: Callable[..., Guest]
) -> None:
    tiny = guest(model_type)
    expected = by_library(tiny.model, PROMPT)
    for budget, prefetch in itertools.product((tiny.slots(2), "50%", "all"), ("auto", "off")):
        options = {"budget": budget, "prefetch": prefetch}
        with chronos.load(tiny.packed, backend="torch", **options) as engine:
            np.testing.assert_array_equal(by_engine(engine, PROMPT), expected)
            stats = engine.feed.stats()
            assert stats.hits + stats.late + stats.misses == stats.routed > 0
            assert stats.peak_expert_bytes <= engine.budget_bytes


@pytest.mark.parametrize("model_type", RUN)
def test_a_prompt_in_pieces_is_the_whole_prompt(
    model_type: str, guest: Callable[..., Guest]
) -> None:
    tiny = guest(model_type)
    expected = by_library(tiny.model, PROMPT, 1)
    with chronos.load(tiny.packed, backend="torch", budget="50%") as engine:
        runner = OneSequence(engine.session)
        for piece in (PROMPT[:7], PROMPT[7:30], PROMPT[30:]):
            token = runner.prefill(piece, GREEDY)
        found = [runner.logits()]
        runner.decode(token, GREEDY)
        found.append(runner.logits())
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=2e-5 * scale)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_resident_guests_packed_or_not_give_the_same_bits(
    model_type: str, guest: Callable[..., Guest]
) -> None:
    tiny = guest(model_type)
    expected = by_library(tiny.model, PROMPT)
    for folder in (tiny.packed, tiny.source):
        with chronos.load(folder, backend="torch", budget="resident") as engine:
            np.testing.assert_array_equal(by_engine(engine, PROMPT), expected)
            assert engine.feed is None
            assert engine.expert_bytes_total == open_layout(tiny.packed).total_bytes
            assert engine.moe_layers == open_layout(tiny.packed).moe_layers


def could_be_packed(model: Any) -> int:
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    tied = model.get_input_embeddings().weight
    return sum(x.weight is not tied and packs(x.weight, x.bias) for x in layers)


@pytest.mark.parametrize("model_type", RUN)
def test_bfloat16_is_computed_as_the_library_does(
    model_type: str, guest: Callable[..., Guest]
) -> None:
    tiny = guest(model_type, torch.bfloat16)
    expected = by_library(tiny.model, PROMPT)
    for folder, budget in ((tiny.packed, "50%"), (tiny.packed, "resident"), (tiny.source, "all")):
        with chronos.load(folder, backend="torch", budget=budget) as engine:
            np.testing.assert_array_equal(by_engine(engine, PROMPT), expected)
            layers = engine.session.model.core.modules()
            found = sum(isinstance(layer, PackedLinear) for layer in layers)
            assert found == could_be_packed(tiny.model)


@pytest.mark.parametrize("model_type", RUN)
def test_replayed_steps_are_the_librarys_bit_for_bit(
    model_type: str, guest: Callable[..., Guest]
) -> None:
    """Far enough to replay recorded steps, over integers of the config and in a second sequence.
    Against the library's forward with our experts: products of prompts are tested elsewhere."""
    tiny = guest(model_type)
    with chronos.load(tiny.packed, backend="torch", budget="50%") as engine:
        steps = engine.session.model.steps
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "run", lambda ids, position, forward: forward(ids))
            expected = by_engine(engine, PROMPT[:9], 54)
        for count in (54, 20):
            found = by_engine(engine, PROMPT[:9], count)
            np.testing.assert_array_equal(found, expected[: count + 1])
        assert (steps.replayed > 15) == (model_type not in OTHER_STATES + WRITTEN_IN_PARTS)


def test_a_plain_run_records_and_packs_nothing_and_has_the_same_bits(
    guest: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, caches = guest("qwen3_moe", torch.bfloat16), (products._packs, products._has_onednn)
    found = []
    for word in ("0", "1"):
        monkeypatch.setenv("CHRONOS_PLAIN", word)
        for cached in caches:
            cached.cache_clear()
        with chronos.load(tiny.packed, backend="torch", budget="all") as engine:
            found.append(by_engine(engine, PROMPT[:9], 12))
            model = engine.session.model
        plain = [not isinstance(m, PackedLinear) for m in model.core.modules()]
        assert model.steps is None or word == "0" and model.steps.replayed > 0
        assert all(plain) or word == "0"
    for cached in caches:
        cached.cache_clear()
    np.testing.assert_array_equal(*found)


def test_a_sequence_that_an_error_cut_is_not_continued(
    guest: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = guest("qwen2_moe")
    with chronos.load(tiny.packed, backend="torch", budget="50%") as engine:
        model = engine.session.model
        expected = by_engine(engine, PROMPT[:9], 12)
        runner = OneSequence(engine.session)
        runner.prefill(PROMPT[:9], GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr(model.core, "forward", lambda **_: 1 / 0)
            patch.setattr(model.steps, "run", lambda ids, position, forward: forward(ids))
            with pytest.raises(ZeroDivisionError):
                runner.decode(5, GREEDY)
        with pytest.raises(UsageError, match="middle of a step"):
            runner.decode(5, GREEDY)
        np.testing.assert_array_equal(by_engine(engine, PROMPT[:9], 12), expected)


@pytest.mark.parametrize("model_type", RUN)
def test_packed_products_have_the_librarys_bits(
    model_type: str, guest: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, released, release = guest(model_type, torch.bfloat16), [], Arena._release
    monkeypatch.setattr(Arena, "_release", lambda *at: (released.append(at[1]), release(*at)))
    expected = by_library(tiny.model, PROMPT, 12)
    with chronos.load(tiny.packed, backend="torch", budget="all") as engine:
        for _ in range(2):
            np.testing.assert_array_equal(by_engine(engine, PROMPT, 12), expected)
        assert engine.feed is not None
        runner = OneSequence(engine.session, record=True)
        runner.prefill(PROMPT[:1], GREEDY)
        used = int(runner.routing()[0][0][0, 0, 0])
        ((_, weights),) = engine.feed.step().acquire(open_layout(tiny.packed).moe_layers[0], [used])
        experts = next(m for m in engine.session.model.core.modules() if is_experts(m))
        shapes = [shape for shape in experts.chronos_shapes.values() if len(shape) > 1]
        matrices = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        could = all(packs(matrix, transposed=experts.is_transposed) for matrix in matrices)
        packed = [w.is_mkldnn for w in weights.tensors.values() if w.is_mkldnn or w.dim() > 1]
        assert packed == [could] * len(matrices)
        assert (len(released) > 0) == could  # the bytes that were read are not kept beside
        assert len(set(released)) == len(released)


def test_routing_is_recorded_and_replayed(guest: Callable[..., Guest]) -> None:
    tiny = guest("deepseek_v2")
    with chronos.load(tiny.packed, backend="torch", budget="50%") as engine:
        runner = OneSequence(engine.session, record=True)
        expected = by_runner(runner, PROMPT)
        recorded = runner.routing()
        ids_TLK = np.concatenate([ids for ids, _ in recorded])
        weights_TLK = np.concatenate([weights for _, weights in recorded])
        assert ids_TLK.shape == (len(PROMPT) + STEPS, 2, 2)  # the first of three layers is dense
        place, forced = [0], ids_TLK.copy()

        def replay(layer: int) -> tuple[np.ndarray, np.ndarray]:
            count = len(PROMPT) if place[0] == 0 else 1
            rows = slice(place[0], place[0] + count)
            if layer == 2:
                place[0] += count
            return forced[rows, layer - 1].astype(np.int64), weights_TLK[rows, layer - 1]

        replayed = OneSequence(engine.session, route_override=replay)
        np.testing.assert_array_equal(by_runner(replayed, PROMPT), expected)
        replayed.reset()
        place[0], forced = 0, (ids_TLK + 1) % 4
        assert not np.array_equal(by_runner(replayed, PROMPT), expected)


@pytest.mark.parametrize(
    "model_type", ["deepseek_v2", "qwen2_moe", "granitemoeshared", "hunyuan_v1_moe"]
)
def test_shared_experts_stand_in_for_missing_ones(
    model_type: str, guest: Callable[..., Guest], tmp_path: Path
) -> None:
    tiny = guest(model_type)
    folder = Path(shutil.copytree(tiny.packed, tmp_path / "packed"))
    for file in (folder / "experts").glob("*.ctsr"):
        file.unlink()
    with chronos.load(
        folder, backend="torch", budget="50%", miss="fallback", allow_missing=True
    ) as engine:
        found = by_engine(engine, PROMPT)
        stats = engine.feed.stats()
        assert np.isfinite(found).all()
        assert stats.fallbacks == stats.routed > 0
        assert stats.fallback_weight > 0
    assert not np.array_equal(found, by_library(tiny.model, PROMPT))


def test_fallback_is_refused_without_shared_experts(guest: Callable[..., Guest]) -> None:
    with pytest.raises(UsageError, match="shared experts"):
        chronos.load(guest("mixtral").packed, backend="torch", budget="50%", miss="fallback")


def changed(folder: Path, to: Path, **keys: Any) -> Path:
    """A copy of a model folder whose config.json says something else."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text("utf-8"))
    (to / "config.json").write_text(json.dumps(config | keys), "utf-8")
    return to


@pytest.mark.parametrize(
    ("keys", "error", "what"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, ConfigError, "auto_map"),
        ({"model_type": "no_such_model"}, ConfigError, "no_such_model"),
        ({"model_type": "t5"}, ConfigError, "t5"),
        ({"quantization_config": {"quant_method": "hqq"}}, ConfigError, "hqq"),
        ({"quantization": {"bits": 4}, "model_type": "granitemoe"}, ConfigError, "MLX-LM's"),
        ({"intermediate_size": 40}, ShapeMismatch, "the model wants"),
        ({"hidden_size": 16}, ShapeMismatch, r"config.json implies \[64, 16\]"),
        ({"num_local_experts": 5}, ShapeMismatch, "expert 4 of layer 0 is missing"),
        ({"num_hidden_layers": 4}, ShapeMismatch, "missing"),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    keys: dict[str, Any], error: type, what: str, guest: Callable[..., Guest], tmp_path: Path
) -> None:
    folder = changed(guest("mixtral").packed, tmp_path / "packed", **keys)
    with pytest.raises(error, match=what):
        chronos.load(folder, backend="torch", budget="50%")


@pytest.mark.parametrize("model_type", ANOTHER_WAY)
def test_experts_that_go_another_way_are_refused(
    model_type: str, guest: Callable[..., Guest]
) -> None:
    with pytest.raises(ConfigError, match=f"{model_type} does not hand its experts"):
        chronos.load(guest(model_type).packed, backend="torch", budget="all")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_inspect_says_is_what_loading_does(model_type: str) -> None:
    assert who_runs(model_type, "transformers")[0].may_run is (model_type in RUN)


def test_experts_that_the_library_rearranges_are_refused(
    guest: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.core_model_loading import Interleave, WeightConverter

    from chronos.backends.torch.guest import model as module

    step = WeightConverter("mlp.experts.w13", "mlp.experts.gate_up_proj", [Interleave(dim=1)])
    monkeypatch.setattr(module, "get_model_conversion_mapping", lambda core: [step])
    with pytest.raises(ConfigError, match="rearranges gate_up_proj"):
        chronos.load(guest("mixtral").packed, backend="torch", budget="all")


def test_experts_of_another_checkpoint_are_refused(
    guest: Callable[..., Guest], tmp_path: Path
) -> None:
    tiny = guest("mixtral")
    other = build("mixtral", torch.float32)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    other.save_pretrained(tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed")
    shutil.copyfile(tiny.packed / "model.safetensors", tmp_path / "packed/model.safetensors")
    with pytest.raises(CorruptClusterError, match="another model"):
        chronos.load(tmp_path / "packed", backend="torch", budget="50%")


def test_a_tensor_that_is_gone_is_named(guest: Callable[..., Guest], tmp_path: Path) -> None:
    folder = changed(guest("mixtral").packed, tmp_path / "packed", attention_bias=True)
    dense = [
        (entry.name, entry.dtype, entry.shape, bytes(data))
        for entry, data in read_checkpoint(folder)
        if not entry.name.endswith("layers.1.self_attn.q_proj.weight")
    ]
    metadata = read_header(folder / "model.safetensors").metadata
    write_tensors(folder / "model.safetensors", dense, metadata)
    with pytest.raises(ShapeMismatch, match="layers.1.self_attn.q_proj.weight is missing"):
        chronos.load(folder, backend="torch", budget="50%")


def test_an_unpacked_guest_says_pack_it(guest: Callable[..., Guest]) -> None:
    with pytest.raises(UsageError, match="chronos pack"):
        chronos.load(guest("mixtral").source, backend="torch", budget="50%")


def test_without_transformers_the_pip_line_is_given(
    guest: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An attribute of the package, left by an earlier import, would be found before sys.modules.
    monkeypatch.delattr(backend.guest, "model", raising=False)
    monkeypatch.setitem(sys.modules, "chronos.backends.torch.guest.model", None)
    with pytest.raises(MissingBackendError, match=r"pip install 'chronos-moe\[guests\]'"):
        chronos.load(guest("mixtral").packed, backend="torch", budget="50%")


def test_experts_are_never_materialised(guest: Callable[..., Guest]) -> None:
    tiny = guest("qwen3_moe")
    with chronos.load(tiny.packed, backend="torch", budget="50%") as engine:
        core = engine.session.model.core
        held = sum(p.nbytes for p in core.parameters())
        dense = [p for n, p in tiny.model.named_parameters() if ".experts." not in n]
        assert held == sum(p.nbytes for p in dense)
        assert all(p.device.type == "cpu" for p in (*core.parameters(), *core.buffers()))


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_the_next_gate_names_experts_that_are_read_ahead(
    model_type: str, guest: Callable[..., Guest]
) -> None:
    tiny = guest(model_type)
    expected = by_library(tiny.model, PROMPT)
    with chronos.load(tiny.packed, backend="torch", budget="50%", predictor="lfu") as engine:
        engine.feed.ahead._room = lambda: tiny.slots(2)  # a quarter of these slots is no record
        asked: list[tuple[int, list[int]]] = []
        forecast = engine.feed.ahead.forecast_next

        def note(layer: int, experts: list[int]) -> None:
            asked.append((layer, experts))
            forecast(layer, experts)

        engine.feed.ahead.forecast_next = note
        np.testing.assert_array_equal(by_engine(engine, PROMPT), expected)
        layers = {layer for layer, _ in asked}
        assert layers and layers <= set(engine.moe_layers[1:])
        assert all(len(set(experts)) == 2 for _, experts in asked)


@pytest.mark.parametrize("model_type", RUN)
def test_sequences_together_have_the_bits_of_each_alone(
    model_type: str, guest: Callable[..., Guest]
) -> None:
    """Inside the library's own code, at every budget, with other caches than keys and values."""
    tiny, prompts = guest(model_type), [PROMPT, PROMPT[:1], PROMPT[5:20], PROMPT[::-1]]
    tokens = [9, 8, 7, 6, 5]
    with chronos.load(tiny.packed, backend="torch", budget="resident") as engine:
        expected = [company.alone(engine.session, prompt, tokens) for prompt in prompts]
    for budget in (tiny.slots(2), "50%", "all", "resident"):
        with chronos.load(tiny.packed, backend="torch", budget=budget) as engine:
            for _ in range(2):  # and behind recorded steps of a sequence alone
                found = company.together(engine.session, prompts, tokens)
                for mine, theirs in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(mine, theirs)
                company.alone(engine.session, prompts[1], tokens)


@pytest.mark.parametrize("model_type", RUN)
def test_a_guest_kept_or_forked_goes_on_as_a_cold_one(
    model_type: str, guest: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sampling, sequences):
        monkeypatch.setattr(module, "PIECE", 8)
    tiny = guest(model_type)
    with chronos.load(tiny.packed, backend="torch", budget="50%") as engine:
        kept, forked, restored = company.kept_and_forked(engine.session, PROMPT[:20], 16)
    assert forked == 16
    assert kept == restored == (0 if model_type in OTHER_STATES else 16)


def test_an_expert_that_a_gate_names_twice_counts_twice() -> None:
    """As in the library's own sum; an expert that is missing too."""

    class Some:
        fallbacks: ClassVar[list[float]] = []

        def acquire(self, layer: int, ids: Any) -> Any:
            assert len(set(ids)) == len(ids)
            return [(expert, None if expert == 7 else float(expert)) for expert in ids]

        def wants(self, source: str) -> bool:
            return False

        def record_fallback(self, weight: float) -> None:
            self.fallbacks.append(weight)

    layer = experts.Layer(0, lambda x: 100 * x, lambda *_: None)
    layer.codec = SimpleNamespace(forward=lambda x, weights, module: x * weights)
    x_1D, module = torch.ones(1, 2), torch.nn.Module()
    ids_1K, weights_1K = torch.tensor([[3, 5, 3, 7, 7]]), torch.tensor([[1.0, 2, 4, 8, 16]])
    y_1D = layer._one_token(module, x_1D, ids_1K, weights_1K, Some())
    assert y_1D.tolist() == [[3 * 5 + 5 * 2 + 100 * 24.0] * 2]
    assert Some.fallbacks == [8, 16]
