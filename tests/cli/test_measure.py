"""trace, simulate, bench, bench replay, eval, doctor on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.experts.foresight.forecast import ForecastModel
from chronos.common.traces.trace import RoutingTrace, join


@pytest.mark.needs_backend
def test_trace_records_every_token_once(
    chronos: Any, packed: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "t.npz"
    flags = ("--data", text, "-n", 90, "--seq-len", 40, "--json")
    data = chronos("trace", packed, "-o", file, *flags).json
    assert (data["tokens"], data["layers"], data["experts"], data["top_k"]) == (90, 3, 8, 2)
    recorded = RoutingTrace.load(file)
    assert recorded.num_tokens == 90 and recorded.meta["phase"] == "prefill"
    assert recorded.tokens_T is not None
    assert np.bincount(recorded.seq_T).tolist() == [40, 40, 10]
    done = chronos("trace", packed, "-o", file, *flags)
    assert done.code == 2 and "there already" in done.error[0]
    again = tmp_path / "again.npz"
    chronos("trace", packed, "-o", again, *flags, "--budget", "25%")
    assert (RoutingTrace.load(again).ids_TLK == recorded.ids_TLK).all()


@pytest.mark.needs_backend
def test_trace_goes_on_in_a_document_whose_beginning_is_recorded(
    chronos: Any, packed: Path, tmp_path: Path
) -> None:
    text, file = tmp_path / "one.txt", tmp_path / "t.npz"
    text.write_text("".join(f"word {i} is not word {i + 1}\n" for i in range(40)))
    data = chronos("trace", packed, "-o", file, "--data", text, "--seq-len", 16, "--json").json
    assert data["sequences"] == -(-text.stat().st_size // (8 * 16)) > 5
    recorded = RoutingTrace.load(file)
    assert recorded.tokens_T is not None and np.bincount(recorded.seq_T).max() == 16
    pieces = {recorded.tokens_T[recorded.seq_T == s].tobytes() for s in recorded.seq_T.tolist()}
    assert len(pieces) == data["sequences"]


@pytest.mark.needs_backend
def test_trace_of_what_the_model_writes(
    chronos: Any, packed: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "t.npz"
    flags = ("--seq-len", 8, "--new-tokens", 12, "-n", 30, "--json")
    data = chronos("trace", packed, "--data", text, "-o", file, *flags).json
    assert (data["tokens"], data["phase"], data["sequences"]) == (30, "generation", 3)


@pytest.mark.needs_backend
def test_trace_refuses_what_leaves_no_room(
    chronos: Any, packed: Path, text: Path, tmp_path: Path
) -> None:
    flags = ("--data", text, "-o", tmp_path / "t.npz", "--new-tokens", 300)
    assert "leaves no room" in chronos("trace", packed, *flags).error[0]


def test_simulate_orders_the_policies(chronos: Any, trace: Path) -> None:
    data = chronos("simulate", trace, "--budget", "25%, 50%", "--json").json
    for result in data["budgets"].values():
        hits = {name: policy["hits"] for name, policy in result["policies"].items()}
        assert hits["min"] == max(hits.values())
    assert data["budgets"]["50%"]["r_min"] < data["budgets"]["25%"]["r_min"]
    done = chronos("simulate", trace, "--budget", "50%")
    assert "120 tokens in 1 sequence (" in done.out and "gap closed" in done.out
    assert max(map(len, (done.out + done.err).splitlines())) <= 80


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--budget", "2GiB"], 2, "a budget for a trace cannot be '2GiB'"),
        (["--budget", "0%"], 2, "cannot be '0%'"),
        (["--budget", "x%"], 2, "cannot be 'x%'"),
        (["--budget", "12.5%"], 2, "1 slots cannot hold the 2 experts"),
    ],
)
def test_simulate_refuses(
    chronos: Any, trace: Path, args: list[str], code: int, words: str
) -> None:
    done = chronos("simulate", trace, *args)
    assert done.code == code and words in done.error[0]


def test_fit_writes_a_forecaster_that_simulate_uses_on_test_sequences(
    chronos: Any, long_trace: Path, tmp_path: Path
) -> None:
    file = tmp_path / "forecast.safetensors"
    flags = ("--test-budget", "50%", "--epochs", 40, "--json")
    fitted = chronos("fit", long_trace, "-o", file, *flags).json
    assert fitted["tested"]["sequences"] == 2 and fitted["seconds"] > 0
    assert fitted["test"]["policies"]["forecast"]["recall_at_k3"] > 0.9
    flags = ("--forecast", file, "--budget", "50%", "--expert-size", "1MB")
    chart = tmp_path / "chart.png"
    data = chronos("simulate", long_trace, *flags, "--png", chart, "--json").json
    result = data["budgets"]["50%"]
    assert data["replayed"]["tokens"] == 100
    policies = result["policies"]
    assert policies["forecast"]["misses"] == fitted["test"]["policies"]["forecast"]["misses"]
    assert result["best_predictor"] == "forecast"
    assert result["eta_policy"] == policies["forecast"]["eta_policy"] > 0
    for policy in policies.values():
        assert policy["hits"] + policy["misses"] == result["requests"] == 90 * 2 * 2
        assert policy["bytes_per_token"] == policy["reads_per_token"] * 1e6
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_simulate_trains_a_forecaster_unless_told_not_to(chronos: Any, long_trace: Path) -> None:
    done = chronos("simulate", long_trace, "--budget", "50%")
    assert "Replayed are its test sequences: 100 tokens" in done.out and "forecast" in done.out
    done = chronos("simulate", long_trace, "--budget", "50%", "--no-fit", "--per-layer")
    assert "forecast" not in done.out and "4 slots per layer" in done.out


def test_simulate_refuses_a_forecaster_of_another_geometry(
    chronos: Any, long_trace: Path, trace: Path, tmp_path: Path
) -> None:
    file = tmp_path / "forecast.safetensors"
    chronos("fit", long_trace, "-o", file, "--epochs", 1)
    done = chronos("simulate", trace, "--forecast", file, "--budget", "50%")
    assert done.code == 3 and "cannot serve 2 x 4, top-2" in done.error[0]
    done = chronos("simulate", long_trace, "--forecast", trace, "--budget", "50%")
    assert done.code == 3 and str(trace) in done.err


def test_fit_needs_somewhere_to_write_and_something_to_read(
    chronos: Any, long_trace: Path, tmp_path: Path
) -> None:
    assert "give -o FILE" in chronos("fit", long_trace).err
    done = chronos("fit", long_trace, "-o", tmp_path / "no" / "f.safetensors")
    assert done.code == 2 and "the folder does not exist" in done.error[0]
    assert "needs text" in chronos("fit", "demo").error[0]


@pytest.mark.needs_backend
def test_fit_records_a_model_and_keeps_the_forecaster_in_its_folder(
    chronos: Any, packed: Path, text: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(packed, model)
    flags = ("--data", text, "-n", 800, "--new-tokens", 40, "--epochs", 1, "--test-budget", "75%")
    data = chronos("fit", model, *flags, "--json").json
    file = model / "forecast.safetensors"
    assert data["file"] == str(file) and data["trace"]["phase"] == "mixed"
    assert ForecastModel.load(file).fingerprint
    assert data["test"]["policies"]["token-table"]["recall_at_k"] > 0.5
    assert chronos("verify", model).code == 0


def test_simulate_names_a_damaged_trace(chronos: Any, tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(b"PK nonsense")
    done = chronos("simulate", tmp_path / "t.npz")
    assert done.code == 3 and str(tmp_path / "t.npz") in done.err


@pytest.mark.needs_backend
def test_bench_compares_with_the_resident_model(chronos: Any, packed: Path) -> None:
    flags = ("-p", "x", "-n", 8, "--rounds", 2, "--budgets", "all,50%")
    data = chronos("bench", packed, *flags, "--json").json
    assert [row["budget"] for row in data["budgets"]] == ["resident", "all", "50%"]
    assert all(row["tokens_identical"] for row in data["budgets"])
    assert all(len(row["decode_tps"]) == 2 for row in data["budgets"])
    assert data["budgets"][0]["ratio_to_resident"] == 1.0
    warm = data["budgets"][1]["stats"][0]
    assert warm["misses"] == warm["late"] == 0  # the uncounted answer has filled the cache


@pytest.mark.needs_backend
def test_bench_prints_a_table(chronos: Any, packed: Path) -> None:
    done = chronos("bench", "decode", packed, "-n", 4, "--rounds", 1, "--budgets", "25%")
    assert done.code == 0
    assert all(word in done.out for word in ("resident", "25%", "yes", "tok/s"))
    assert max(map(len, (done.out + done.err).splitlines())) <= 80
    assert chronos("bench", packed, "--budgets", " , ").code == 2


@pytest.mark.needs_backend
def test_bench_replay_runs_recorded_routing(chronos: Any, trace: Path, tmp_path: Path) -> None:
    work = tmp_path / "model"
    flags = ("--expert-size", "200kB", "-n", 6, "--warmup", 4, "--budgets", "50%", "--work", work)
    data = chronos("bench", "replay", trace, *flags, "--epochs", 0, "--json").json
    runs = {(run["budget"], run["run"]): run for run in data["runs"]}
    assert list(runs) == [("resident", None), ("50%", "off"), ("50%", "lfu")]
    (whole,), (part,) = runs["resident", None]["rounds"], runs["50%", "off"]["rounds"]
    assert whole["limit"] is None and part["limit"]["eta_limit"] > 0
    assert 0 < part["p50_s"] <= part["p95_s"] <= part["p99_s"]
    assert runs["50%", "off"]["ratio_to_off"] == 1.0 and runs["50%", "lfu"]["ratio_to_off"] > 0
    routed = RoutingTrace.load(trace).part(4, 12)
    assert part["stats"]["routed"] == 7 * routed.num_layers * routed.top_k
    assert part["stats"]["bytes_prefetched"] == 0
    assert part["stats"]["peak_expert_bytes"] <= part["stats"]["capacity_bytes"]
    before = sorted((work / "experts").iterdir())
    again = chronos("bench", "replay", trace, *flags, "--epochs", 0)
    assert again.code == 0 and sorted((work / "experts").iterdir()) == before
    assert max(map(len, (again.out + again.err).splitlines())) <= 80
    other = chronos("bench", "replay", trace, *flags[2:], "--expert-size", "400kB")
    assert other.code == 2 and "another model" in other.error[0]


@pytest.mark.needs_backend
def test_bench_replay_of_a_slower_disk(chronos: Any, trace: Path, tmp_path: Path) -> None:
    """A rate below any disk's: what is timed as the disk is the pace."""
    flags = ("--expert-size", "200kB", "-n", 3, "--warmup", 2, "--epochs", 0, "--budgets", "50%")
    work = ("--work", tmp_path / "model", "--disk", "20MB")
    data = chronos("bench", "replay", trace, *flags, *work, "--json").json
    streamed = [run["rounds"][0] for run in data["runs"] if run["run"]]
    assert data["disk"] == 20_000_000 and len(streamed) == 2
    assert all(run["disk_bytes_per_s"] <= data["disk"] for run in streamed)
    off = streamed[0]
    assert off["token_s"] * data["disk"] >= off["bytes_read_per_token"] > 0


