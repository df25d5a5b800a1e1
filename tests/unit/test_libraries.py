"""Who runs an architecture, told from a library's source: stand-ins for the installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chronos.backends.libraries import who_runs

TEXT_MODELS = """MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict(
    [
        ("mixtral", "MixtralForCausalLM"),
        ("llama4_text", "Llama4ForCausalLM"),
    ]
)
MODEL_FOR_PRETRAINING_MAPPING_NAMES = OrderedDict(
    [
        ("vision_moe", "VisionMoe"),
    ]
)
"""
SOURCES = {
    "transformers/models/auto/modeling_auto.py": TEXT_MODELS,
    "transformers/models/mixtral/modeling_mixtral.py": "@use_experts_implementation\nclass X: ...",
    "transformers/models/llama4/modeling_llama4.py": "class Llama4TextExperts: ...",
    "mlx_lm/utils.py": 'MODEL_REMAPPING = {\n    "kimi_k2": "deepseek_v3",  # the same\n}\n',
    "mlx_lm/models/switch_layers.py": "class SwitchGLU(nn.Module):\n    x = SwitchGLU()",
    "mlx_lm/models/mixtral.py": "from .switch_layers import SwitchGLU\nx = SwitchGLU(3)",
    "mlx_lm/models/deepseek_v3.py": "x = SwitchGLU(3)",
    "mlx_lm/models/child.py": "from . import base, mixtral\n",
    "mlx_lm/models/grandchild.py": "from .child import (\n    Model,\n)\n",
    "mlx_lm/models/dbrx.py": "from .switch_layers import SwitchGLU\nfrom .dbrx import x\n",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")

    def find_spec(name: str) -> Any:
        home = tmp_path / name
        return SimpleNamespace(submodule_search_locations=[home]) if home.is_dir() else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return tmp_path


@pytest.mark.parametrize(
    ("model_type", "torch", "mlx"),
    [
        ("mixtral", "Transformers on torch, as far", "MLX-LM on mlx, as far"),
        ("llama4_text", "its llama4_text computes experts in a way", "has no model llama4_text"),
        ("vision_moe", "has no text model vision_moe", "has no model vision_moe"),
        ("kimi_k2", "has no text model kimi_k2", "MLX-LM on mlx, as far"),
        ("child", "has no text model", "MLX-LM on mlx, as far"),
        ("grandchild", "has no text model", "MLX-LM on mlx, as far"),
        ("dbrx", "has no text model", "its dbrx computes experts in a way"),
        ("../models/mixtral", "has no text model", "has no model ../models"),
        ("nul\0", "has no text model", "has no model nul"),
    ],
)
def test_a_no_gives_its_reason(installed: Path, model_type: str, torch: str, mlx: str) -> None:
    verdicts = who_runs(model_type, "transformers")
    for verdict, words in zip(verdicts, (torch, mlx), strict=True):
        assert words in verdict.text
        assert verdict.may_run is not verdict.text.startswith("not ")
        assert verdict.may_run is words.endswith(", as far")


def test_records_decide_which_library_is_asked(installed: Path) -> None:
    def asked(model_type: str, dialect: str) -> list[str]:
        return [v.text.split(",")[0] for v in who_runs(model_type, dialect)]

    assert asked("mixtral", "mlx") == ["MLX-LM on mlx", "Transformers on torch"]
    assert asked("deepseek_v3", "mlx") == ["MLX-LM on mlx"]  # whose attention MLX-LM rearranges
    assert asked("mixtral", "quantised") == ["Transformers on torch"]
    assert [v.text for v in who_runs("chronos", "chronos")] == ["Chronos"]


def test_what_is_not_installed_may_run_it_and_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for verdict in who_runs("mixtral", "transformers"):
        assert verdict.may_run and "pip install 'chronos-moe[guests]'" in verdict.text
