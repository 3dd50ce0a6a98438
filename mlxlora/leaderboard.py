"""A sweep on the screen: in a terminal a table that stays in its place, in a pipe plain lines."""

import time
from collections.abc import Iterator, Sequence

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mlxlora.console import Screen
from mlxlora.display import PLAIN_SECONDS
from mlxlora.errors import printable
from mlxlora.sweep.board import Board, Standing
from mlxlora.sweep.loop import News
from mlxlora.train.events import Eval, Resumed, Skipped, Start, Step

STYLES = {"running": "cyan", "finished": "green", "dropped": "dim", "failed": "red"}
AROUND = 6  # lines of a terminal that are left to other things
BAR = 8  # characters


class Leaderboard:
    """Shows a sweep's news."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self._live = screen.console.is_terminal
        self._said = time.monotonic()
        self._figures = Text()  # of the last update
        self._training = ""  # the variant whose turn it is

    def show(self, news: Iterator[News]) -> News | None:
        """Consume the news; return the last."""
        last = None
        with Live(
            Text(), console=self.screen.console, transient=True, auto_refresh=False
        ) as region:
            for last in news:
                with self.screen.unless_gone():
                    self._tell(last)
                    if self._live:
                        region.update(self._standing(last), refresh=True)
            region.update(Text(), refresh=True)
        return last

    def table(self, board: Board) -> None:
        """How all stand, best first."""
        self.screen.console.print(_table(board.ranked()))

    def _tell(self, news: News) -> None:
        say, event = self.screen.say, news.event
        if news.rung:
            self._decided(news)
        elif news.name and event is None:
            self._stands(news.board.find(news.name), news.board)
        elif isinstance(event, Start | Resumed) and news.name != self._training:
            self._training = news.name
            if not self._live:
                say(f"{news.name}")
        elif isinstance(event, Skipped):
            say(f"{news.name}: update {event.update} skipped: {event.reason}", "yellow")
        elif not self._live and isinstance(event, Eval) and event.update:
            mark = "  best so far" if event.best else ""
            say(f"{event.update:>7}  validation loss {event.loss:.3f}{mark}")
        elif not self._live and isinstance(event, Step):
            self._step(event)

    def _step(self, event: Step) -> None:
        now = time.monotonic()
        if now - self._said > PLAIN_SECONDS:
            self._said = now
            self.screen.say(f"{event.update:>7}  loss {event.loss:.3f}")

    def _stands(self, one: Standing, board: Board) -> None:
        """One line when a variant's turn is over."""
        if one.state == "failed":
            self.screen.say(f"{one.name} failed: {one.reason}", "red")
            return
        where = "finished" if one.state == "finished" else f"rung {one.rung} of {len(board.rungs)}"
        self.screen.say(
            f"{one.name}: {where}, validation loss {_loss(one)}",
            "green" if one.state == "finished" else "",
        )

    def _decided(self, news: News) -> None:
        share = 100 * news.board.rungs[news.rung - 1]
        left = len(news.board.alive())
        text = f"rung {news.rung}, after {share:.3g} % of a run: {left} go on"
        if news.dropped:
            text += f"; dropped: {'; '.join(news.dropped)}"
        self.screen.say(text, "bold")

    def _standing(self, news: News) -> Group:
        ranked = news.board.ranked()
        most = max(3, self.screen.console.size.height - AROUND)
        shown: list[Standing] = ranked[:most]
        parts: list[Table | Text] = [_table(shown, news.name)]
        if len(ranked) > len(shown):
            parts.append(Text(f"and {len(ranked) - len(shown)} more", "dim"))
        if isinstance(news.event, Step):
            step = news.event
            rate = step.tokens / max(step.seconds, 1e-9)
            figures = f"loss {step.loss:.3f}  lr {step.learning_rate:.1e}  {rate:,.0f} tok/s"
            self._figures = Text(f"{figures}  {news.name}", "dim", no_wrap=True)
            self._figures.truncate(self.screen.console.width - 4)  # room for the echo of Ctrl-C
        parts.append(self._figures)
        return Group(*parts)


def _table(standings: Sequence[Standing], now: str = "") -> Table:
    """now: the variant whose turn it is."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("variant", overflow="fold")
    table.add_column("loss", justify="right")
    table.add_column("updates", justify="right")
    table.add_column("")
    table.add_column("")
    for one in standings:
        turn = "training" if one.name == now and one.state == "running" else one.state
        state = "paused" if turn == "running" else turn
        style = STYLES.get(one.state, "") if turn != "running" else ""
        table.add_row(
            Text(printable(one.name), "bold" if turn == "training" else style),
            _loss(one),
            f"{one.updates:,}/{one.of:,}" if one.of else "",
            _bar(one),
            Text(state, style),
        )
    return table


def _bar(one: Standing) -> Text:
    done = round(BAR * one.updates / one.of) if one.of else 0
    return Text("━" * done, STYLES.get(one.state, "")).append("━" * (BAR - done), "bright_black")


def _loss(one: Standing) -> str:
    return escape(f"{one.loss:.4f}") if one.loss is not None else "-"