@pytest.mark.needs_backend
def test_bench_replay_with_a_forecaster(chronos: Any, trace: Path, tmp_path: Path) -> None:
    """Trained on the way, kept with the model, and given as a file; on test sequences only."""
    long, work, png = tmp_path / "long.npz", tmp_path / "model", tmp_path / "chart.png"
    recorded = RoutingTrace.load(trace)
    join([recorded] * 4).save(long)
    flags = ("--expert-size", "200kB", "-n", 6, "--warmup", 4, "--budgets", "50%", "--work", work)
    done = chronos("bench", "replay", long, *flags, "--epochs", 1, "--png", png, "--cold", "--json")
    runs = [run["run"] for run in done.json["runs"]]
    assert runs == [None, "off", "lfu", "forecast", "auto"] and done.json["cold"]
    assert png.read_bytes().startswith(b"\x89PNG")
    kept = work / "forecast.safetensors"
    stamp = kept.stat().st_mtime_ns
    chronos("bench", "replay", long, *flags, "--epochs", 1)
    assert kept.stat().st_mtime_ns == stamp
    file = kept.rename(tmp_path / "own.safetensors")
    again = chronos("bench", "replay", long, *flags, "--forecast", file)
    assert again.code == 0 and "forecast" in again.out
    assert max(map(len, (again.out + again.err).splitlines())) <= 80


