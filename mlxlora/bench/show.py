"""What bench measured, on the screen: a table a workload, and what it means in a sentence."""

from collections.abc import Callable, Sequence

from mlxlora.bench.report import Decoding, Figure, Ratio, Report, Training
from mlxlora.console import Screen, size

# figure -> (its label, how a value is written)
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "tokens_per_second": ("tokens per second", lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}"),
    "seconds_per_update": ("seconds per update", lambda v: f"{v:.3g}"),
    "peak_memory": ("peak memory", lambda v: size(round(v))),
    "share_of_limit": ("share of the limit", lambda v: f"{100 * v:.0f} %"),
}


def show_bench(screen: Screen, report: Report) -> None:
    """What bench measured, for someone who wants to know which is faster, and by how much."""
    model = report.model
    packed = f" at {model.bits} bits" if model.bits else ""
    screen.facts(
        [
            ("model", f"{model.name}, {model.weights / 1e6:,.3g} million weights{packed}"),
            ("machine", f"{model.device}, computing in {model.dtype}"),
            ("adapter", f"LoRA of rank {report.rank} on every linear layer"),
        ]
    )
    for training in report.training:
        _show_bench_training(screen, report, training)
    if report.decoding is not None:
        _show_bench_decoding(screen, report, report.decoding)
    if report.against != "none":
        screen.say()
        rounds = f"median of {report.rounds} rounds" if report.rounds > 1 else "of one round only"
        screen.say(
            f"ratio: mlxlora / {report.against}, {rounds}. Both sides took turns, each time in a "
            "fresh process, after a warm-up.",
            "dim",
        )


def _show_bench_training(screen: Screen, report: Report, training: Training) -> None:
    one, job = training.one, training.job
    screen.heading(f"Training: {job.workload}")
    screen.say(training.about)
    screen.say(
        f"{_count(job.updates, 'update')} of {_count(job.batch, 'row')}: "
        f"{one.tokens:,} tokens read, {one.supervised:,} of them trained",
        "dim",
    )
    ratios = _bench_table(screen, report, training.figures(), "trained tokens per second")
    if ratios:
        speed, memory = ratios["tokens_per_second"], ratios["peak_memory"]
        screen.say(
            f"mlxlora trains {_how_fast(speed)} as {report.against}, "
            f"with {memory.median:.2f} times the memory.",
            "bold green" if speed.most >= 1 and memory.least <= 1 else "bold yellow",
        )
        worst = max(training.loss_differences())
        screen.say(f"Same work: the losses of all updates agree within {worst:.0e}.", "dim")
    for side in training.out_of_memory:
        screen.say(f"{side} ran out of memory on these rows.", "bold green")
    if job.checkpoint_blocks:
        screen.say("Both sides computed their blocks again in the backward pass.")
    if one.operations:
        screen.say(
            f"The limit: an update's arithmetic ({one.operations / job.updates / 1e9:,.3g} GFLOP) "
            f"at {training.matrix_rate / 1e9:,.0f} GFLOP/s, as fast as this machine multiplies "
            "large matrices.",
            "dim",
        )


def _show_bench_decoding(screen: Screen, report: Report, decoding: Decoding) -> None:
    screen.heading("Decoding: one answer, with the adapter")
    ratios = _bench_table(screen, report, decoding.figures(), "tokens per second")
    if ratios:
        speed = ratios["tokens_per_second"]
        style = "bold green" if speed.most >= 1 else "bold yellow"
        screen.say(f"mlxlora decodes {_how_fast(speed)} as {report.against}.", style)
        same = "the same" if decoding.same_tokens else "not all the same"
        screen.say(f"The {len(decoding.one.tokens)} tokens were {same}.", "dim")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _how_fast(ratio: Ratio) -> str:
    """A difference that not every round shows is not claimed."""
    unclear = ratio.least < 1 < ratio.most
    return "about as fast" if unclear else f"{ratio.median:.2f} times as fast"


def _bench_table(
    screen: Screen, report: Report, figures: Sequence[Figure], tokens: str
) -> dict[str, Ratio]:
    """Print the figures; return key -> ratio. tokens: which tokens per second."""
    spread = report.rounds > 1
    sides = list(figures[0].values)
    compared = figures[0].ratio is not None
    rows = []
    for figure in figures:
        label, written = FIGURES[figure.key]
        row = [tokens if figure.key == "tokens_per_second" else label]
        row += [written(figure.values[side]) for side in sides]
        ratio = figure.ratio
        row += [f"{ratio.median:.2f}" if ratio else ""] * compared
        row += [f"{ratio.least:.2f} to {ratio.most:.2f}" if ratio else ""] * (compared and spread)
        rows.append(row)
    columns = ["", *sides, *["ratio"] * compared, *["spread"] * (compared and spread)]
    screen.table(columns, rows)
    return {figure.key: figure.ratio for figure in figures if figure.ratio}
