"""Checkpoints as they are published, quantised, on torch: the bits of the dequantised checkpoint.

The reference is Transformers' resident run of the plain model that the quantised one stands for
(`tests/support/quantised.py` says how it is made, by other code than Chronos').
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import chronos
from chronos import kernels as native_kernels
from chronos.backends.torch import kernels, products
from chronos.backends.torch.checkpoint import dequantised_bytes
from chronos.backends.torch.codecs import codec_of
from chronos.backends.torch.quantised import dequantised
from chronos.cli import main
from chronos.common.disk.tensors import read_checkpoint, write_tensors
from chronos.common.errors import ConfigError, ShapeMismatch
from chronos.common.layout import inspect, open_layout, pack, read_records, unpack, verify
from chronos.common.layout.quantised import shape_of
from chronos.common.text.sampling import PIECE
from tests.native.test_transformers_guests import by_engine, by_library
from tests.support import company, quantised
from tests.support.guests import ARCHITECTURES, BASE
from tests.support.quantised import FORMATS

PROMPT = np.random.default_rng(1).integers(3, 64, 40).tolist()
BLOCKS = ("mlp", "block_sparse_moe")
# Where a format needs groups of 32 or 16 columns; FP8's widths are no multiples of its blocks.
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "shared_expert_intermediate_size": 32,
}
CASES = {
    "fp4": "deepseek_v3", "mxfp8": "qwen3_moe",
    "mxfp4": "gpt_oss", "fp8": "deepseek_v3", "fp8-e8m0": "qwen3_moe", "int4": "qwen3_moe",
    "int4-asym": "deepseek_v3", "int8": "qwen3_moe", "float": "glm4_moe", "ct-mxfp4": "mixtral",
    "ct-mxfp8": "qwen3_moe", "ct-nvfp4": "qwen3_moe", "gptq": "qwen3_moe",
    "gptq2": "qwen2_moe", "gptq8": "olmoe", "awq": "mixtral",
    "mlx-affine4": "qwen3_moe", "mlx-affine3": "olmoe",
    "mlx-affine6": "dots1", "mlx-affine8": "glm4_moe", "mlx-mxfp4": "gpt_oss",
    "mlx-mxfp8": "mixtral", "mlx-nvfp4": "phimoe",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_flushing")


@dataclass
class Guest:
    model: Any  # the library's, with the values that the quantised one stands for
    source: Path
    packed: Path


def chosen(name: str, key: str) -> bool:
    """What a format's checkpoints have quantised: of gpt-oss experts, of MLX-LM all, of others
    experts and attention."""
    if name == "mxfp4":
        return ".experts." in key
    if name.startswith("mlx"):
        return "norm" not in key and key.endswith(("weight", "_proj"))
    return ".experts." in key or "_proj.weight" in key or "kv_a_proj" in key


def build(model_type: str, dtype: torch.dtype, wide: bool, **changes: Any) -> Any:
    torch.manual_seed(1)
    settings = BASE | {"initializer_range": 0.3} | ARCHITECTURES[model_type]
    if wide:
        settings |= {k: v for k, v in WIDE.items() if k in settings}
    config = transformers.AutoConfig.for_model(model_type, **(settings | changes))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Guest]:
    made: dict[Any, Guest] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Guest:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            model = build(CASES[name], dtype, not name.startswith("fp8"))
            quantised.save(model, folder / "source", name, partial(chosen, name))
            pack(folder / "source", folder / "packed")
            made[name, dtype] = Guest(model, folder / "source", folder / "packed")
        return made[name, dtype]

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_it_has_the_bits_of_the_dequantised_checkpoint(
    name: str, dtype: torch.dtype, guest: Callable[..., Guest]
) -> None:
    tiny = guest(name, dtype)
    layout = open_layout(tiny.packed)
    assert set(layout.encodings.values()) == {FORMATS[name][1]}
    expected = by_library(tiny.model, PROMPT)
    some = (2 * layout.record_nbytes, "all") if dtype == torch.float32 else ("50%", "resident")
    for budget in some:
        with chronos.load(tiny.packed, backend="torch", budget=budget) as engine:
            np.testing.assert_array_equal(by_engine(engine, PROMPT), expected)
            if engine.feed is not None:
                assert engine.feed.stats().peak_expert_bytes <= engine.budget_bytes


def test_a_process_of_its_own_loads_it(guest: Callable[..., Guest]) -> None:
    """As the command line does, without what torch imports for compilers alone."""
    code = """if True:
        import sys
        from chronos import load
        for folder in sys.argv[1:]:
            with load(folder, backend="torch", budget="50%", own_process=True) as engine:
                print(len(engine.generate([5, 6], max_tokens=2).result.tokens))
    """
    folders = [guest(name).packed for name in ("mxfp4", "fp8", "int4")]
    command = [sys.executable, "-c", code, *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["2", "2", "2"], done.stderr[-2000:]


def test_a_process_that_imports_less_of_torch_draws_numbers_and_tries_its_kernels() -> None:
    code = """if True:
        from chronos.backends.startup import fast_import
        with fast_import("torch", own_process=True):
            import torch
        from chronos.backends.torch.kernels import multiplies_wide
        multiplies_wide()  # its trial draws numbers
        print(torch.Generator().manual_seed(3).initial_seed())
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["3"], done.stderr[-2000:]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_bits_of_mlx_lie_across_words(bits: int) -> None:
    weight_NK = torch.randn(24, 128, generator=torch.Generator().manual_seed(bits))
    kinds, expected = quantised.mlx(weight_NK, bits=bits, group=64)
    found = dequantised(f"mlx-affine{bits}", kinds, torch.float32)
    assert shape_of(f"mlx-affine{bits}", described(kinds), "x") == (24, 128)
    assert torch.equal(found, expected)


