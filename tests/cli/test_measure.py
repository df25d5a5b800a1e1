"""trace, simulate, bench, bench replay, eval, doctor on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.routing.trace import RoutingTrace, TraceRecorder


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """120 tokens of uneven routing: 2 layers, 4 experts, top-2."""
    random = np.random.default_rng(0)
    recorder = TraceRecorder(4, 2, model="none")
    for _ in range(120):
        layers = [random.choice(4, 2, False, [0.5, 0.3, 0.1, 0.1]) for _ in range(2)]
        recorder.append(np.stack(layers))
    recorder.trace().save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


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
    assert np.bincount(recorded.seq_T).tolist() == [40, 40, 10]
    again = tmp_path / "again.npz"
    chronos("trace", packed, "-o", again, *flags, "--budget", "25%")
    assert (RoutingTrace.load(again).ids_TLK == recorded.ids_TLK).all()


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
    assert "120 tokens in 1 sequences" in done.out and "gap closed" in done.out
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
    data = chronos("bench", "replay", trace, *flags, "--json").json
    (whole,), (part,) = data["runs"]["resident"], data["runs"]["50%"]
    assert whole["limit"] is None and part["limit"]["eta_limit"] > 0
    routed = RoutingTrace.load(trace).part(4, 12)
    assert part["stats"]["routed"] == 7 * routed.num_layers * routed.top_k
    assert part["stats"]["peak_expert_bytes"] <= part["stats"]["capacity_bytes"]
    before = sorted((work / "experts").iterdir())
    again = chronos("bench", "replay", trace, *flags)
    assert again.code == 0 and sorted((work / "experts").iterdir()) == before
    other = chronos("bench", "replay", trace, *flags[2:], "--expert-size", "400kB")
    assert other.code == 2 and "another model" in other.error[0]


def test_bench_replay_refuses(chronos: Any, trace: Path) -> None:
    assert "too small" in chronos("bench", "replay", trace, "--expert-size", "1kB").error[0]
    done = chronos("bench", "replay", trace, "--expert-size", "200kB", "-n", 1000)
    assert done.code == 2 and "fewer than were asked for" in done.error[0]


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


def test_eval_of_data_that_is_not_there(chronos: Any, packed: Path, tmp_path: Path) -> None:
    done = chronos("eval", packed, "--data", tmp_path / "no.txt")
    assert done.code == 3 and "no such data" in done.error[0]


def test_doctor_says_what_it_found(chronos: Any, packed: Path, chosen: str) -> None:
    data = chronos("doctor", packed, "--json").json
    assert {found["name"] for found in data["backends"]} == {"torch", "mlx"}
    assert data["chosen"] == chosen and data["memory"]["limit"] > 0
    assert data["disk"]["bytes_per_s"] > 0
    done = chronos("doctor", packed)
    assert all(word in done.out for word in ("backend torch", "backend mlx", "memory", "disk"))


def test_doctor_goes_on_without_a_model(chronos: Any, tmp_path: Path) -> None:
    data = chronos("doctor", tmp_path / "none", "--json").json
    assert "does not exist" in data["disk"]["reason"]
    assert "not measured" in chronos("doctor", tmp_path / "none").out
