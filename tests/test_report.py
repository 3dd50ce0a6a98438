"""A run as a page: what it says, and that it asks nothing of anyone."""

import dataclasses
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import write_rows
from typer.testing import CliRunner

from mlxlora.cli import app
from mlxlora.config import RunConfig
from mlxlora.errors import CheckpointError, ConfigError
from mlxlora.report.curves import curves, smoothed
from mlxlora.report.page import page
from mlxlora.report.plots import Line, plot
from mlxlora.report.write import write_report
from mlxlora.runs import load_run
from mlxlora.train.events import Eval, Resumed, Sample, Skipped, Step, to_json
from mlxlora.train.loop import train

HOSTILE = '<script>fetch("//evil.example")</script><img src=//evil.example/x onerror=alert(1)>'


@pytest.fixture(scope="module")
def run_path(dense_path, tmp_path_factory) -> Path:
    """A finished run on rows, and with a prompt, that try to be HTML."""
    place = tmp_path_factory.mktemp("report")
    rows = write_rows(
        place / "rows.jsonl",
        [{"prompt": f"{HOSTILE} {n}", "completion": f"</div>{n}"} for n in range(20)],
    )
    config = RunConfig.from_dict(
        {
            "model": str(dense_path),
            "out": str(place / "runs" / "one"),
            "data": {"path": str(rows)},
            "train": {"updates": 6},
            "eval": {"prompts": [HOSTILE], "max_tokens": 3, "every": 2},
            "lora": {"rank": 4},
        }
    )
    list(train(config))
    return place / "runs" / "one"


class Reader(HTMLParser):
    """What is on a page: its text, its tags, and every address in an attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.said: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "action", "data", "srcset")
        self.addresses += [value or "" for name, value in attrs if name in names]

    def handle_data(self, data: str) -> None:
        self.said.append(data)


@pytest.fixture(scope="module")
def read(run_path) -> Reader:
    return Reader(page(load_run(run_path)))


def test_the_page_tells_the_run(read, run_path):
    run = load_run(run_path)
    for told in (
        f"{run.before:.4f} → {run.best.loss:.4f}",
        "6 of 6",
        "before training",
        "lora.rank",
        run.origin.base["fingerprint"],
        f"mlxlora train {run_path}/run.toml --out {run_path}-again",
        "As the model sees them",
    ):
        assert told in read.text, told


def test_the_page_asks_nothing_of_any_host_and_runs_nothing(read):
    assert "script" not in read.tags and "img" not in read.tags and "iframe" not in read.tags
    assert all(address.startswith(("data:", "#")) for address in read.addresses)


def test_rows_and_answers_that_are_html_stay_text(read):
    assert HOSTILE in read.text and "</div>1" in read.text


def test_every_id_of_the_page_is_there_once(run_path):
    ids = re.findall(r'\bid="([^"]+)"', page(load_run(run_path)))
    assert ids and len(ids) == len(set(ids))


def test_every_reference_of_a_drawing_leads_to_a_part_of_it():
    svg = plot([Line("v", [0, 1, 2], [3.0, 2.0, 1.0], 0, "points")], "loss", "Gradient norm")
    ids = set(re.findall(r'\bid="([^"]+)"', svg))
    used = re.findall(r'(?:href="|url\()#([^")]+)', svg)
    assert used and set(used) <= ids
    assert all(name.startswith("gradient-norm-") for name in ids)


@pytest.mark.parametrize("name", ["a$b$", "cost $\\frac$ x^{", "_first", "日本語", "<b>&amp;"])
def test_a_run_may_be_called_anything(name):
    svg = plot([Line(name, [0, 1], [3.0, 2.0])], "loss", "x")
    assert name in html.unescape("".join(re.findall(r"<text[^>]*>(.*?)</text>", svg)))


def test_the_same_run_gives_the_same_page(run_path):
    assert page(load_run(run_path)) == page(load_run(run_path))


def test_curves_are_drawn_of_the_logged_values(run_path):
    run = load_run(run_path)
    titles = [curve.title for curve in curves(run)]
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Speed", "Memory"]
    svg = curves(run)[0].svg
    assert "var(--curve-1)" in svg and "#010101" not in svg and "validation" in svg


def test_a_plot_has_a_mark_for_each_validation():
    svg = plot([Line("v", [0, 1, 2], [3.0, 2.0, 1.0], 0, "points")], "loss", "x")
    assert svg.count("<use ") - svg.count('<g id="line2d_1">') >= 3
    assert re.search(r"<path[^>]*style=\"fill: none; stroke: var\(--curve-1\)", svg)


def test_a_wide_range_is_drawn_logarithmically():
    level = plot([Line("", [0, 1], [1.0, 2.0])], "loss", "x")
    wide = plot([Line("", [0, 1], [0.01, 100.0])], "loss", "x")
    assert "mathdefault" in wide or ("10" in wide and level != wide)


def test_smoothed_values_are_centred_means_and_gaps_stay_out():
    assert smoothed([1.0, 1.0, 1.0]) == [1.0, 1.0, 1.0]
    ramp = [float(n) for n in range(200)]
    assert smoothed(ramp) == pytest.approx(ramp)
    assert smoothed([1.0, math.nan, 3.0])[1] == 2.0
    assert math.isnan(smoothed([math.nan])[0])


def changed(run_path: Path, tmp_path: Path, events: list) -> Path:
    """The run with another log."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("run.toml", "start.json"):
        (copy / name).write_bytes((run_path / name).read_bytes())
    (copy / "log.jsonl").write_text("".join(to_json(event) + "\n" for event in events))
    return copy


