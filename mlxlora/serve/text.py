"""Stop strings, matched on decoded text: what may be the beginning of one is held back.

The stop that is complete first ends the text, of several that end together the longest; so the
answer is the same however its text is cut into pieces.
"""

from collections.abc import Sequence

from mlxlora.serve.orders import Piece, Spelled


class Stops:
    """feed() the text piece by piece, then flush() what is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._letters = {stop[0] for stop in stops}
        self._longest = max(map(len, stops), default=1)
        self._held = ""
        self._tokens: list[tuple[Spelled, int, int]] = []  # and where in _held each begins, ends

    def feed(self, text: str, spelled: Spelled | None) -> tuple[Piece | None, bool]:
        """(what is final now, whether a stop is complete); the stop and what follows are gone.

        spelled: the token that the text came from, if it is to be told; it goes out with its text.
        """
        begins = len(self._held)
        self._held += text
        if spelled is not None:
            self._tokens.append((spelled, begins, len(self._held)))
        cut = self._complete(max(0, begins - self._longest + 1)) if text else None
        if cut is not None:
            told = [spelled for spelled, begins, _ in self._tokens if begins < cut]
            piece = _piece(self._held[:cut], told)
            self._held, self._tokens = "", []
            return piece, True
        return self._release(len(self._held) - self._possible()), False

    def flush(self) -> Piece | None:
        """What was held back: no stop was in it after all."""
        return self._release(len(self._held))

    def _complete(self, start: int) -> int | None:
        """Where the first complete stop begins."""
        found = [
            (at + len(stop), at)
            for stop in self._stops
            if (at := self._held.find(stop, start)) >= 0
        ]
        return min(found)[1] if found else None

    def _possible(self) -> int:
        """Length of the longest end of the text that a stop begins with."""
        for at in range(max(0, len(self._held) - self._longest + 1), len(self._held)):
            if self._held[at] in self._letters:
                end = self._held[at:]
                if any(stop.startswith(end) for stop in self._stops):
                    return len(end)
        return 0

    def _release(self, length: int) -> Piece | None:
        told = [spelled for spelled, _, ends in self._tokens if ends <= length]
        self._tokens = [
            (spelled, begins - length, ends - length)
            for spelled, begins, ends in self._tokens
            if ends > length
        ]
        text, self._held = self._held[:length], self._held[length:]
        return _piece(text, told)


def _piece(text: str, told: Sequence[Spelled]) -> Piece | None:
    return Piece(text, tuple(told)) if text or told else None
