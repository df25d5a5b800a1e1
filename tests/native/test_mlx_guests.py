"""Guests on MLX: streamed against MLX-LM's own resident run, whatever library wrote the folder.

Half of the folders are written by Transformers, half by MLX-LM, two of these quantised. Weights are
random float32 and wide enough that a wrong expert, matrix or rotation shows.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="tests of the MLX backend")
utils = pytest.importorskip("mlx_lm.utils", reason="guests of the MLX backend")

import torch  # noqa: E402
from mlx.utils import tree_map_with_path  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import chronos.backends.mlx as backend  # noqa: E402
from chronos.backends.mlx.experts import StreamedLayer  # noqa: E402
from chronos.common.errors import (  # noqa: E402
    ConfigError,
    CorruptClusterError,
    CorruptFileError,
    MissingBackendError,
    ShapeMismatch,
    UsageError,
)
from chronos.common.layout import Layout, open_layout, pack  # noqa: E402
from chronos.common.routing.prefetch import NEXT_GATE  # noqa: E402
from chronos.common.sampling import SamplingParams  # noqa: E402
from chronos.engine import load  # noqa: E402
from chronos.testing.tolerances import assert_close  # noqa: E402

GREEDY = SamplingParams()
PROMPT = [int(i) for i in np.random.default_rng(0).integers(0, 96, 40)]  # 80 pairs: MLX-LM sorts
DECODED = [5, 80, 41]
BUDGETS = (1.0, 0.5, 0.2)

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
}
# Written by Transformers: experts one by one under two spellings, or stacked, or transposed.
HUB: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen3_moe": EIGHT | {"head_dim": 16},
    "qwen2_moe": EIGHT | {"shared_expert_intermediate_size": 40},
    "granitemoe": LOCAL,
    "gpt_oss": LOCAL
    | {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    },
    "deepseek_v3": ROUTED
    | {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 2,
    },
    # Its `sanitize` shifts the norms, but only among experts under the names it knows.
    "qwen3_next": EIGHT
    | {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "shared_expert_intermediate_size": 24,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}
ROPE = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-5}
# Written by MLX-LM.
SAVED: dict[str, dict[str, Any]] = {
    "olmoe": COMMON | ROPE | LOCAL | EIGHT,
    "phimoe": COMMON | ROPE | LOCAL | {"rope_scaling": None},
    "nemotron_h": COMMON
    | {
        "hybrid_override_pattern": "M*EE",
        "num_hidden_layers": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "mamba_num_heads": 2,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "mlp_bias": False,
        "attention_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
    },
}
WIDE = (
    COMMON
    | ROPE
    | EIGHT
    | {"norm_topk_prob": True, "hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 32}
)
QUANTISED = {
    "qwen3_moe-4bit": WIDE
    | {"intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen2_moe-8bit": WIDE | {"intermediate_size": 64, "shared_expert_intermediate_size": 64},
}


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """Compiling on a CPU starts a C++ compiler for every activation."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guests")


@pytest.fixture(scope="module")
def folder(home: Path) -> Callable[[str], Path]:
    """The unpacked folder of a model by name; its packed form lies beside it."""

    @cache
    def make(name: str) -> Path:
        at = home / name
        if name in HUB:
            save_by_transformers(name, at)
        else:
            save_by_mlx_lm(name, at)
        pack(at, packed(at))
        return at

    return make


def packed(folder: Path) -> Path:
    return folder.with_name(folder.name + "-packed")


def save_by_transformers(name: str, folder: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(COMMON | HUB[name] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)


def save_by_mlx_lm(name: str, folder: Path, **changes: Any) -> None:
    model_type, _, bits = name.partition("-")
    config = {"model_type": model_type} | (SAVED | QUANTISED)[name] | changes
    kind, arguments = utils._get_classes(config)
    model = kind(arguments.from_dict(config))
    mx.random.seed(0)
    model.update(tree_map_with_path(spread, model.parameters()))
    if bits:
        model, config = utils.quantize_model(
            model, config, 32, int(bits[0]), quant_predicate=mixed_bits if bits == "4bit" else None
        )
    utils.save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))


def spread(path: str, array: Any) -> Any:
    return 0.2 * mx.random.normal(array.shape) if array.ndim > 1 else array


def mixed_bits(path: str, module: Any) -> bool | dict[str, Any]:
    """The first layer's experts at 8 bits: the records of the layers differ."""
    return {"group_size": 32, "bits": 8} if "layers.0.mlp.switch_mlp" in path else True


def open_store(layout: Layout, share: float, **options: Any) -> Any:
    capacity = max(int(layout.total_bytes * share), 2 * layout.record_nbytes)
    return backend.open_store(layout, capacity, top_k=2, **options)


