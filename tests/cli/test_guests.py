"""Commands on a guest: the same streams, JSON, budgets and exit codes as on a native model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chronos.common.traces.trace import RoutingTrace
from tests.support.guests import tiny_guest

pytestmark = pytest.mark.needs_backend


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guest(tmp_path_factory.mktemp("guests") / "tiny")


def copy(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a model folder whose config.json says something else."""
    shutil.copytree(folder, to)
    data = json.loads((to / "config.json").read_text("utf-8"))
    (to / "config.json").write_text(json.dumps(data | config), "utf-8")
    return to


def test_generate_has_the_footer_and_the_json_of_a_native_model(
    chronos: Any, guest: Path, packed: Path, chosen: str
) -> None:
    flags = ("-p", "def add", "-n", 8, "--budget", "50%")
    done = chronos("generate", guest, *flags)
    starts = [line.partition(":")[0] for line in done.err.splitlines()]
    assert starts == ["prompt", "generation", "peak memory", "experts"]
    data = chronos("generate", guest, *flags, "--json").json
    native = chronos("generate", packed, *flags, "--json").json
    assert data.keys() == native.keys()
    assert data["stats"].keys() == native["stats"].keys()
    assert data["stats"]["limit"].keys() == native["stats"]["limit"].keys()
    assert done.out == data["text"] + "\n" and len(data["tokens"]) == 8
    assert data["backend"] == chosen
    assert data["budget_bytes"] * 2 == data["expert_bytes_total"]
    assert data["stats"]["peak_expert_bytes"] <= data["budget_bytes"]


def test_what_no_library_runs_is_not_packed_unless_asked_for(
    chronos: Any, guest: Path, tmp_path: Path
) -> None:
    source = copy(
        guest.with_name(guest.name + "-unpacked"), tmp_path / "src", model_type="of_no_library"
    )
    done = chronos("pack", source, "-o", tmp_path / "packed")
    assert done.code == 3 and "no library here runs of_no_library" in done.error[0]
    assert "--force" in "".join(done.error) and not (tmp_path / "packed").exists()
    assert chronos("pack", source, "-o", tmp_path / "packed", "--force").code == 0


def test_every_budget_gives_the_same_tokens(chronos: Any, guest: Path) -> None:
    flags = ("-p", "for line in", "-n", 12, "--json")
    source = guest.with_name(guest.name + "-unpacked")
    resident = chronos("generate", source, *flags).json
    for budget in ("25%", "all"):
        streamed = chronos("generate", guest, "--budget", budget, *flags).json
        assert streamed["tokens"] == resident["tokens"]
        assert streamed["expert_bytes_total"] == resident["expert_bytes_total"]


def test_generation_config_ends_a_reply(chronos: Any, guest: Path, tmp_path: Path) -> None:
    flags = ("-p", "def add", "-n", 8, "--json")
    first = chronos("generate", guest, *flags).json["tokens"][0]
    ending = Path(shutil.copytree(guest, tmp_path / "ending"))
    config = {"eos_token_id": [319, first]}
    (ending / "generation_config.json").write_text(json.dumps(config), "utf-8")
    data = chronos("generate", ending, *flags).json
    assert data["finish_reason"] == "stop" and data["tokens"] == []


def test_trace_and_eval(chronos: Any, guest: Path, text: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.npz"
    done = chronos("trace", guest, "--data", text, "-o", trace, "-n", 30, "--budget", "50%")
    assert done.code == 0, done.err
    recorded = RoutingTrace.load(trace)
    assert recorded.ids_TLK.shape == (30, 2, 2) and recorded.num_experts == 8
    source = guest.with_name(guest.name + "-unpacked")
    data = chronos("eval", source, "--data", text, "-n", 30, "--seq-len", 16, "--json").json
    assert 3 < data["loss"] < 20 and data["bits_per_byte"] > 0
    assert data["lookahead_recall"] == [] and 0 < data["locality"]["entropy"]


@pytest.mark.parametrize("name", ["absent/t.npz", "."])
def test_a_trace_that_could_not_be_saved_is_not_recorded(
    chronos: Any, guest: Path, text: Path, tmp_path: Path, name: str
) -> None:
    done = chronos("trace", guest, "--data", text, "-o", tmp_path / name, "-n", 30)
    assert done.code == 2 and done.error[1] == "where: --out"
    assert list(tmp_path.iterdir()) == []


def test_bench_compares_with_the_resident_guest(chronos: Any, guest: Path) -> None:
    pytest.importorskip("torch", reason="a packed guest is resident on torch only")
    flags = ("--budgets", "50%", "--rounds", 1, "-n", 4, "--backend", "torch", "--json")
    data = chronos("bench", guest, *flags).json
    assert [row["tokens_identical"] for row in data["budgets"]] == [True, True]


def test_refusals_have_their_exit_codes(chronos: Any, guest: Path, tmp_path: Path) -> None:
    source = guest.with_name(guest.name + "-unpacked")
    done = chronos("generate", source, "-p", "x", "--budget", "50%")
    assert done.code == 2 and "chronos pack" in done.error[-1]
    remote = copy(guest, tmp_path / "remote", auto_map={"AutoModelForCausalLM": "x.Y"})
    done = chronos("generate", remote, "-p", "x")
    assert done.code == 3 and "auto_map" in done.error[0]
    done = chronos("generate", guest, "-p", "x", "--miss", "fallback")
    assert done.code == 2 and "shared experts" in done.error[0]
    done = chronos("generate", guest, "-p", "x", "--budget", "1kB")
    assert done.code == 4 and "at least" in done.error[-1]


def test_a_missing_library_is_exit_5(command: list[str], guest: Path, tmp_path: Path) -> None:
    for name in ("transformers", "mlx_lm"):
        text = f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        (tmp_path / f"{name}.py").write_text(text, "utf-8")
    done = subprocess.run(
        [*command, "generate", str(guest), "-p", "x"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.splitlines()[-1].endswith("pip install 'chronos-moe[guests]'")
