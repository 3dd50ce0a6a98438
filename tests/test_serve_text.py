"""Stop strings against str.find on the whole text, however it is cut."""

from hypothesis import given
from hypothesis import strategies as st

from mlxlora.serve.orders import Piece, Spelled
from mlxlora.serve.text import Stops

ALPHABET = "ab\n"
PIECES = st.lists(st.text(ALPHABET, max_size=4), max_size=12)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)


def run(stops, pieces, told=False):
    """(text, tokens told, whether a stop was met)."""
    machine, found = Stops(stops), []
    for number, text in enumerate(pieces):
        piece, stopped = machine.feed(text, Spelled(number, 0.0) if told else None)
        found.append(piece)
        if stopped:
            break
    else:
        stopped = False
        found.append(machine.flush())
    kept = [piece for piece in found if piece is not None]
    tokens = [spelled.token for piece in kept for spelled in piece.tokens]
    return "".join(piece.text for piece in kept), tokens, stopped


def cut(stops, text):
    """By definition: at the stop that is complete first, of several the longest."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


@given(STOPS, PIECES)
def test_however_the_text_is_cut_the_answer_is_the_same(stops, pieces):
    text, _, stopped = run(stops, pieces)
    assert (text, stopped) == cut(stops, "".join(pieces))


@given(STOPS, PIECES)
def test_tokens_go_out_with_their_text(stops, pieces):
    text, tokens, stopped = run(stops, pieces, told=True)
    assert tokens == list(range(len(tokens)))
    if not stopped:
        assert len(tokens) == len(pieces)
    assert "".join(pieces[: len(tokens)]).startswith(text)
    begins = [len("".join(pieces[:token])) for token in tokens if pieces[token]]
    assert all(begin < len(text) for begin in begins)


@given(STOPS, PIECES)
def test_nothing_goes_out_that_a_stop_may_still_take_back(stops, pieces):
    machine, out, seen = Stops(stops), "", ""
    for text in pieces:
        seen += text
        piece, stopped = machine.feed(text, None)
        out += piece.text if piece else ""
        if stopped:
            return
        for end in stops:
            for n in range(1, len(end)):
                if seen.endswith(end[:n]):
                    assert len(out) <= len(seen) - n


def test_text_without_stops_goes_straight_through():
    machine = Stops(())
    assert machine.feed("abc", None) == (Piece("abc"), False)
    assert machine.feed("", None) == (None, False)
    assert machine.feed("", Spelled(1, -0.5)) == (Piece("", (Spelled(1, -0.5),)), False)
    assert machine.flush() is None