@pytest.fixture
def tried() -> Iterator[None]:
    """Nothing is known of trials with another library behind torch's products."""
    known = (codec_of, products._packs, products._has_onednn)
    for each in known:
        each.cache_clear()
    yield
    for each in known:
        each.cache_clear()


@pytest.mark.usefixtures("tried")
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("name", ["mxfp4", "mlx-affine4", "gptq", "awq"])
def test_kernels_compute_single_tokens_alone_and_in_company_where_they_have_the_bits(
    name: str, onednn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of experts large enough that the library computes as kernels do, with two threads; and with
    ATen's own products, which CPUs have without AVX-512."""
    if not native_kernels.available():
        pytest.skip("no kernels: not compiled, or none for this CPU")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn)
    wide = {"gpt_oss": {"intermediate_size": 128}}.get(CASES[name], {"moe_intermediate_size": 128})
    model = build(CASES[name], torch.bfloat16, True, hidden_size=128, **wide)
    quantised.save(model, tmp_path / "source", name, partial(chosen, name))
    pack(tmp_path / "source", tmp_path / "packed")
    rows: list[int] = []
    real = kernels.multiply

    def counted(x: Any, matrices: Any, owners: Any) -> Any:
        rows.append(len(x))
        return real(x, matrices, owners)

    monkeypatch.setattr(kernels, "multiply", counted)
    expected = by_library(model, PROMPT)
    prompts, tokens = [PROMPT[:1], PROMPT[:5], PROMPT[:5], PROMPT[3:9]], [9, 8, 7]
    with chronos.load(tmp_path / "packed", backend="torch", budget="50%") as engine:
        by_engine(engine, PROMPT)  # with trials of what is new
        rows.clear()
        np.testing.assert_array_equal(by_engine(engine, PROMPT), expected)
        assert set(rows) == {1}
        engine.session.drop(0)
        together = company.together(engine.session, prompts, tokens)
        assert max(rows) > 1
    monkeypatch.setenv("CHRONOS_KERNEL", "off")
    rows.clear()
    with chronos.load(tmp_path / "packed", backend="torch", budget="50%") as engine:
        np.testing.assert_array_equal(by_engine(engine, PROMPT), expected)
        alone = [company.alone(engine.session, prompt, tokens) for prompt in prompts]
    assert not rows
    for mine, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def described(kinds: dict[str, torch.Tensor]) -> Any:
    names = {torch.uint32: "U32", torch.bfloat16: "BF16"}
    return {kind: (names[tensor.dtype], tuple(tensor.shape)) for kind, tensor in kinds.items()}


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "int4-asym", "mlx-affine4"])
def test_prompts_of_many_tokens_have_the_same_bits(name: str, tmp_path: Path) -> None:
    model = build(CASES[name], torch.bfloat16, name != "fp8", max_position_embeddings=2048)
    quantised.save(model, tmp_path / "source", name, partial(chosen, name))
    pack(tmp_path / "source", tmp_path / "packed")
    prompt = (PROMPT * 28)[:1100]
    expected = by_pieces(model, prompt)
    budget = 2 * open_layout(tmp_path / "packed").record_nbytes
    with chronos.load(tmp_path / "packed", backend="torch", budget=budget) as engine:
        np.testing.assert_array_equal(by_engine(engine, prompt, 1), expected)


