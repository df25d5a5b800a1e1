"""Numbers that commands print add up, in each command and between them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from chronos.cli import footer
from chronos.common.layout import open_layout
from chronos.common.tuning import Load
from chronos.measure.benchmark import Runs
from chronos.run.engine import load

pytestmark = pytest.mark.needs_backend
PROMPT = ("-p", "def add(left, right):", "--temp", 0)


def adds_up(stats: dict[str, Any], record: int, *, exactly: bool = False) -> None:
    """exactly: no read ahead of need is under way at either end."""
    for of in ("", "decode_"):
        hits, late, misses = (stats[f"{of}{name}"] for name in ("hits", "late", "misses"))
        assert hits + late + misses == stats[f"{of}routed"]
        assert stats[f"{of}bytes_read"] % record == 0
        asked = misses * record + stats[f"{of}bytes_prefetched"] + stats[f"{of}bytes_loaded"]
        if exactly:
            assert stats[f"{of}bytes_read"] == asked
        elif not of:  # some of what was asked for may not have come yet
            assert stats["bytes_read"] <= asked
    for name in ("routed", "hits", "misses", "bytes_read", "stall_s"):
        assert stats[f"decode_{name}"] <= stats[name]


@pytest.mark.parametrize("prefetch", ["auto", "off"])
def test_generates_numbers_add_up(chronos: Any, packed: Path, prefetch: str) -> None:
    record, off = open_layout(packed).record_nbytes, prefetch == "off"
    flags = ("--budget", "50%", "--prefetch", prefetch, "-n", 20)
    data = chronos("generate", packed, *PROMPT, *flags, "--json").json
    adds_up(data["stats"], record, exactly=off)
    assert data["stats"]["decode_tokens"] == 19  # the last one is not fed back
    layout = open_layout(packed)
    assert data["stats"]["decode_routed"] == 19 * layout.num_layers * 2
    assert data["stats"]["misses"] > 0


def test_the_footer_tells_of_the_decoded_tokens_alone(chronos: Any, packed: Path) -> None:
    """What it prints can be multiplied out: misses of a token are what is read for it."""
    flags = ("--budget", "50%", "--prefetch", "off", "--predictor", "lfu", "-n", 20)
    stats = chronos("generate", packed, *PROMPT, *flags, "--json").json["stats"]
    shown = chronos("generate", packed, *PROMPT, *flags).err
    hits = float(re.search(r"([\d.]+) % hits", shown)[1]) / 100  # type: ignore[index]
    read = float(re.search(r"read ([\d.]+) MB/token", shown)[1])  # type: ignore[index]
    record, tokens = open_layout(packed).record_nbytes, stats["decode_tokens"]
    assert hits == pytest.approx(stats["decode_hits"] / stats["decode_routed"], abs=0.0005)
    assert read * 1e6 == pytest.approx(
        (1 - hits) * stats["decode_routed"] * record / tokens, abs=0.001 * record + 1000
    )
    assert "after the prompt" in shown


def test_all_is_told_as_resident_plus_loading(chronos: Any, packed: Path) -> None:
    data = chronos("generate", packed, *PROMPT, "-n", 12, "--json").json
    stats = data["stats"]
    adds_up(stats, open_layout(packed).record_nbytes)
    assert stats["bytes_prefetched"] == stats["prefetch_hits"] == stats["bytes_wasted"] == 0
    assert stats["prefetch_recall"] is None and stats["limit"] is None
    assert stats["misses"] == 0 and stats["late"] == stats["late_loading"]
    assert stats["bytes_loaded"] == stats["bytes_read"] <= data["expert_bytes_total"]
    [line] = [x for x in chronos("generate", packed, *PROMPT).err.splitlines() if "experts" in x]
    assert "in memory" in line and "limit" not in line and "hits" not in line


def test_replaced_experts_have_no_share_of_the_limit(chronos: Any, packed: Path) -> None:
    flags = (*PROMPT, "-n", 20, "--budget", "25%", "--miss", "fallback")
    stats = chronos("generate", packed, *flags, "--json").json["stats"]
    assert stats["decode_fallbacks"] > 0 and stats["limit"] is None
    shown = chronos("generate", packed, *flags).err
    assert "replaced by the shared expert" in shown and "of the limit" not in shown


def test_a_run_has_the_same_share_of_the_limit_in_every_command(packed: Path) -> None:
    """generate knows of no resident run; demo, bench and replay have measured one."""
    with load(packed, budget="50%") as engine:
        result = engine.generate(list(range(20)), max_tokens=24, record=True).result
        alone = engine.limit(result)
        beside = engine.limit(result, resident_token_s=1e-6)
    assert alone is not None and beside is not None
    assert alone["eta_limit"] == beside["eta_limit"]
    assert alone["eta_ideal"] is None and beside["eta_ideal"] <= beside["eta_limit"]
    busy_s = (result.stats["decode_s"] - result.stats["decode_stall_s"]) / 23
    token_s = result.stats["decode_s"] / 23
    assert alone["t_limit_s"] >= busy_s * (1 - 1e-9)
    assert alone["eta_limit"] == pytest.approx(alone["t_limit_s"] / token_s)


def test_every_command_says_what_the_share_is_of(chronos: Any, packed: Path, trace: Path) -> None:
    def words(text: str) -> str:
        return " ".join(text.split())

    said = "perfect foresight would reach with that memory and this disk"
    assert said in words(footer.LIMIT)
    assert said in words(chronos("demo", packed, "-n", 6).out)
    flags = ("-n", 4, "--rounds", 1, "--budgets", "50%")
    assert said in words(chronos("bench", packed, *flags).err)
    small = ("--expert-size", "200kB", "-n", 3, "--warmup", 2, "--epochs", 0, "--budgets", "50%")
    assert said in words(chronos("bench", "replay", trace, *small).err)


def test_ratios_of_bench_are_those_of_the_medians_it_prints(chronos: Any, packed: Path) -> None:
    flags = ("-n", 6, "--rounds", 3, "--budgets", "all,50%", "--json")
    rows = chronos("bench", packed, *PROMPT[:2], *flags).json["budgets"]
    for row in rows:
        speeds = sorted(row["decode_tps"])
        assert row["decode_tps_median"] == speeds[1]
        assert row["spread"] == pytest.approx((speeds[2] - speeds[0]) / speeds[1])
        assert row["ratio_to_resident"] == pytest.approx(speeds[1] / rows[0]["decode_tps_median"])
        record = open_layout(packed).record_nbytes
        for stats in row["stats"] if row["budget"] != "resident" else []:
            adds_up(stats, record)


@pytest.mark.parametrize("spread", [0.5, 0.1])
def test_a_disturbed_bench_says_so(
    chronos: Any, packed: Path, monkeypatch: pytest.MonkeyPatch, spread: float
) -> None:
    monkeypatch.setattr(Runs, "spread", lambda self: spread)
    done = chronos("bench", packed, "-n", 2, "--rounds", 2, "--budgets", "50%")
    assert f"{100 * spread:.1f} %" in done.out
    assert ("Rounds lie far apart" in done.err) == (spread == 0.5)


def test_the_numbers_of_demo_and_replay_add_up(chronos: Any, packed: Path, trace: Path) -> None:
    record = open_layout(packed).record_nbytes
    whole, part = chronos("demo", packed, "-n", 8, "--budget", "50%", "--json").json["runs"]
    assert whole["stats"]["routed"] == 0 and whole["tokens"] == part["tokens"]
    adds_up(part["stats"], record)
    small = ("--expert-size", "200kB", "-n", 6, "--warmup", 2, "--epochs", 0, "--budgets", "50%")
    data = chronos("bench", "replay", trace, *small, "--json").json
    assert "lfu: half of the turns" in chronos("bench", "replay", trace, *small).err
    for run in data["runs"][1:]:
        low, high = run["ratio_to_off_middle_half"]
        assert 0 < low <= run["ratio_to_off"] <= high
        [found] = run["rounds"]
        stats, config = found["stats"], data["config"]
        needs = config["num_hidden_layers"] * config["num_experts_per_tok"]
        assert stats["decode_routed"] == needs * found["tokens"]
        assert found["bytes_read_per_token"] * found["tokens"] == stats["decode_bytes_read"]
        size = stats["decode_bytes_read"] // max(1, stats["decode_misses"])
        adds_up(stats, size, exactly=run["run"] == "off")


def test_what_the_limit_takes_of_memory_is_not_the_runs(
    chronos: Any, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def limit(*_: Any, **__: Any) -> None:
        seen.append("limit")

    def peak() -> int:
        seen.append("peak")
        return 1_000_000 * (1 + seen.count("limit"))

    monkeypatch.setattr("chronos.run.engine.Engine.limit", limit)
    monkeypatch.setattr(footer, "peak_memory", peak)
    flags = ("--budget", "50%", "-n", 4)
    assert chronos("generate", packed, *PROMPT, *flags, "--json").json["peak_memory_bytes"] == 1e6
    seen.clear()
    assert "peak memory: 1.00 MB" in chronos("generate", packed, *PROMPT, *flags).err


def test_one_thread_is_not_told_to_take_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footer, "machine_load", lambda: Load(5.0, 2))
    assert "--threads 1 is steadiest" in footer.busy(2)[0]
    assert "busy" in footer.busy(1)[0] and "--threads" not in footer.busy(1)[0]


def test_inspect_tells_the_size_of_all_files(chronos: Any, packed: Path) -> None:
    data = chronos("inspect", packed, "--json").json
    files = [path for path in packed.rglob("*") if path.is_file()]
    assert data["folder_bytes"] == sum(path.stat().st_size for path in files)
    assert data["bytes"] == data["dense_bytes"] + data["expert_bytes_total"]
    half = chronos("inspect", packed, "--budget", "50%", "--json").json
    assert "--budget 50%" in half["next"] and "--budget 25%" in data["next"]


def test_nothing_is_shown_beyond_the_limit() -> None:
    """The disk gave more than when its rate was measured: a short run, a small record."""
    assert footer.limit_cell(1.178) == "100.0 %" and footer.limit_cell(0.5) == "50.0 %"
    assert footer.limit_cell(None) == "-"
