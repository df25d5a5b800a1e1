"""What plots are drawn from: numbers of logs, unchanged."""

from __future__ import annotations

import pytest

pytest.importorskip("pandas", reason="pages need the extra [ui]")

from chronos.ui import pictures


def test_lines_keep_their_ends_and_leave_out_what_is_not_there() -> None:
    rows = [{"step": n, "ce": float(n)} for n in range(1000)] + [{"step": 1000, "valid_ce": 7.0}]
    frame = pictures.lines(rows, "step", {"ce": "ce", "valid_ce": "held out"})
    ce, valid = frame[frame.series == "ce"], frame[frame.series == "held out"]
    assert (len(ce), ce.step.iloc[0], ce.step.iloc[-1]) == (400, 0, 999)
    assert (ce.step == ce.value).all() and valid.value.tolist() == [7.0]
    assert len(pictures.lines([], "step", {"ce": "ce"})) == 0


def test_pareto_by_hand() -> None:
    points = [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (3.0, 3.0), (1.0, 1.0), (4.0, 4.0)]
    assert pictures.pareto(points) == [True, True, False, False, True, True]


def test_a_picture_has_a_mark_for_each_pick() -> None:
    image = pictures.routing([[0, 2], [1, 3]], [[0, 1], [3, 2]], 4)
    cell = image.shape[0] // 4
    assert image.shape == (4 * cell, 2 * cell, 3)
    middle = cell // 2
    marked = [
        [tuple(image[row * cell + middle, token * cell + middle]) != (245,) * 3 for token in (0, 1)]
        for row in range(4)
    ]
    assert marked == [[True, False], [False, True], [False, True], [True, False]]  # 0, 1, 3, 2


def line(time: float, hits: int, misses: int) -> dict[str, object]:
    layer = {"layer": 2, "hits": hits, "late": 0, "misses": misses, "bytes_read": 8 * misses}
    return {
        "time": time, "bytes_read": 8 * misses, "generated": hits,
        "layers": [layer | {"stall_s": 0.5 * misses}],
    }  # fmt: skip


def test_layers_lately_and_since_the_start() -> None:
    rows = [line(0, 5, 1), line(100, 10, 4), line(105, 16, 5)]
    assert pictures.between(rows, "start")[0]["hits"] == 16
    lately = {"layer": 2, "hits": 6, "late": 0, "misses": 1, "bytes_read": 8, "stall_s": 0.5}
    assert pictures.between(rows, "lately") == [lately]
    flow = pictures.flow(rows)
    assert flow is not None and flow[flow.series == "tokens/s"].value.tolist() == [0.05, 1.2]


def test_a_benchmark_is_read_from_what_it_printed() -> None:
    budget = {"budget": "25%", "budget_bytes": 100, "decode_tps_median": 5.5, "hit_rate": 0.5}
    assert pictures.budgets("b", {"budgets": [budget | {"tokens_identical": True}]}) == [
        {
            "series": "b", "budget": "25%", "bytes": 100, "tokens_per_s": 5.5, "hit_rate": 0.5,
            "identical": True,
        }
    ]  # fmt: skip
    assert pictures.budgets("b", {}) == []


def test_trials_as_their_events_tell() -> None:
    """The second is interrupted and goes on as the third; the first has a rung, then its end."""
    events = [
        {"event": "start", "objectives": ["loss", "expert_bytes_per_token"]},
        {"event": "trial", "trial": 0, "state": "running", "params": {"a.b": 1}, "origin": 0},
        {"event": "rung", "trial": 0, "values": {"loss": 3.0}, "step": 5, "steps": 9},
        {"event": "trial", "trial": 1, "state": "running", "params": {"a.b": 2}, "origin": 1},
        {"event": "progress", "trial": 1, "step": 4, "steps": 9},
        {"event": "trial", "trial": 0, "state": "whole", "values": {"loss": 2.0}},
        {"event": "trial", "trial": 1, "state": "interrupted"},
        {"event": "trial", "trial": 2, "state": "running", "params": {"a.b": 2}, "origin": 1},
    ]
    first, second = pictures.trials(events)
    assert (first["trial"], first["state"], first["values"]) == (0, "whole", {"loss": 2.0})
    assert first["params"] == {"a.b": 1}
    assert (second["trial"], second["state"]) == (2, "running")
    [before, running] = pictures.trials(events[:5])
    assert before["values"] == {"loss": 3.0} and running["step"] == 4