def by_pieces(model: Any, prompt: list[int]) -> list[np.ndarray]:
    """The library's logits where its prompts come in the pieces of ours, and one token more."""
    cache, found = transformers.DynamicCache(config=model.config), []
    pieces = [prompt[at : at + PIECE] for at in range(0, len(prompt), PIECE)]
    with torch.inference_mode():
        for ids in pieces:
            out = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
        found.append(out.logits[0, -1].float().numpy())
        ids = torch.tensor([[int(found[-1].argmax())]])
        out = model(ids, past_key_values=cache, logits_to_keep=1)
        found.append(out.logits[0, -1].float().numpy())
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_record_has_the_bytes_of_the_source(name: str, guest: Callable[..., Guest]) -> None:
    """Each tensor of each expert: a tensor of the source, or a slice of one."""
    tiny, names, compared = guest(name), {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}, 0
    with closing(read_checkpoint(tiny.source)) as stream:
        source = {entry.name: (entry.shape, bytes(data)) for entry, data in stream}
    layout = open_layout(tiny.packed)
    for record, data in read_records([(layout.path(k), r) for k, r in layout.records.items()]):
        layer, expert = record.key
        for tensor, view in record.views(data).items():
            matrix, _, kind = tensor.partition(".")
            ways = [f"switch_mlp.{tensor}", f"experts.{tensor}", f"experts.{expert}.{tensor}"]
            ways.append(f"experts.{expert}.{names.get(matrix, matrix)}.{kind}")
            at = [f"model.layers.{layer}.{b}.{way}" for b in BLOCKS for way in ways]
            (key,) = source.keys() & set(at)
            shape, stored = source[key]
            if f"experts.{expert}." not in key:
                size = len(stored) // shape[0]
                stored = stored[expert * size : (expert + 1) * size]
            assert bytes(view) == stored
            compared += 1
    assert compared == sum(len(record.tensors) for record in layout.records.values()) > 0


@pytest.mark.parametrize("name", CASES)
def test_unpack_gives_the_checkpoint_back(
    name: str, guest: Callable[..., Guest], tmp_path: Path
) -> None:
    tiny = guest(name, torch.bfloat16)
    report = unpack(tiny.packed, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(tiny.source)
    assert report.tensors == len(contents(tiny.source))
    config = (tiny.source / "config.json").read_bytes()
    assert (tmp_path / "same/config.json").read_bytes() == config


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("mlx")])
def test_unpacked_and_dequantised_it_is_the_plain_checkpoint(
    name: str, guest: Callable[..., Guest], tmp_path: Path
) -> None:
    tiny = guest(name, torch.bfloat16)
    out = str(tmp_path / "plain")
    assert main.run(["unpack", str(tiny.packed), "--dequantize", "-o", out]) == 0
    assert contents(tmp_path / "plain") == contents(tiny.source.with_name("source-plain"))
    assert "quantization" not in (tmp_path / "plain/config.json").read_text()
    pack(tmp_path / "plain", tmp_path / "packed")
    with chronos.load(tmp_path / "packed", backend="torch", budget="50%") as engine:
        np.testing.assert_array_equal(by_engine(engine, PROMPT), by_library(tiny.model, PROMPT))


def test_a_dequantised_mlx_folder_is_one_of_mlx_lm_and_runs(
    guest: Callable[..., Guest], tmp_path: Path
) -> None:
    tiny = guest("mlx-affine4", torch.bfloat16)
    unpack(tiny.packed, tmp_path / "plain", dequantise=dequantised_bytes)
    pack(tmp_path / "plain", tmp_path / "packed")
    assert set(open_layout(tmp_path / "packed").encodings.values()) == {"mlx"}
    with chronos.load(tmp_path / "packed", backend="torch", budget="50%") as engine:
        np.testing.assert_array_equal(by_engine(engine, PROMPT), by_library(tiny.model, PROMPT))


