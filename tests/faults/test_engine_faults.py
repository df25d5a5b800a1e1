"""Faults while a model answers: never a wrong token, never a signal, and the engine lives on."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from chronos.common.disk.header import read_header
from chronos.common.errors import BudgetError, ChronosError, CorruptClusterError, UsageError
from chronos.common.layout import open_layout, pack
from chronos.common.model.weights import Key, expert_name
from chronos.common.text.sampling import SamplingParams
from chronos.run.engine import Engine, load
from chronos.run.sequence import OneSequence
from chronos.testing.faults import FaultyIO
from chronos.testing.tiny import CONFIG, tiny_packed

PROMPT = [5, 80, 41]
COUNT = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_packed(tmp_path / "model")


def open_small(folder: Path, io: FaultyIO | None = None, **options: Any) -> Engine:
    """A quarter of the experts, so that reads go on all the time; none of them early."""
    options = {"budget": "25%", "prefetch": "off"} | options
    engine = load(folder, backend="torch", io=io, **options)
    engine.stop_ids = frozenset()
    return engine


def answer(engine: Engine) -> list[int]:
    return engine.generate(PROMPT, max_tokens=COUNT).result.tokens


@pytest.fixture
def expected(folder: Path) -> list[int]:
    with open_small(folder, budget="resident") as engine:
        return answer(engine)


def test_a_context_of_ones_own(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_small(folder) as engine:
        named = engine.context
        with pytest.raises(UsageError, match=f"context holds {named}") as caught:
            engine.generate([5] * (named + 1))
        assert "--context" in caught.value.fix
    assert not caplog.records
    with open_small(folder, context=8) as engine:
        result = engine.generate([5] * 6, max_tokens=9).result
        assert (result.finish_reason, len(result.tokens)) == ("context", 3)
    assert not caplog.records
    with open_small(folder, context=named + 8) as engine:
        assert engine.generate([5] * (named + 1), max_tokens=2).result.finish_reason == "length"
    assert f"more than the {named}" in caplog.text
    with pytest.raises(UsageError, match="context of 0"):
        load(folder, context=0)


# S7


def poison_packed(folder: Path, key: Key) -> None:
    """A NaN in one expert, with a digest that vouches for it."""
    record = open_layout(folder).records[key]
    path = folder / "experts" / record.file
    with path.open("r+b") as file:
        file.seek(record.offset)
        file.write(np.float32(np.nan).tobytes())
        file.seek(record.offset)
        digest = xxhash.xxh3_128_hexdigest(file.read(record.nbytes))
    manifest = folder / "experts" / "cluster_manifest.json"
    text = manifest.read_text()
    assert text.count(record.digest.hex()) == 1
    manifest.write_text(text.replace(record.digest.hex(), digest))


def poison_unpacked(folder: Path, key: Key) -> None:
    path = folder / "model.safetensors"
    entry = read_header(path).entries[expert_name(*key, "gate_up_proj")]
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(np.float32(np.nan).tobytes())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("budget", ["resident", "25%"])
def test_a_nan_is_an_error_and_never_a_token(folder: Path, budget: str, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=1)
    with open_small(folder, budget="resident") as engine:
        clean = engine.generate(PROMPT, params, max_tokens=COUNT).result.tokens
    if budget == "resident":
        folder = folder.with_name(folder.name + "-unpacked")
    for expert in range(CONFIG.num_experts):  # whichever is needed first
        key = (1, expert)
        poison_unpacked(folder, key) if budget == "resident" else poison_packed(folder, key)
    with open_small(folder, budget=budget) as engine:
        result = engine.generate(PROMPT, params, max_tokens=COUNT).result
    assert result.finish_reason == "error"
    assert "NaN" in result.error
    assert result.tokens == clean[: len(result.tokens)]


def first_uses(engine: Engine, tokens: list[int]) -> dict[Key, int]:
    """How many tokens were made before each expert was first needed."""
    runner = OneSequence(engine.session, record=True)
    runner.prefill(PROMPT, SamplingParams())
    for token in tokens[:-1]:
        runner.decode(token, SamplingParams())
    ids_TLK = np.concatenate([ids for ids, _ in runner.routing()])
    uses: dict[Key, int] = {}
    for row, layer, rank in np.ndindex(*ids_TLK.shape):
        uses.setdefault((layer, int(ids_TLK[row, layer, rank])), max(0, row - len(PROMPT) + 1))
    return uses


def test_one_poisoned_expert_ends_the_reply_where_it_is_needed(folder: Path) -> None:
    with open_small(folder) as engine:
        clean = answer(engine)
        uses = first_uses(engine, clean)
    key, made = max(uses.items(), key=lambda item: item[1])
    assert made > 1
    poison_packed(folder, key)
    with open_small(folder) as engine:
        result = engine.generate(PROMPT, max_tokens=COUNT).result
    assert (result.finish_reason, result.tokens) == ("error", clean[:made])


# S9


def test_missing_clusters_are_an_error_unless_others_may_stand_in(
    folder: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "single"
    pack(folder, packed, order=[[key] for key in open_layout(folder).records])
    for path in sorted((packed / "experts").glob("*.ctsr"))[::2]:
        path.unlink()
    with pytest.raises(CorruptClusterError):
        open_small(packed)
    with pytest.raises(UsageError):
        open_small(packed, allow_missing=True)
    with open_small(packed, allow_missing=True, miss="fallback", budget="all") as engine:
        result = engine.generate(PROMPT, max_tokens=COUNT).result
    assert result.finish_reason == "length"
    assert result.stats["fallbacks"] > 0
    assert result.stats["fallback_weight"] > 0


# S10

_CHILD = """
    import sys
    from chronos.run.engine import load
    from chronos.common.errors import ChronosError
    with load(sys.argv[1], backend="torch", budget="10%", prefetch="off") as engine:
        engine.stop_ids = frozenset()
        steps = engine.generate([5, 80, 41], max_tokens=200)
        next(steps)
        print("running", flush=True)
        sys.stdin.readline()
        try:
            print(steps.result.finish_reason)
        except ChronosError as error:
            print(type(error).__name__, error)
            sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("cut", ["truncated", "replaced"])