def run(model: Any, store: Any = None, ahead: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Logits behind the prompt and each decoded token, and the routing of all tokens, TLK."""
    runner = backend.runner(model, store)
    runner.recording = True
    runner.prefill(PROMPT, GREEDY)
    logits = [runner.logits()]
    for number, token in enumerate(DECODED):
        if ahead:
            store.prefetch([(layer, (number + i) % 8) for layer in store.stacks for i in range(4)])
        runner.decode(token, GREEDY)
        logits.append(runner.logits())
    return np.stack(logits), np.concatenate([ids for ids, _ in runner.routing()])


def needs(ids_TLK: np.ndarray) -> int:
    """Experts a store is asked for: a layer's once for the prompt, then for each token."""
    prompt_LTK = ids_TLK[: len(PROMPT)].swapaxes(0, 1)
    return sum(len(np.unique(layer)) for layer in prompt_LTK) + ids_TLK[len(PROMPT) :].size


@pytest.mark.parametrize("name", [*HUB, *SAVED, *QUANTISED])
def test_streamed_is_resident_bit_for_bit(folder: Callable[[str], Path], name: str) -> None:
    """Resident: MLX-LM's own switches, over the weights of the same pack."""
    layout = open_layout(packed(folder(name)))
    resident, routing = run(backend.load(layout.folder, resident=True))
    model = backend.load(layout.folder, resident=False)
    for share in BUDGETS:
        for ahead in (False, True):
            with open_store(layout, share) as store:
                logits, found = run(model, store, ahead)
                stats = store.stats()
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
    with open_store(layout, 0.5) as store:
        logits = values(model(mx.array([PROMPT]), source=store).logits)
    assert_close(logits, expected, "logits", name)


def test_a_token_waits_once_a_layer_and_once_at_its_end(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = open_layout(packed(folder("mixtral")))
    waits = []
    evaluate = mx.eval
    with open_store(layout, 1.0) as store:
        runner = backend.runner(backend.load(layout.folder, resident=False), store)
        token = runner.prefill(PROMPT, GREEDY)
        monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(1), evaluate(*arrays)))
        for _ in range(5):
            token = runner.decode(token, GREEDY)
    assert len(waits) == 5 * (1 + len(layout.moe_layers))