V4 = {
    "vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 32,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "o_groups": 2,
    "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4,
    "sliding_window": 16, "max_position_embeddings": 64, "initializer_range": 0.3,
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def test_deepseek_v4_as_it_is_published(tmp_path: Path) -> None:
    """Its own names, experts in FP4, attention in FP8 with powers of two, a table of experts."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model("deepseek_v4", **V4)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    gate = model.model.layers[0].mlp.gate
    gate.tid2eid.copy_(torch.stack([torch.randperm(4)[:2] for _ in range(64)]))
    attention = tuple(f".attn.{name}.weight" for name in ("wq_a", "wq_b", "wkv", "wo_b"))
    quantised.save(
        model, tmp_path / "source", "fp4", lambda k: ".experts." in k or k.endswith(attention)
    )
    with closing(read_checkpoint(tmp_path / "source")) as stream:
        published = [
            (e.name.removeprefix("model.").replace("embed_tokens", "embed"), *e[1:3], bytes(data))
            for e, data in stream
        ]
    write_tensors(tmp_path / "source/model.safetensors", published, {"format": "pt"})
    pack(tmp_path / "source", tmp_path / "packed")
    layout = open_layout(tmp_path / "packed")
    assert set(layout.encodings.values()) == {"fp4"}
    expected = by_library(model, PROMPT)
    for budget in (str(2 * layout.record_nbytes), "50%", "all"):
        with chronos.load(tmp_path / "packed", backend="torch", budget=budget) as engine:
            np.testing.assert_array_equal(by_engine(engine, PROMPT), expected)


def contents(folder: Path) -> dict[str, Any]:
    with closing(read_checkpoint(folder)) as stream:
        return {entry.name: (entry.dtype, entry.shape, bytes(data)) for entry, data in stream}


def test_inspect_and_verify_show_them_as_stored(guest: Callable[..., Guest]) -> None:
    tiny = guest("fp8")
    found = inspect(tiny.packed)
    assert (found["encoding"], found["quantization"]) == (FORMATS["fp8"][1], "fp8")
    assert found["expert_bytes"] == open_layout(tiny.packed).record_nbytes
    held = sum(p.nbytes for n, p in tiny.model.named_parameters() if ".experts." not in n)
    buffers = sum(b.nbytes for n, b in tiny.model.named_buffers() if "correction_bias" in n)
    assert found["dense_bytes"] < found["dense_memory_bytes"] == held + buffers
    assert verify(tiny.packed).encodings == [FORMATS["fp8"][1]]


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "torchao", "foo"])
def test_what_is_not_computed_is_refused_with_the_way_out(
    method: str, guest: Callable[..., Guest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(guest("fp8").source, tmp_path / "source")
    path = tmp_path / "source/config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(config))
    assert main.run(["pack", str(path.parent), "-o", str(tmp_path / "packed")]) == 3
    error = capsys.readouterr().err
    assert f"quantised ({method})" in error and "convert it with MLX-LM" in error
    assert not (tmp_path / "packed").exists()


def test_a_quantised_checkpoint_is_packed_before_it_runs(guest: Callable[..., Guest]) -> None:
    with pytest.raises(ConfigError, match="quantised .fp8.: only packed(.|\n)*chronos pack"):
        chronos.load(guest("fp8").source, backend="torch", budget="resident")


def test_an_mlx_folder_of_other_weights_is_refused(
    guest: Callable[..., Guest], tmp_path: Path
) -> None:
    """Also where it is not quantised: MLX-LM may have shifted norms and split matrices."""
    tiny = guest("mlx-affine4", torch.bfloat16)
    unpack(tiny.packed, tmp_path / "plain", dequantise=dequantised_bytes)
    path = tmp_path / "plain/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen3_next"}))
    pack(tmp_path / "plain", tmp_path / "packed")
    with pytest.raises(ConfigError, match="MLX-LM's qwen3_next has not the weights"):
        chronos.load(tmp_path / "packed", backend="torch", budget="50%")


def test_mlx_says_that_it_computes_with_no_such_checkpoint(guest: Callable[..., Guest]) -> None:
    pytest.importorskip("mlx_lm")
    with pytest.raises(ConfigError, match="quantised .fp8.(.|\n)*--backend torch"):
        chronos.load(guest("fp8").packed, backend="mlx", budget="50%")


def test_wrong_shapes_beside_the_experts_are_named(
    guest: Callable[..., Guest], tmp_path: Path
) -> None:
    """Of what config.json says now and said not when the folder was packed."""
    folder = Path(shutil.copytree(guest("fp8").packed, tmp_path / "packed"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [8, 8]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeMismatch, match="is no matrix as fp8-8x8 stores them"):
        chronos.load(folder, backend="torch", budget="50%")
