"""What charts are drawn from: numbers of logs, unchanged; and where they are drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from chronos.ui import pictures, svg


def test_lines_keep_their_ends_and_leave_out_what_is_not_there() -> None:
    rows = [{"step": n, "ce": float(n)} for n in range(1000)] + [{"step": 1000, "valid_ce": 7.0}]
    found = pictures.lines(rows, "step", {"ce": "ce", "valid_ce": "held out", "x": "x"})
    ce = found["ce"]
    assert (len(ce), ce[0], ce[-1]) == (400, (0.0, 0.0), (999.0, 999.0))
    assert all(step == value for step, value in ce)
    assert found["held out"] == [(1000.0, 7.0)] and "x" not in found
    assert pictures.lines([], "step", {"ce": "ce"}) == {}


def drawn(text: str, tag: str) -> list[ElementTree.Element]:
    """Elements of a chart's picture, grid left out."""
    picture = re.search(r"<svg.*</svg>", text)
    assert picture is not None
    found = ElementTree.fromstring(picture[0]).iter(tag)
    return [each for each in found if each.get("class") != "grid"]


def numbers(text: str, side: str) -> list[str]:
    return re.findall(rf'class="{side}"[^>]*>([^<]*)<', text)


def test_bars_stand_where_their_numbers_say() -> None:
    groups = {"0": {"hits": 30.0, "late": 10.0}, "1": {"hits": 80.0, "late": 20.0}}
    text = svg.bars("needs", groups, stacked=True, colours={"hits": "#111"})
    bars = [{k: bar.get(k) for k in ("y", "height", "fill")} for bar in drawn(text, "rect")]
    assert numbers(text, "beside") == ["0", "50", "100"] and numbers(text, "below") == ["0", "1"]
    assert bars[0] == {"y": "700.0", "height": "300.0", "fill": "#111"}
    assert (bars[1]["y"], bars[1]["height"]) == ("600.0", "100.0")  # upon the first
    assert (bars[3]["y"], bars[3]["height"]) == ("0.0", "200.0")
    beside = drawn(svg.bars("speed", groups), "rect")
    assert [bar.get("x") for bar in beside] == ["50.0", "250.0", "550.0", "750.0"]
    assert beside[3].find("title").text == "1 late: 20"  # type: ignore[union-attr]


def test_lines_and_points_run_from_corner_to_corner() -> None:
    series = {"a": [(0.0, 0.0), (5.0, 50.0), (10.0, 100.0)], "b": [(10.0, 0.0)]}
    line, mark = drawn(svg.lines("loss", series), "path")
    assert line.get("d") == "M0.0 1000.0L500.0 500.0L1000.0 0.0"
    assert mark.get("d") == "M1000.0 1000.0h0.01"
    assert len(drawn(svg.points("front", series), "path")) == 4


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (3, 3), (-2, -2), (1e-9, 2e-9), (-5, 7), (0, 1e12), (2.999, 3.001)]
)
def test_axes_hold_all_there_is(low: float, high: float) -> None:
    ticks = svg._ticks(low, high)
    assert 2 <= len(ticks) <= 7 and ticks[0] <= low + 1e-12 and high - 1e-12 <= ticks[-1]
    assert ticks == sorted(set(ticks))


def test_what_others_named_is_no_markup() -> None:
    text = svg.bars("<b>", {"<i>": {"</svg><script>": 1.0}}) + svg.points("", {"<u>": [(1, 2)]})
    assert not re.search(r"<(b|i|u|script)>", text) and drawn(svg.lines("none", {}), "path") == []


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
    assert flow["tokens/s"] == [(100.0, 0.05), (105.0, 1.2)]


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
