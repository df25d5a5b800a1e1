"""Stop strings are found whatever the cuts, and nothing shown is taken back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from chronos.common.text.stop import StopText


def shown(stop: list[str], pieces: list[str]) -> tuple[str, bool]:
    finder = StopText(stop)
    text = ""
    for piece in pieces:
        text += finder.push(piece)
        if finder.found:
            break
    return text + finder.flush(), finder.found


def test_a_stop_string_across_pieces_ends_the_text_before_it() -> None:
    assert shown(["\n\ndef"], ["a\n", "\nd", "ef f():"]) == ("a", True)


def test_a_beginning_that_leads_nowhere_is_shown_in_the_end() -> None:
    finder = StopText(["<end>"])
    assert finder.push("x <e") == "x "
    assert finder.push("n") == ""
    assert finder.push("try") == "<entry"
    assert finder.push(" <en") == " "
    assert finder.flush() == "<en"
    assert not finder.found


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert shown(["cd", "bc"], ["a", "b", "c", "d"]) == ("a", True)


@settings(deadline=None)
@given(
    st.text("ab<>", max_size=30),
    st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3),
    st.randoms(),
)
def test_the_cuts_do_not_matter(text: str, stop: list[str], rng) -> None:  # type: ignore[no-untyped-def]
    cuts = sorted(rng.sample(range(len(text) + 1), min(4, len(text) + 1)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    result, found = shown(stop, pieces)
    assert text.startswith(result)
    assert found == any(s in text for s in stop)
    if not found:
        assert result == text
    assert not any(s in result for s in stop)