def test_bench_replay_refuses(chronos: Any, trace: Path) -> None:
    assert "too small" in chronos("bench", "replay", trace, "--expert-size", "1kB").error[0]
    done = chronos("bench", "replay", trace, "--disk", "1GB/s")
    assert done.code == 2 and "a disk's rate cannot be '1GB/s'" in done.error[0]
    flags = ("bench", "replay", trace, "--expert-size", "200kB", "-n", 1000)
    done = chronos(*flags, "--epochs", 0)
    assert done.code == 2 and "fewer than were asked for" in done.error[0]
    assert "record more tokens" in chronos(*flags).error[1]


@pytest.mark.needs_backend
def test_eval_measures_loss_recall_and_locality_beside_its_entropy(
    chronos: Any, packed: Path, text: Path
) -> None:
    flags = ("--data", text, "-n", 600, "--seq-len", 32, "--batch-size", 2)
    data = chronos("eval", packed, *flags, "--json").json
    assert 3 < data["loss"] < 12 and data["perplexity"] > 1 and data["bits_per_byte"] > 0
    assert len(data["lookahead_recall"]) == 2
    place = data["locality"]
    assert 0 <= place["repeat"] <= 1 and 0 < place["entropy"] <= place["entropy_max"]
    assert 1 <= place["effective_experts"] <= 8
    done = chronos("eval", packed, *flags)
    assert all(name in done.out for name in ("perplexity", "locality", "router entropy"))
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.needs_backend
@pytest.mark.parametrize("kind", ["messages", "completion", "prompt"])
def test_rows_that_training_takes_are_traced_and_measured(
    chronos: Any, packed: Path, tmp_path: Path, kind: str
) -> None:
    user, reply = {"role": "user", "content": "def add"}, {"role": "assistant", "content": "(a):"}
    row = {
        "messages": {"messages": [user, reply]},
        "completion": {"prompt": "def add", "completion": "(a):"},
        "prompt": {"prompt": [user]},
    }[kind]
    data, file = tmp_path / "rows.jsonl", tmp_path / "t.npz"
    data.write_text("\n".join([json.dumps(row)] * 3))
    assert chronos("trace", packed, "-o", file, "--data", data, "--json").json["sequences"] == 3
    for budget in ("all", "50%"):
        done = chronos(
            "eval", packed, "--data", data, "--budget", budget, "--seq-len", 32, "--json"
        )
        if kind == "prompt":
            assert done.code == 3 and "rows.jsonl:1: a 'prompt' row" in done.err
        else:
            assert 0 < done.json["loss"] < 20 and done.json["bits_per_byte"] is None
    if kind != "prompt":
        assert "loss" in chronos("eval", packed, "--data", data).out