def test_a_run_that_only_began_has_a_page(run_path, tmp_path):
    first = load_run(run_path).events[:1]
    text = Reader(page(load_run(changed(run_path, tmp_path, list(first))))).text
    assert "cut off after update 0" in text and "nothing to draw" in text
    assert "mlxlora resume" in text


def test_skipped_resumed_and_unvalidated_updates_are_told(run_path, tmp_path):
    run = load_run(run_path)
    steps = [event for event in run.events if isinstance(event, Step)]
    bad = dataclasses.replace(steps[1], loss=math.nan, grad_norm=math.inf)
    events = [
        run.events[0],
        Resumed(3, "x", ("damaged",)),
        bad,
        Skipped(2, "the loss is nan", ("r:7",)),
    ]
    text = Reader(page(load_run(changed(run_path, tmp_path, events)))).text
    for told in ("resumed after update 3", "damaged", "update 2 skipped", "r:7", "no validation"):
        assert told in text, told


def test_answers_between_are_folded_and_the_ends_shown(run_path, tmp_path):
    run = load_run(run_path)
    samples = [Sample(n, "ask", f"answer {n}") for n in (0, 2, 4)]
    path = changed(run_path, tmp_path, [run.events[0], *samples])
    html = page(load_run(path))
    assert html.index("answer 0") < html.index("answer 4") < html.index("answer 2")


def test_rows_that_are_gone_are_said_to_be(run_path, tmp_path):
    copy = changed(run_path, tmp_path, list(load_run(run_path).events))
    start = json.loads((copy / "start.json").read_text())
    assert start["folder"]
    moved = Path(load_run(run_path).config.data.path)
    kept = moved.rename(moved.with_suffix(".away"))
    try:
        text = Reader(page(load_run(copy))).text
    finally:
        kept.rename(moved)
    assert "The rows themselves are not shown" in text


EVALUATION = {
    "model": "m",
    "data": "test.jsonl",
    "results": [
        {
            "name": "base",
            "loss": 5.0,
            "perplexity": 148.0,
            "tokens": 10,
            "rows": 2,
            "loss_interval": [4.0, 6.0],
            "metrics": {"exact": {"value": 0.25, "interval": [0.0, 0.5]}},
        }
    ],
    "comparisons": [
        {
            "metric": "loss",
            "a": "one",
            "b": "base",
            "difference": -1.0,
            "interval": [-2, -0.5],
            "verdict": "better",
        }
    ],
}


def test_evaluations_are_shown_with_their_intervals(run_path, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(EVALUATION))
    text = Reader(page(load_run(run_path), [tmp_path / "eval.json"])).text
    assert "5 [4, 6]" in text and "0.25 [0, 0.5]" in text
    assert "loss: one beside base: better (-1 [-2, -0.5])" in text


