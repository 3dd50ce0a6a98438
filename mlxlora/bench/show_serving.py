"""What bench measured of serving, on the screen: rates and waits, then the ratios."""

from mlxlora.bench.rates import STREAM, Row, Serving
from mlxlora.bench.soak import CLIENTS, Soak
from mlxlora.console import Screen, clock, size


def show_serving(screen: Screen, report: Serving) -> None:
    """Both servers below each other in every setting, then who is how many times as fast."""
    model = report.model
    packed = f" at {model.bits} bits" if model.bits else ""
    screen.facts(
        [
            ("model", f"{model.name}, {model.weights / 1e6:,.3g} million weights{packed}"),
            ("machine", f"{model.device}, weights in {model.dtype}"),
            ("adapters", f"four, LoRA of rank {report.rank} on every linear layer"),
        ]
    )
    rows = report.rows()
    screen.heading("Serving: greedy answers, streamed")
    columns = ["", "clients", "asked/s", "tokens/s", "total/s", "first", "95 %"]
    screen.table(columns, [_cells(row) for row in rows])
    screen.say(
        "asked/s: requests. tokens/s: generated, by all clients together; in one stream after its "
        "first. total/s: those of the prompts too. first: seconds to the first text, of the "
        "median request and of the 95th percentile.",
        "dim",
    )
    for row in rows:
        if row.cut_short:
            _say_cut_short(screen, report, row)
    _show_ratios(screen, report)


def _cells(row: Row) -> list[str]:
    setting = row.setting
    name = setting.key.replace("adapters", f"{len(setting.adapters)} adapters")
    rate = row.decoding_rate if setting.key == STREAM else row.tokens_per_second
    return [
        f"{name}, {row.side}",
        f"{setting.clients}",
        _figure(row.requests_per_second),
        _figure(rate),
        _figure(row.total_tokens_per_second),
        _figure(row.first_token),
        _figure(row.first_token_95),
    ]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _say_cut_short(screen: Screen, report: Serving, row: Row) -> None:
    setting = row.setting
    rounds = len(report.rounds[row.side])
    screen.say(
        f"{row.side} had not answered all {setting.requests} requests ({setting.key}, "
        f"{setting.clients} at once) after {report.limit:g} s, in {row.cut_short} of {rounds} "
        "rounds: its figures are those so far.",
        "yellow",
    )


def _show_ratios(screen: Screen, report: Serving) -> None:
    rounds = next(iter(report.rounds.values()))
    spread = len(rounds) > 1
    screen.heading("Ratios of tokens/s")
    rows = []
    for compared in report.ratios():
        ratio = compared.ratio
        row = [compared.of, f"{compared.clients}", f"{ratio.median:.2f}"]
        rows.append(row + [f"{ratio.least:.2f} to {ratio.most:.2f}"] * spread)
    screen.table(["", "clients", "ratio", *["spread"] * spread], rows)
    told = f"median of {len(rounds)} rounds" if spread else "of one round only"
    screen.say(f"ratio: {told}, taken within a round, the servers in turns, started anew.", "dim")
    if report.same_answers is not None:
        alike, of = report.same_answers
        screen.say(f"Same work: {alike} of {of} adapters gave the same answer on both.", "dim")


def show_soak(screen: Screen, report: Soak) -> None:
    """What became of the requests, how the memory went, and whether that is a pass."""
    counts = [f"{count:,} {kind}" for kind, count in sorted(report.counts.items())]
    screen.facts(
        [
            ("requests", f"{report.requests:,} (seed {report.seed}): {', '.join(counts)}"),
            ("time", f"{clock(report.seconds)}, {CLIENTS} at once"),
            (
                "memory",
                " ".join(size(held) for _, held in report.memory[:: len(report.memory) // 10 or 1]),
            ),
            ("after halves", " and ".join(map(size, report.halves)) + f" ({report.growth:.3f}x)"),
            ("health", "ok" if report.healthy else "not healthy"),
        ]
    )
    for failure in report.failures:
        screen.say(failure, "yellow")
    for fault in report.faults:
        screen.say(fault, "bold red")
    if not report.faults:
        screen.say("Nothing stuck, nothing failed, memory as it was.", "bold green")