@pytest.mark.needs_backend
def test_eval_in_a_process_of_its_own_has_all_of_its_framework(packed: Path, text: Path) -> None:
    """Start-up leaves out what generating needs none of; a loss of packed rows does."""
    command = [sys.executable, "-m", "chronos", "eval", packed, "--data", text, "-n", "100"]
    done = subprocess.run([*command, "--seq-len", "16"], check=True, capture_output=True)
    assert b"lookahead recall" in done.stdout


@pytest.mark.needs_backend
def test_eval_within_a_budget_measures_the_same_model(
    chronos: Any, packed: Path, text: Path
) -> None:
    """The same tokens in the same contexts, whatever is in memory and computed at a time."""
    flags = ("--data", text, "-n", 600, "--seq-len", 32, "--json")
    whole, one = (chronos("eval", packed, *flags, "--batch-size", n).json for n in (8, 1))
    half, quarter = (chronos("eval", packed, *flags, "--budget", b).json for b in ("50%", "25%"))
    for other in (one, half, quarter):
        assert other["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert other["locality"] == whole["locality"]
        assert (other["tokens"], other["rows"]) == (whole["tokens"], whole["rows"])
    assert half["loss"] == quarter["loss"]
    assert half["lookahead_recall"] == []
    # Labels: none behind the end of a document.
    assert whole["rows"] == 600 // 32 and 0 < whole["tokens"] <= whole["rows"] * 32
    # However long the rows are, every token but a document's first is predicted once.
    whole_text = [
        chronos("eval", packed, "--data", text, "--seq-len", n, "--json").json for n in (16, 48)
    ]
    assert whole_text[0]["tokens"] == whole_text[1]["tokens"]
    lossy = chronos("eval", packed, *flags, "--budget", "25%", "--miss", "fallback").json
    assert lossy["loss"] != half["loss"]
    shown = chronos("eval", packed, *flags[:-1]).out
    assert str(whole["tokens"]) in shown and f"in {whole['rows']} rows of 32" in shown


def test_eval_of_data_that_is_not_there(chronos: Any, packed: Path, tmp_path: Path) -> None:
    done = chronos("eval", packed, "--data", tmp_path / "no.txt")
    assert done.code == 2 and "no such data" in done.error[0] and done.error[-1][:4] == "fix:"


def test_doctor_says_what_it_found(chronos: Any, packed: Path, chosen: str) -> None:
    data = chronos("doctor", packed, "--json").json
    assert {found["name"] for found in data["backends"]} == {"torch", "mlx"}
    assert data["chosen"] == chosen and data["memory"]["limit"] > 0
    assert data["disk"]["bytes_per_s"] > 0 and data["plain"] is False
    done = chronos("doctor", packed)
    assert all(word in done.out for word in ("backend torch", "backend mlx", "memory", "disk"))


def test_doctor_shows_what_the_environment_turns_off(
    chronos: Any, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "on; CHRONOS_PLAIN=1 turns them off" in chronos("doctor", packed).out
    monkeypatch.setenv("CHRONOS_PLAIN", "1")
    assert "off: CHRONOS_PLAIN is set" in chronos("doctor", packed).out
    assert chronos("doctor", packed, "--json").json["plain"] is True
    monkeypatch.setenv("CHRONOS_PLAIN", "perhaps")
    assert chronos("doctor", packed).code == 2


def test_doctor_refuses_a_name_that_is_no_model(chronos: Any, tmp_path: Path) -> None:
    done = chronos("doctor", tmp_path / "none")
    assert done.code == 2 and "does not exist" in done.error[0]


def test_simulate_prints_no_bytes_that_it_does_not_know(chronos: Any, trace: Path) -> None:
    """A trace without the size of an expert: reads are counted, unless a size is given."""
    flags = ("simulate", trace, "--budget", "50%", "--no-fit")
    shown, data = chronos(*flags).out, chronos(*flags, "--json").json
    assert "experts read a token" in shown and "B" not in shown.split("gap closed")[1]
    assert data["expert_bytes"] is None
    policies = data["budgets"]["50%"]["policies"].values()
    assert {policy["bytes_per_token"] for policy in policies} == {None}
    assert "3.00 MB an expert" in chronos(*flags, "--expert-size", "3MB").out


@pytest.mark.needs_backend
def test_traces_carry_the_size_of_an_expert(
    chronos: Any, packed: Path, text: Path, tmp_path: Path
) -> None:
    from chronos.common.layout import open_layout

    size, file = open_layout(packed).record_nbytes, tmp_path / "t.npz"
    flags = ("--data", text, "-n", 60)
    assert chronos("trace", packed, "-o", file, *flags, "--json").json["expert_bytes"] == size
    assert RoutingTrace.load(file).expert_bytes == size
    data = chronos("simulate", file, "--budget", "50%", "--no-fit", "--json").json
    policy = data["budgets"]["50%"]["policies"]["lru"]
    assert data["expert_bytes"] == size
    assert policy["bytes_per_token"] == policy["reads_per_token"] * size
    unpacked, file = packed.with_name(packed.name + "-unpacked"), tmp_path / "unpacked.npz"
    chronos("trace", unpacked, "-o", file, *flags)
    found = RoutingTrace.load(file).expert_bytes
    assert found is not None and 0 < found <= size  # its records are not padded


def test_fit_shows_what_simulate_shows(chronos: Any, long_trace: Path, tmp_path: Path) -> None:
    """The same table, in the same order, with the same legend."""
    file = tmp_path / "f.safetensors"
    fitted = chronos("fit", long_trace, "-o", file, "--epochs", 1, "--test-budget", "50%")
    replayed = chronos("simulate", long_trace, "--forecast", file, "--budget", "50%")
    table = fitted.out[fitted.out.index("50% of the experts") :]
    assert table in replayed.out and fitted.err == replayed.err
