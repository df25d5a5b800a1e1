"""inspect of recipes and traces: the numbers that the pages of `chronos ui` draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chronos.common.traces.trace import TraceRecorder

RECIPE = """
[model]
hidden_size = 32
num_hidden_layers = 2
head_dim = 16
num_experts = 8
num_experts_per_tok = 2
[pretrain]
batch_size = 2
seq_len = 16
"""


def test_a_recipe_is_explained(chronos: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    found = chronos("inspect", path, "--disk", "1GB", "--json").json
    assert [each["budget"] for each in found["budgets"]] == ["12.5%", "25%", "50%", "all"]
    half = found["budgets"][2]
    assert half["read_bytes_per_token"] == found["expert_bytes_per_token"] / 2
    assert half["tokens_per_s_at_most"] == 1e9 / half["read_bytes_per_token"]
    assert found["update"]["rows"] == 2 and found["update"]["seq_len"] == 16
    shown = chronos("inspect", path, "--budget", "25%").out
    assert "parameters" in shown and "budget 25%" in shown and "an update's total" in shown


def test_what_is_no_recipe_of_pretraining_is_refused(chronos: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[model]\nhiden_size = 4\n")
    done = chronos("inspect", tmp_path / "bad.toml")
    assert done.code == 3 and "did you mean 'hidden_size'?" in done.err
    assert chronos("inspect", tmp_path / "absent.toml").code == 2
    assert chronos("inspect", tmp_path / "bad.toml", "--disk", "fast").code == 2
    assert chronos("inspect", tmp_path / "bad.toml", "more").code == 2


def test_a_trace_is_explained(chronos: Any, tmp_path: Path) -> None:
    recorder = TraceRecorder(8, 2, model="it", layers=[0, 2])
    recorder.append(np.array([[[0, 1], [2, 3]], [[1, 0], [4, 5]], [[6, 7], [4, 3]]]))
    recorder.trace().save(tmp_path / "t.npz")
    found = chronos("inspect", tmp_path / "t.npz", "--tokens", 2, "--json").json
    assert (found["tokens"], found["experts"], found["top_k"]) == (3, 8, 2)
    first, second = found["by_layer"]
    assert (first["layer"], second["layer"]) == (0, 2)
    assert first["uses"] == [2, 2, 0, 0, 0, 0, 1, 1] and first["repeat"] == 0.5
    assert found["first_ids"] == [[[0, 1], [2, 3]], [[1, 0], [4, 5]]]
    assert found["locality"]["repeat"] == (first["repeat"] + second["repeat"]) / 2
    assert "picked again" in chronos("inspect", tmp_path / "t.npz").out
    (tmp_path / "t.npz").write_bytes(b"no archive")
    assert chronos("inspect", tmp_path / "t.npz").code == 3