class Everything:
    """A prefetcher that wants every forecast, as a source of experts."""

    def __init__(self, store: Any) -> None:
        self.prefetcher, self._store = self, store
        self.forecasts: dict[int, list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def wanted(self, source: str) -> bool:
        return source == NEXT_GATE

    def forecast_next(self, layer: int, experts: list[int]) -> None:
        self.forecasts[layer] = experts


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "qwen3_next", "nemotron_h"])
def test_the_next_gate_forecasts(
    folder: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its choice from this layer's state rides along with this layer's wait. From a state that the
    attention between the two does not change, it is what the next layer is routed to."""
    layout = open_layout(packed(folder(name)))
    model = backend.load(layout.folder, resident=False)
    states: dict[int, tuple[Any, Any]] = {}
    compute = StreamedLayer.__call__

    def watched(layer: Any, x: Any, ids: Any) -> Any:
        states[layer.layer] = (x, ids)
        return compute(layer, x, ids)

    monkeypatch.setattr(StreamedLayer, "__call__", watched)
    waits = []
    evaluate = mx.eval
    with open_store(layout, 0.5) as store:
        monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(1), evaluate(*arrays)))
        source = Everything(store)
        model(mx.array([[7]]), source=source)
    assert len(waits) == len(layout.moe_layers)
    assert list(source.forecasts) == list(layout.moe_layers[1:])
    assert {len(set(experts)) for experts in source.forecasts.values()} == {2}
    for layer in (m for m in model.core.modules() if isinstance(m, StreamedLayer)):
        if layer._ahead is not None:
            number, choose = layer._ahead
            x, ids = states[number]
            assert set(choose(x).reshape(-1).tolist()) == set(ids.reshape(-1).tolist())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"intermediate_size": 1024}),
        ("gpt_oss", {"intermediate_size": 1024}),  # interleaved rows, transposed
        ("qwen3_moe-4bit", {"moe_intermediate_size": 2048}),
    ],
)
def test_no_expert_is_allocated_but_in_the_store(
    home: Path, name: str, changes: dict[str, Any]
) -> None:
    """Stand-ins have the experts' shapes and are never evaluated; slots are computed with where
    they lie."""
    (save_by_transformers if name in HUB else save_by_mlx_lm)(
        name, home / f"wide-{name}", **changes
    )
    pack(home / f"wide-{name}", home / f"wide-{name}-packed")
    layout = open_layout(home / f"wide-{name}-packed")
    dense = (layout.folder / "model.safetensors").stat().st_size
    assert layout.total_bytes > 20 * dense
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = backend.load(layout.folder, resident=False)
    assert mx.get_peak_memory() - before < 4 * dense
    with open_store(layout, 1.0) as store:
        runner = backend.runner(model, store)
        runner.prefill(PROMPT[:3], GREEDY)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        for token in range(5):
            runner.decode(token, GREEDY)
        assert mx.get_peak_memory() - held < layout.record_nbytes


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
    with open_store(layout, 0.5) as store:
        logits, _ = run(backend.load(layout.folder, resident=False), store)
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
    with open_store(layout, 0.5) as store:
        np.testing.assert_array_equal(run(model, store)[0], resident)
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


def test_replayed_ids_are_the_experts_used(folder: Callable[[str], Path]) -> None:
    layout = open_layout(packed(folder("qwen3_moe")))
    model = backend.load(layout.folder, resident=False)
    ids_TK = np.array([[6, 1]])
    with open_store(layout, 1.0) as store:
        runner = backend.runner(model, store)
        runner.recording = True
        runner.replay = lambda layer: (ids_TK + layer, np.full((1, 2), 0.5, np.float32))
        runner.decode(7, GREEDY)
        assert store.resident() == {(0, 6), (0, 1), (1, 7), (1, 2)}
    ids_TLK, weights_TLK = runner.routing()[0]
    np.testing.assert_array_equal(ids_TLK[0], [[6, 1], [7, 2]])
    assert weights_TLK is None  # a switch never sees them


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_shared_experts_stand_in(folder: Callable[[str], Path], name: str) -> None:
    layout = open_layout(packed(folder(name)))
    model = backend.load(layout.folder, resident=False)
    block = model.core.model.layers[1].mlp
    x_13D = mx.random.normal((1, 3, 32))
    seen = {}
    with open_store(layout, 1.0, miss="fallback") as store:
        model._call.source, model._call.routing = store, []
        y = values(block.switch_mlp(x_13D, mx.array([[[0, 1], [2, 1], [3, 0]]])))
        seen = store.stats()
        expected = block.shared_experts if name == "deepseek_v3" else block.shared_expert
        shared = expected(x_13D)
        if name == "qwen2_moe":
            shared = mx.sigmoid(block.shared_expert_gate(x_13D)) * shared
    np.testing.assert_array_equal(y, np.repeat(values(shared)[:, :, None], 2, axis=2))
    assert (seen.fallbacks, seen.fallback_weight) == (4, 3.0)


def test_fallback_needs_shared_experts(folder: Callable[[str], Path]) -> None:
    layout = open_layout(packed(folder("mixtral")))
    model = backend.load(layout.folder, resident=False)
    with (
        open_store(layout, 1.0, miss="fallback") as store,
        pytest.raises(UsageError, match="mixtral"),
    ):
        backend.runner(model, store).decode(7, GREEDY)


def changed(folder: Path, target: Path, **keys: Any) -> Path:
    """A copy of a folder with other keys in its config.json."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text()) | keys
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"model_file": "evil.py"}, "model_file"),
        ({"model_type": "unheard_of"}, "not supported"),
        ({"model_type": "../evil"}, "cannot build"),
        ({"model_type": "qwen3_moe"}, "cannot build"),
        ({"model_type": "llama"}, "does not run llama: .*without SwitchGLU"),
        ({"hidden_size": "wide"}, "cannot build"),
    ],
)
def test_refused_configs(
    folder: Callable[[str], Path], tmp_path: Path, keys: dict[str, Any], match: str
) -> None:
    at = changed(packed(folder("mixtral")), tmp_path / "model", **keys)
    with pytest.raises(ConfigError, match=match):
        backend.load(at, resident=False)


def test_experts_of_another_shape_are_refused(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    at = changed(packed(folder("mixtral")), tmp_path / "model", intermediate_size=48)
    with pytest.raises(ShapeMismatch, match=r"layer 0.*\(24, 32\).*wants.*\(48, 32\)"):
        backend.load(at, resident=False)


def test_a_dense_part_of_another_model_is_refused(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    at = changed(packed(folder("mixtral")), tmp_path / "model")
    save_by_transformers("mixtral", tmp_path / "other", num_hidden_layers=2, rms_norm_eps=0.1)
    pack(folder("granitemoe"), tmp_path / "granite")
    shutil.copy(tmp_path / "granite" / "model.safetensors", at)
    with pytest.raises(CorruptClusterError, match="another model"):
        open_layout(at)


@pytest.mark.parametrize("form", [Path, packed])
def test_a_truncated_file_is_refused(
    folder: Callable[[str], Path], tmp_path: Path, form: Callable[[Path], Path]
) -> None:
    at = changed(form(folder("mixtral")), tmp_path / "model")
    with (at / "model.safetensors").open("r+b") as file:
        file.truncate((at / "model.safetensors").stat().st_size - 100)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        backend.load(at, resident=form is Path)


def test_without_mlx_lm_the_way_to_get_it(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)
    with pytest.raises(MissingBackendError, match=r"pip install 'chronos-moe\[guests\]'") as caught:
        backend.load(packed(folder("mixtral")), resident=False)
    assert caught.value.exit_code == 5


def values(array: Any) -> np.ndarray:
    return np.array(array.astype(mx.float32))
