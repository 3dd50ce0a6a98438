"""Stop strings on decoded text, against str.find on all of it."""

from hypothesis import given
from hypothesis import strategies as st

from mlxlora.serve.orders import Piece, Spelled
from mlxlora.serve.text import Stops

LETTERS = st.sampled_from("ab€")
PIECES = st.lists(st.text(LETTERS, max_size=4), max_size=20)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=6), max_size=4)


def said(stops, pieces, told=False):
    """(text, tokens, whether stopped, whether each piece was final when it went out)."""
    machine, text, tokens = Stops(stops), "", []
    for number, piece in enumerate(pieces):
        out, stopped = machine.feed(piece, Spelled(number, -1.0) if told else None)
        if out is not None:
            text, tokens = text + out.text, [*tokens, *(one.token for one in out.tokens)]
        if stopped:
            return text, tokens, True
    out = machine.flush() or Piece("")
    return text + out.text, [*tokens, *(one.token for one in out.tokens)], False


@given(STOPS, PIECES)
def test_text_ends_where_the_first_complete_stop_begins(stops, pieces):
    whole = "".join(pieces)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    text, _, stopped = said(stops, pieces)
    assert stopped == bool(ends)
    assert text == (whole[: min(ends)[1]] if ends else whole)


@given(STOPS, PIECES)
def test_tokens_go_out_with_their_text_and_none_begins_after_the_cut(stops, pieces):
    text, tokens, stopped = said(stops, pieces, told=True)
    begins = [len("".join(pieces[:number])) for number in range(len(pieces))]
    if stopped:
        assert tokens == [n for n in range(len(pieces)) if n in tokens]
        assert all(begins[n] < len(text) for n in tokens if pieces[n])
        assert all(n in tokens for n in range(len(pieces)) if pieces[n] and begins[n] < len(text))
    else:
        assert tokens == list(range(len(pieces)))


@given(STOPS, PIECES)
def test_nothing_goes_out_that_a_stop_may_begin_with(stops, pieces):
    machine, out = Stops(stops), ""
    for piece in pieces:
        more, stopped = machine.feed(piece, None)
        if stopped:
            return
        out += more.text if more else ""
        whole = "".join(pieces)[: len(out)]
        assert out == whole
    held = "".join(pieces)[len(out) :]
    assert all(not stop.startswith(held) or len(held) < len(stop) for stop in stops if held)
    assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_across_many_pieces_is_cut_off():
    assert said(["</answer>"], list("ab</answer>cd")) == ("ab", [], True)
    assert said(["</answer>"], list("ab</answer")) == ("ab</answer", [], False)
