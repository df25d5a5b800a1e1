"""Guests on MLX: configs, folders and machines that are refused, each with its reason."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="tests of the MLX backend")
pytest.importorskip("mlx_lm.utils", reason="guests of the MLX backend")

import chronos.backends.mlx as backend  # noqa: E402
from chronos.backends.libraries import who_runs  # noqa: E402
from chronos.common.errors import (  # noqa: E402
    ConfigError,
    CorruptClusterError,
    CorruptFileError,
    MissingBackendError,
    ShapeMismatch,
    UsageError,
)
from chronos.common.layout import open_layout, pack  # noqa: E402
from chronos.run.sequence import OneSequence  # noqa: E402
from tests.support.mlx_guests import (  # noqa: E402
    GREEDY,
    HUB,
    QUANTISED,
    SAVED,
    changed,
    open_feed,
    packed,
    save_by_transformers,
)

pytestmark = pytest.mark.usefixtures("eager")


def test_fallback_needs_shared_experts(folder: Callable[[str], Path]) -> None:
    layout = open_layout(packed(folder("mixtral")))
    model = backend.load(layout.folder, resident=False)
    with (
        open_feed(layout, 1.0, miss="fallback") as store,
        pytest.raises(UsageError, match="mixtral"),
    ):
        OneSequence(backend.session(model, store)).prefill([7], GREEDY)


def test_a_scaling_that_the_library_leaves_out_is_told(
    folder: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0}
    keys = {"rope_parameters": scaled, "rope_scaling": scaled}
    for name, told in (("qwen3_moe", True), ("granitemoe", False)):
        caplog.clear()
        backend.load(changed(packed(folder(name)), tmp_path / name, **keys), resident=True)
        assert ("scales positions (yarn)" in caplog.text) == told


def test_pieces_of_a_prompt_whose_length_scales_positions(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """MLX-LM would take each piece for the whole prompt."""
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    keys = {"max_position_embeddings": 16, "rope_parameters": scaled, "rope_scaling": scaled}
    at = changed(packed(folder("granitemoe")), tmp_path / "model", **keys)
    model = backend.load(at, resident=True)
    runner = OneSequence(backend.session(model))
    runner.prefill(list(range(20)), GREEDY)  # in one piece: as MLX-LM computes it
    runner.reset()
    runner.prefill(list(range(8)), GREEDY, 16)
    runner.prefill(list(range(8)), GREEDY, 16)
    runner.reset()
    with pytest.raises(UsageError, match="beyond 16 tokens .* whole prompt") as caught:
        runner.prefill(list(range(8)), GREEDY, 20)
    assert "--backend torch" in caught.value.fix


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


@pytest.mark.parametrize("name", [*HUB, *SAVED, *QUANTISED])
def test_what_runs_is_what_inspect_says(name: str) -> None:
    assert who_runs(name.partition("-")[0], "mlx")[0].may_run
