"""Checkpoints that the libraries themselves write: every record equals the module's own parameters.

Transformers saves most architectures under the names of their hub checkpoints, not of its modules;
MLX-LM saves its modules as they are. Either way the bytes of a record must be those that the
library computes with: one slice of each parameter of its experts module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chronos.common.disk.tensors import read_checkpoint
from chronos.common.layout import open_layout, pack, read_records
from chronos.common.layout.naming import expert_part
from chronos.common.model.guest import read_config
from tests.support.guests import ARCHITECTURES, BASE

UNGATED = {
    "nemotron_h": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 24, "head_dim": 8,
        "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2,
        "n_group": 1, "topk_group": 1, "hybrid_override_pattern": "ME*",
    }
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_flushing")


def records(folder: Path) -> Iterator[tuple[tuple[int, int], dict[str, bytes]]]:
    layout = open_layout(folder, config=read_config(folder))
    found = read_records([(layout.path(key), record) for key, record in layout.records.items()])
    for record, data in found:
        yield record.key, {name: bytes(view) for name, view in record.views(data).items()}


def layer_number(name: str) -> int:
    return int(name.partition("layers.")[2].partition(".")[0])


def save(model_type: str, folder: Path, *, shard: str = "5GB", **changes: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = BASE | (ARCHITECTURES | UNGATED)[model_type] | changes
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def experts_of(model: Any) -> dict[int, dict[str, Any]]:
    """The parameters of each layer's experts module, by their names in it."""
    found: dict[int, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if path.endswith(".experts"):
            found.setdefault(layer_number(name), {})[leaf] = parameter.detach()
    return found


@pytest.mark.parametrize("model_type", ARCHITECTURES | UNGATED)
def test_records_are_the_parameters_of_transformers_own_modules(
    model_type: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="tests of Transformers on torch")
    pytest.importorskip("transformers", reason="tests of Transformers on torch")
    sharded = model_type in ("mixtral", "gpt_oss")
    model = save(model_type, tmp_path / "src", shard="40KB" if sharded else "5GB")
    pack(tmp_path / "src", tmp_path / "dst")
    expected = experts_of(model)
    assert expected, "the model has no experts module that Chronos knows"
    seen = set()
    for (layer, expert), tensors in records(tmp_path / "dst"):
        assert tensors.keys() == expected[layer].keys()
        for name, data in tensors.items():
            value = expected[layer][name][expert].contiguous()
            assert data == value.view(torch.uint8).numpy().tobytes(), name
        seen.add((layer, expert))
    assert seen == {(layer, expert) for layer in expected for expert in range(4)}
    dense = {entry.name for entry, _ in read_checkpoint(tmp_path / "dst")}
    assert not [name for name in dense if "experts." in name.replace("shared_experts.", "")]
    if sharded:
        assert len(list((tmp_path / "src").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "jamba", "gemma4_text"]
)
def test_records_are_the_parameters_of_mlx_lms_own_modules(
    model_type: str, bits: int, tmp_path: Path
) -> None:
    mx = pytest.importorskip("mlx.core", reason="tests of MLX-LM")
    utils = pytest.importorskip("mlx_lm.utils", reason="tests of MLX-LM")
    pytest.importorskip("transformers", reason="tests of MLX-LM")
    from mlx.utils import tree_flatten

    save(model_type, tmp_path / "hub")
    model, config = utils.load_model(tmp_path / "hub")
    if bits:
        model, config = utils.quantize_model(
            model, config, group_size=32, bits=bits, quant_predicate=divides
        )
    utils.save_model(tmp_path / "src", model, donate_model=False)
    utils.save_config(config, config_path=tmp_path / "src/config.json")
    pack(tmp_path / "src", tmp_path / "dst")
    stacks = {
        name: value
        for name, value in tree_flatten(model.parameters())
        if ".switch_mlp." in name or ".switch_glu." in name
    }
    checked = 0
    for (layer, expert), tensors in records(tmp_path / "dst"):
        for name, data in tensors.items():
            (value,) = [
                value
                for full, value in stacks.items()
                if layer_number(full) == layer and full.endswith(f".{name}")
            ]
            assert data == bytes(mx.contiguous(value[expert]).view(mx.uint8)), name
            checked += len(data)
    assert checked == sum(value.nbytes for value in stacks.values())
    if bits:
        assert any(name.endswith(".scales") for name in stacks)


def divides(path: str, module: Any) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def test_calibration_runs_the_packed_guest_and_reorders_it_where_that_pays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same tokens before and after; a second run finds nothing left to do."""
    pytest.importorskip("torch", reason="tests of Transformers on torch")
    pytest.importorskip("transformers", reason="tests of Transformers on torch")
    from chronos.cli import main
    from chronos.testing.tiny import TEXTS, tiny_tokenizer

    source, target, text = tmp_path / "src", tmp_path / "dst", tmp_path / "text.txt"
    save("mixtral", source, vocab_size=300, num_local_experts=16)
    tiny_tokenizer(300).save(source)
    text.write_text("".join(TEXTS) * 20)
    backend = ("--backend", "torch")

    def tokens() -> Any:
        capsys.readouterr()
        flags = ("-p", "def", "-n", "6", "--budget", "25%", "--json", *backend)
        assert main.run(["generate", str(target), *flags]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    assert main.run(["pack", str(source), "-o", str(target)]) == 0
    before = tokens()
    command = ["pack", str(source), "-o", str(target), "--calibrate", str(text), *backend]
    assert main.run(command) == 0
    assert "separate reads" in capsys.readouterr().err
    order = open_layout(target).manifest.order["method"]
    assert len(open_layout(target).files) > 3 if order == "clusters" else order == "layer"
    assert tokens() == before
    files = {path: path.stat().st_mtime_ns for path in target.rglob("*.ctsr")}
    assert main.run(command) == 0
    assert files == {path: path.stat().st_mtime_ns for path in target.rglob("*.ctsr")}


# Checkpoints whose experts Transformers rearranges while loading: their bytes are not the module's.
REARRANGED = {
    "inkling_mm_model", "inkling2_text", "nemo_speechlm", "qwen3_vl_moe", "ernie4_5_vl_moe",
    "dots3_note_vision_encoder", "step3p7",
}  # fmt: skip


def test_the_table_of_names_agrees_with_transformers_own() -> None:
    """Every mapping from names of the hub to parameters of an experts module that it ships."""
    pytest.importorskip("transformers", reason="tests of Transformers")
    from transformers import conversion_mapping

    checked = set()
    for model_type, transforms in conversion_mapping._build_checkpoint_conversion_mapping().items():
        if model_type in REARRANGED:
            continue
        for transform in transforms:
            target = transform.target_patterns[0].replace("\\", "")
            path, _, leaf = target.rpartition(".")
            if not path.endswith("experts") or leaf not in ("gate_up_proj", "up_proj", "down_proj"):
                continue
            for place, pattern in enumerate(transform.source_patterns):
                name = pattern.replace("\\", "").replace("*", "3").strip(".")
                part = expert_part(f"model.layers.1.{name}")
                assert part is not None, pattern
                ungated = leaf == "up_proj"  # told from a second part by the first's absence
                wanted = ("gate_up_proj", 1) if ungated else (leaf, place)
                assert (part.tensor, part.place) == wanted, (model_type, pattern)
            checked.add(model_type)
    assert len(checked) > 20
