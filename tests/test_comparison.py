"""Runs beside each other, and the commands that show them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_rows
from typer.testing import CliRunner

from mlxlora.cli import app
from mlxlora.comparison import NO_ROWS, differences, ranked
from mlxlora.config import RunConfig
from mlxlora.runs import load_run
from mlxlora.train.loop import train


@pytest.fixture(scope="module")
def place(dense_path, tmp_path_factory) -> Path:
    """Four runs: a and b on the same rows, c on others, d without validation rows."""
    place = tmp_path_factory.mktemp("runs")
    many = [{"prompt": f"say {n}", "completion": str(n)} for n in range(24)]
    rows = write_rows(place / "rows.jsonl", many)
    others = write_rows(place / "others.jsonl", many[:12])
    alone = place / "alone"
    alone.mkdir()
    write_rows(alone / "train.jsonl", many)
    for name, path, rate in (
        ("a", rows, 1e-5),
        ("b", rows, 5e-3),
        ("c", others, 1e-3),
        ("d", alone, 1e-3),
    ):
        tree = {
            "model": str(dense_path),
            "out": str(place / "runs" / name),
            "data": {"path": str(path)},
            "train": {"updates": 3, "learning_rate": rate},
        }
        list(train(RunConfig.from_dict(tree)))
    return place / "runs"


@pytest.fixture(scope="module")
def four(place) -> list:
    return [load_run(place / name) for name in "abcd"]


def command(*words: object):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result


def test_runs_are_ranked_by_loss_within_the_same_rows(four):
    groups = ranked(four)
    assert [[run.name for run in group.runs] for group in groups] == [["b", "a"], ["c"], ["d"]]
    assert groups[-1].title == NO_ROWS and "validated on" in groups[0].title


def _otherwise(run, **changed):
    """The run with other options of its data, or another seed."""
    config = run.config
    seed = changed.pop("seed", config.train.seed)
    return replace(
        run,
        config=replace(
            config,
            data=replace(config.data, **changed),
            train=replace(config.train, seed=seed),
        ),
    )


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"valid_fraction": 0.3}, {"mask": "all"}, {"max_length": 9}],
)
def test_losses_of_other_splits_or_tokens_are_not_ranked_together(four, changed):
    groups = ranked([four[0], _otherwise(four[1], **changed)])
    assert [len(group.runs) for group in groups] == [1, 1]
    assert groups[0].title != groups[1].title


def test_losses_of_another_tokenizer_or_template_are_not_ranked_together(four):
    for key in ("tokenizer", "template"):
        base = {**four[1].origin.base, key: "0" * 64}
        other = replace(four[1], origin=replace(four[1].origin, base=base))
        assert len(ranked([four[0], other])) == 2
    base = {**four[1].origin.base, "fingerprint": "0" * 64}  # another base of the same family
    other = replace(four[1], origin=replace(four[1].origin, base=base))
    assert len(ranked([four[0], other])) == 1


def test_with_a_file_of_their_own_the_seed_splits_nothing(four):
    run = four[0]
    data = {**run.origin.data, "train": {**run.origin.data["train"], "path": "train.jsonl"}}
    apart = replace(run, origin=replace(run.origin, data=data))
    assert len(ranked([apart, _otherwise(apart, seed=1)])) == 1


def test_differences_are_those_of_options_and_results_alone(four):
    told = {one.what: one.values for one in differences(four[:2])}
    assert told["train.learning_rate"] == ("1e-05", "0.005")
    assert "validation loss" in told and "out" not in told and "lora.rank" not in told
    assert "train rows" in {one.what for one in differences([four[0], four[2]])}
    assert differences([four[0], four[0]]) == []


def test_runs_prints_the_best_first(place):
    result = command("runs", place, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])["runs"]
    assert [one["name"] for one in told] == ["b", "a", "c", "d"]
    assert told[0]["valid_loss"] < told[1]["valid_loss"] and told[3]["valid_loss"] is None


def test_runs_without_a_name_looks_at_runs(place, monkeypatch):
    monkeypatch.chdir(place.parent)
    result = command("runs")
    assert result.exit_code == 0 and "runs/b" in result.output
    assert result.output.index("runs/b") < result.output.index("runs/a")


def test_runs_diff_says_what_differs(place):
    result = command("runs", "diff", place / "a", place / "b", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])["differences"]
    assert told["train.learning_rate"] == ["1e-05", "0.005"]
    same = command("runs", "diff", place / "a", place / "a")
    assert "Nothing differs" in same.output


def test_runs_draws_the_curves_of_those_named(place, tmp_path):
    page = tmp_path / "curves.html"
    result = command("runs", place / "a", place / "b", "--plot", page)
    assert result.exit_code == 0, result.output
    html = page.read_text()
    assert "<svg" in html and "2 runs" in html


def test_a_damaged_run_is_left_out_and_said(place, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "start.json").write_text("{}")
    result = command("runs", place, broken)
    assert result.exit_code == 0 and "left out" in result.output and "damaged" in result.output


@pytest.mark.parametrize(
    "words, said",
    [
        (["runs", "nowhere"], "not a directory"),
        (["runs", "diff", "a"], "two runs or more"),
    ],
)
def test_what_is_no_run_is_refused(words, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = command(*words)
    assert said in str(result.exception)