def test_a_file_cut_under_a_running_generation_is_an_error_not_a_signal(
    folder: Path, cut: str
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_CHILD), str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        for path in (folder / "experts").glob("*.ctsr"):
            damage(path, cut)
        out, _ = child.communicate("\n", timeout=60)
    assert child.returncode == 3, out  # a SIGBUS would be 135, or -7
    assert ".ctsr" in out


def damage(path: Path, cut: str) -> None:
    if cut == "replaced":
        path.write_bytes(bytes(path.stat().st_size))
        return
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 16)


# D1


def test_an_error_on_any_read_is_retried_or_ends_that_request_only(
    folder: Path, expected: list[int]
) -> None:
    """EIO from the Nth read on, for every N until none is left: an error or the same tokens, and
    the same engine answers rightly afterwards."""
    failed = 0
    for at in range(1, 10_000, 7):
        io = FaultyIO(ops={"preadv"}, error=errno.EIO)
        with open_small(folder, io) as engine:
            io.fail_at = at
            try:
                assert answer(engine) == expected
                break
            except ChronosError as error:
                failed += 1
                assert error.exit_code in (1, 3)
            io.fail_at = 0
            assert answer(engine) == expected
    else:
        raise AssertionError("reads never stopped failing")
    assert failed > 3


def test_a_single_error_is_retried_unnoticed(folder: Path, expected: list[int]) -> None:
    io = FaultyIO(ops={"preadv"}, error=errno.EIO, times=1)
    with open_small(folder, io) as engine:
        io.fail_at = 5
        assert answer(engine) == expected
    assert io.failures == 1


# D2, D3


@pytest.mark.parametrize(
    "faults",
    [{"max_read": 1000}, {"interrupt_every": 3, "again_every": 5}, {"flip_reads": 1}],
    ids=lambda faults: next(iter(faults)),
)
def test_odd_reads_change_no_token(
    folder: Path, expected: list[int], faults: dict[str, int]
) -> None:
    with open_small(folder, FaultyIO(**faults)) as engine:
        assert answer(engine) == expected


@pytest.mark.parametrize("prefetch", ["auto", "off"])
def test_a_slow_disk_is_waited_for_and_the_wait_is_reported(
    folder: Path, expected: list[int], prefetch: str
) -> None:
    io = FaultyIO(delay=lambda nbytes: time.sleep(0.002))
    with open_small(folder, io, prefetch=prefetch) as engine:
        result = engine.generate(PROMPT, max_tokens=COUNT).result
    assert result.tokens == expected
    assert result.stats["stall_s"] > 0.002
    assert result.stats["decode_stall_s"] <= result.stats["decode_s"]


def test_one_long_stall_ends(folder: Path, expected: list[int]) -> None:
    stalls: Iterator[float] = iter([0.0] * 20 + [0.5])
    io = FaultyIO(delay=lambda nbytes: time.sleep(next(stalls, 0.0)))
    with open_small(folder, io) as engine:
        result = engine.generate(PROMPT, max_tokens=COUNT).result
    assert result.tokens == expected
    assert result.stats["stall_s"] > 0.3


# M1

_REFUSED = """
    import sys
    from chronos.run.engine import load
    from chronos.common.errors import BudgetError
    try:
        load(sys.argv[1], budget="1KiB")
    except BudgetError as error:
        assert "torch" not in sys.modules and "mlx" not in sys.modules
        print(error.fix)
        sys.exit(error.exit_code)
"""


def test_a_budget_too_small_is_refused_before_anything_is_loaded(folder: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_REFUSED), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    minimum = CONFIG.num_experts_per_tok * open_layout(folder).record_nbytes
    assert (done.returncode, done.stderr) == (BudgetError("").exit_code, "")
    assert str(minimum) in done.stdout


def test_exact_mode_raises_rather_than_falls_back(folder: Path) -> None:
    """S6 at run time: one byte of one expert of every cluster is wrong."""
    for path in (folder / "experts").glob("*.ctsr"):
        record = next(r for r in open_layout(folder).records.values() if r.file == path.name)
        with path.open("r+b") as file:
            file.seek(record.offset)
            file.write(b"\xff")
    with open_small(folder) as engine:
        with pytest.raises(CorruptClusterError, match="checksum"):
            for token in range(CONFIG.vocab_size):
                list(engine.generate([token] * 8, max_tokens=8))
        assert engine.feed is not None
        assert engine.feed.stats().fallbacks == 0


def test_fallback_without_shared_experts_is_refused(tmp_path: Path) -> None:
    folder = tiny_packed(tmp_path / "model", num_shared_experts=0)
    with pytest.raises(UsageError, match="shared experts"):
        load(folder, budget="50%", miss="fallback")
