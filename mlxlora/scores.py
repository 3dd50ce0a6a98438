"""What an evaluation found, on the screen: figures, verdicts, the worst rows."""

from collections.abc import Sequence

from mlxlora.console import Screen
from mlxlora.evaluation.intervals import FEWEST_ROWS
from mlxlora.evaluation.metrics import Metric
from mlxlora.evaluation.results import Comparison, Estimate, Result
from mlxlora.evaluation.rows import Bad

SHOWN = 240  # characters of a text


def show_results(screen: Screen, results: Sequence[Result], metrics: Sequence[Metric]) -> None:
    """A table of losses, and one of metrics if there are any."""
    screen.table(
        ["model", "loss", "95 % interval", "perplexity", "tokens", "rows"],
        [
            [
                result.name,
                f"{result.loss:.4f}",
                "{:.3f} to {:.3f}".format(*result.loss_interval),
                f"{result.perplexity:.4g}",
                f"{result.tokens:,}",
                f"{result.rows:,}",
            ]
            for result in results
        ],
    )
    if metrics and all(result.metrics for result in results):
        screen.say()
        screen.table(
            ["answers", "", "95 % interval"],
            [
                [f"{metric.name}: {result.name}", *_estimate(result.metrics[metric.name], metric)]
                for metric in metrics
                for result in results
            ],
        )


def show_comparisons(
    screen: Screen, results: Sequence[Result], comparisons: Sequence[Comparison]
) -> None:
    """By every figure, a line for every two models: better, worse, or no difference shown."""
    if not comparisons:
        return
    screen.say()
    screen.table(
        ["beside each other", "difference", "95 % interval", ""],
        [[f"{one.metric}: {one.a} beside {one.b}", *_standing(one)] for one in comparisons],
    )
    if results[0].rows < FEWEST_ROWS:
        screen.say(f"Fewer than {FEWEST_ROWS} rows show no difference, whatever it is.", "dim")


def show_worst(screen: Screen, result: Result, rows: Sequence[Bad]) -> None:
    """The rows on which a model is worst, with what the others made of them."""
    if not rows:
        return
    by = next(iter(result.metrics), "loss")
    screen.heading(f"Where {result.name} is worst, by {by}")
    for number, bad in enumerate(rows):
        screen.say()
        screen.say(f"{number + 1}. {bad.where}", "bold")
        lines = [] if bad.prompt is None else [("asked", _short(bad.prompt))]
        lines.append(("wanted" if bad.prompt is not None else "text", _short(bad.wanted)))
        for name, told in bad.models.items():
            figures = {"loss": told.get("loss"), **told.get("metrics", {})}
            said = ", ".join(f"{k} {v:.3g}" for k, v in figures.items() if v is not None)
            answer = _short(told["answer"]) if "answer" in told else ""
            lines.append((name, f"{answer}\n({said})" if answer else f"({said})"))
        screen.facts(lines)


def _estimate(estimate: Estimate, metric: Metric) -> list[str]:
    low, high = estimate.interval
    form = "{:.1%}" if metric.share else "{:.4g}"
    return [form.format(estimate.value), f"{form.format(low)} to {form.format(high)}"]


def _standing(comparison: Comparison) -> list[str]:
    low, high = comparison.interval
    interval = f"{low:+.3g} to {high:+.3g}"
    return [f"{comparison.difference:+.3g}", interval, comparison.verdict]


def _short(text: str) -> str:
    line = text.strip() or "(nothing)"
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