@pytest.mark.parametrize(
    "told",
    ["[]", "{}", '{"results": 3}', '{"results": [{"loss": "high"}]}', '{"results": [[]]}', "{"],
)
def test_a_file_that_is_no_evaluation_is_refused(run_path, tmp_path, told):
    (tmp_path / "eval.json").write_text(told)
    with pytest.raises(CheckpointError, match=r"eval\.json"):
        page(load_run(run_path), [tmp_path / "eval.json"])


def fused(run_path: Path, place: Path, adapter: str) -> Path:
    place.mkdir()
    figures = {
        "rows": "60 rows",
        "tokens": 9,
        "loss_base": 5.0,
        "loss_adapter": 1.0,
        "loss_written": 1.5,
        "kl_base": 3.0,
        "kl": 0.01,
        "agreement_base": 0.1,
        "agreement": 0.99,
        "kept": 0.875,
        "adapter": adapter,
    }
    (place / "fidelity.json").write_text(json.dumps(figures))
    return place


def test_a_fused_model_is_shown_if_it_is_of_this_adapter(run_path, tmp_path):
    weights = json.loads((run_path / "adapter" / "provenance.json").read_text())["weights_sha256"]
    text = Reader(page(load_run(run_path), fused=fused(run_path, tmp_path / "f", weights))).text
    assert "5 → 1 → 1.5" in text and "87.5%" in text
    with pytest.raises(CheckpointError, match="another adapter"):
        page(load_run(run_path), fused=fused(run_path, tmp_path / "g", "0" * 64))


def test_report_replaces_its_page_and_nothing_else(run_path, tmp_path):
    runner = CliRunner()
    for _ in range(2):
        result = runner.invoke(app, ["report", str(run_path), "--json"])
        assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["report"] == str(run_path / "report.html")
    (tmp_path / "precious.jsonl").write_text("{}")
    with pytest.raises(CheckpointError, match="no page"):
        write_report(run_path, tmp_path / "precious.jsonl")
    assert (tmp_path / "precious.jsonl").read_text() == "{}"


def test_several_runs_make_one_page_without_options_of_one(run_path, tmp_path):
    for name in ("a", "b"):
        other = tmp_path / "many" / name
        other.mkdir(parents=True)
        for file in ("run.toml", "start.json", "log.jsonl"):
            (other / file).write_bytes((run_path / file).read_bytes())
    log = (tmp_path / "many" / "b" / "log.jsonl").read_text().splitlines()
    better = to_json(Eval(6, 0.5, math.exp(0.5), 9, True, 0.1))
    (tmp_path / "many" / "b" / "log.jsonl").write_text("\n".join([*log[:-1], better, log[-1]]))
    sweep = {
        "recipe": "r.toml",
        "grid": {"lora.rank": [4, 8]},
        "config": {},
        "keep": 0.5,
        "rungs": [0.5],
        "variants": [{"name": "a", "run": "a", "overrides": [], "state": "dropped"}],
    }
    (tmp_path / "many" / "sweep.json").write_text(json.dumps(sweep))
    written = write_report(tmp_path / "many")
    text = Reader(written.path.read_text()).text
    assert "2 runs" in text and "lora.rank tried 4, 8" in text and "1 dropped" in text
    assert text.index("1 b finished") < text.index("2 a dropped")
    with pytest.raises(ConfigError, match="of one run"):
        write_report(tmp_path / "many", evaluations=[tmp_path / "x.json"])


def test_a_damaged_run_among_several_is_left_out_and_said(run_path, tmp_path):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        for file in ("run.toml", "start.json", "log.jsonl"):
            (tmp_path / name / file).write_bytes((run_path / file).read_bytes())
    (tmp_path / "bad" / "start.json").write_text("{}")
    written = write_report(tmp_path)
    assert "one run; left out" in written.what and "bad" in written.what
    (tmp_path / "good" / "start.json").write_text("{}")
    with pytest.raises(CheckpointError, match="left out"):
        write_report(tmp_path)


def test_a_directory_without_runs_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no run"):
        write_report(tmp_path)
