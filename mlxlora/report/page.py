"""page(run) and comparison_page(runs): HTML, made by Jinja, which escapes all that it is given."""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from mlxlora.comparison import as_json, differences, ranked
from mlxlora.console import clock
from mlxlora.errors import CheckpointError, printable
from mlxlora.report import told
from mlxlora.report.beside import Evaluation, read_evaluation, read_fused
from mlxlora.report.curves import curves, overlaid
from mlxlora.report.rows import Looked, look
from mlxlora.runs import Run
from mlxlora.train.events import perplexity
from mlxlora.train.places import ADAPTER

EVALUATION = "eval.json"  # in a run's directory, taken without being named
MOST_OVERLAID = 8  # curves that can be told apart
COLUMNS = ("", "run", "state", "method", "rank", "rate", "updates", "before", "best", "time")


def page(run: Run, evaluations: Sequence[Path] = (), fused: Path | None = None) -> str:
    """A run as a page. Raises CheckpointError for files beside it that are not what they should."""
    own = [run.path / EVALUATION] if (run.path / EVALUATION).is_file() else []
    weights = str(told.told_in(run.path / ADAPTER / "provenance.json").get("weights_sha256") or "")
    looked = look(run)
    options = [(one.key, one.value, one.default) for one in told.options(run.config)]
    changed = [o for o, one in zip(options, told.options(run.config), strict=True) if one.changed]
    return _render(
        "run.html",
        name=run.name,
        method=f"{run.config.lora.method}, rank {run.config.lora.rank}",
        base=run.origin.base.get("name", run.config.model),
        headline=told.headline(run),
        remarks=told.remarks(run),
        curves=curves(run),
        answers=told.answers(run),
        before=run.before,
        before_perplexity=perplexity(run.before) if run.before is not None else math.nan,
        best=run.best,
        evaluations=[_shown(read_evaluation(path)) for path in [*own, *evaluations]],
        fused=read_fused(fused, weights) if fused is not None else None,
        data_facts=_data_facts(run),
        **_rows(looked),
        changed=[row for row in changed if row[0] != "out"],
        options=options,
        origin=told.origin(run),
        commands=told.commands(run),
    )


def _shown(found: Evaluation) -> dict[str, Any]:
    grid = [[row.name, *row.cells] for row in found.rows]
    return {**vars(found), "grid": grid}


def _data_facts(run: Run) -> told.Facts:
    start = run.start
    splits = run.origin.data.items()
    found = [(split, f"{one['rows']:,} rows, {one['path']}") for split, one in splits]
    if start is not None and start.skipped_rows:
        found.append(("left out", f"{start.skipped_rows:,} bad rows"))
    return found


def _rows(looked: Looked) -> dict[str, Any]:
    if looked.found is None:
        return {"looked": None, "bars": [], "missing": looked.missing.rstrip(".")}
    bars = looked.found.lengths.bars
    most = max((bar.rows for bar in bars), default=1) or 1
    shown = [
        {"label": f"{b.first:,} to {b.last:,}", "rows": b.rows, "width": round(100 * b.rows / most)}
        for b in bars
    ]
    return {"looked": looked.found, "bars": shown, "missing": ""}


def comparison_page(
    runs: Sequence[Run],
    name: str,
    sweep: Sequence[tuple[str, str]] = (),
    states: Mapping[str, str] | None = None,
) -> str:
    """Several runs as a page; curves of the best ones.

    sweep: what their search has to say; states: what it did with runs of these names.
    """
    groups = ranked(runs)
    best = [run for group in groups for run in group.runs][:MOST_OVERLAID]
    found = differences(best)
    return _render(
        "compared.html",
        name=name,
        count=len(runs),
        sweep=list(sweep),
        columns=COLUMNS,
        groups=[
            {
                "title": group.title,
                "rows": [_row(n, run, states or {}) for n, run in enumerate(group.runs, 1)],
            }
            for group in groups
        ],
        curves=overlaid(best),
        names=[run.name for run in best],
        differences=[[one.what, *one.values] for one in found],
    )


def _row(place: int, run: Run, states: Mapping[str, str]) -> list[str]:
    one = as_json(run)
    return [
        str(place),
        run.name,
        states.get(run.name, run.state),
        str(one["method"]),
        str(one["rank"]),
        f"{one['learning_rate']:g}" if one["learning_rate"] else "",
        f"{run.updates:,}",
        f"{run.before:.4f}" if run.before is not None else "",
        f"{run.best.loss:.4f}" if run.best is not None else "",
        clock(one["seconds"]),
    ]


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("mlxlora.report", "pages"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        finalize=_text,
        trim_blocks=True,
    )
    style = files("mlxlora.report").joinpath("pages", "style.css").read_text("utf-8")
    return environment.get_template(template).render(style=Markup(style), **values)


def _text(value: Any) -> Any:
    """Control characters, which no page may hold, are spelled out."""
    return value if isinstance(value, Markup) else printable(str(value))


def check_target(path: Path) -> None:
    """Raise CheckpointError if a page would replace something that is no page."""
    if path.is_dir() or (path.exists() and path.suffix not in (".html", ".htm")):
        raise CheckpointError(f"{path} is there and is no page; name a file such as report.html")
