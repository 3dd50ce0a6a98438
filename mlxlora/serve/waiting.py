"""Orders' answers as an iterator, for whoever may wait: the terminal, tests, scripts."""

from collections.abc import Iterator, Sequence
from functools import partial
from queue import SimpleQueue

from mlxlora.errors import ModelError
from mlxlora.serve.engine import Engine
from mlxlora.serve.orders import End, Event, Fault, Order, Piece


def answers(engine: Engine, orders: Sequence[Order]) -> Iterator[tuple[int, Piece | End]]:
    """(number of the order, event) as they come, until each has its End.

    They are decoded together. Leaving early, or Ctrl-C, cancels what is left. Raises what
    Engine.submit does, and ModelError for a Fault.
    """
    events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
    tickets = []
    try:
        for number, order in enumerate(orders):
            tickets.append(engine.submit(order, partial(_numbered, events, number)))
        left = len(tickets)
        while left:
            number, event = events.get()
            if isinstance(event, Fault):
                raise ModelError(event.message)
            left -= isinstance(event, End)
            yield number, event
    finally:
        for ticket in tickets:
            ticket.cancel()


def _numbered(events: SimpleQueue[tuple[int, Event]], number: int, event: Event) -> None:
    events.put((number, event))
