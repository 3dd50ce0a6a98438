"""Sweeps: the winner is what training it alone gives, however often the sweep was interrupted."""

import io
import json
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_rows
from rich.console import Console
from typer.testing import CliRunner

from mlxlora.base import load
from mlxlora.cli import app
from mlxlora.config import RunConfig
from mlxlora.console import Screen
from mlxlora.errors import CheckpointError, ConfigError, ExportError, TrainError
from mlxlora.leaderboard import Leaderboard
from mlxlora.sweep.board import SWEEP, read
from mlxlora.sweep.grid import read_grid, variants
from mlxlora.sweep.halving import rungs
from mlxlora.sweep.loop import Plan, sweep
from mlxlora.train.events import Step
from mlxlora.train.loop import train

RATES = "train.learning_rate=1e-3,3e-2,1e-2"


def made(model: Path, data: Path, out: Path, *grid: str, **options) -> Plan:
    given = [f"model={model}", f"data.path={data}", f"out={out}", "lora.dropout=0.1"]
    given += ["train.updates=8", "train.tokens_per_microbatch=64", *options.pop("given", [])]
    values = read_grid(grid or ["lora.rank=2,4", RATES])
    found = variants(None, given, values, out)
    keep = options.get("keep", 0.5)
    shares = rungs(len(found), keep, options.get("rungs"))
    return Plan(out, "", RunConfig.load(None, given), values, found, keep, shares)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sweep-rows")
    words = ["apple", "bread", "cloud", "drum"]
    pairs = [{"prompt": f"{words[n % 4]} {n}", "completion": words[n % 4][0]} for n in range(24)]
    write_rows(directory / "train.jsonl", pairs)
    write_rows(directory / "valid.jsonl", pairs[:4])
    return directory


@pytest.fixture(scope="module")
def done(dense_path, data, tmp_path_factory):
    """(the plan of a whole sweep, its news)."""
    plan = made(dense_path, data, tmp_path_factory.mktemp("sweep") / "s")
    return plan, list(sweep(plan, load(dense_path)))


def test_a_winner_is_byte_for_byte_what_training_it_alone_gives(done, dense_path, tmp_path):
    plan, news = done
    best = news[-1].board.best
    (variant,) = [one for one in plan.variants if one.name == best.name]
    alone = RunConfig.from_dict({**variant.run.to_dict(), "out": str(tmp_path / "alone")})
    list(train(alone, load(dense_path)))
    swept = files(plan.directory / best.name / "adapter")
    assert swept == files(tmp_path / "alone" / "adapter")
    assert swept["adapters.safetensors"]


def test_at_each_rung_the_worse_half_is_dropped(done):
    plan, news = done
    assert plan.rungs == (0.25, 0.5)
    decided = [one for one in news if one.rung]
    assert [(one.rung, len(one.dropped)) for one in decided] == [(1, 3), (2, 1)]
    board = news[-1].board
    assert board.over and board == read(plan.directory)
    for rung, at in ((1, 2), (2, 4)):
        standings = [one for one in board.variants if one.rung >= rung]
        losses = {one.name: best_until(plan.directory / one.name, at) for one in standings}
        dropped = {one.name for one in standings if (one.state, one.rung) == ("dropped", rung)}
        left = set(losses) - dropped
        assert max(losses[name] for name in left) <= min(losses[name] for name in dropped)
    finished = [one for one in board.variants if one.state == "finished"]
    assert board.best.loss == min(one.loss for one in finished)
    assert all(one.updates == one.of == 8 for one in finished)
    assert all(one.updates < 8 for one in board.variants if one.state == "dropped")


def best_until(directory: Path, update: int) -> float:
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    evals = [e for e in lines if e["event"] == "eval" and 0 < e["update"] <= update]
    return min(e["loss"] for e in evals)


def test_a_sweep_that_is_cut_off_again_and_again_ends_the_same(done, dense_path, data, tmp_path):
    whole, news = done
    plan = made(dense_path, data, tmp_path / "s")
    base, ended, times = load(dense_path), None, 0
    while ended is None and times < 100:
        times += 1
        going = sweep(plan, base)
        for count, one in enumerate(going):
            if one.end:
                ended = one
            elif count > 9 + 4 * times:  # later each time, or it would not get on
                going.close()
                break
    assert times > 3
    for one, other in zip(ended.board.variants, news[-1].board.variants, strict=True):
        # One more update was made at a rung, or not: that of the others is not undone either.
        assert replace(one, updates=0) == replace(other, updates=0)
    best = ended.board.best.name
    assert files(plan.directory / best / "adapter") == files(whole.directory / best / "adapter")


def test_a_stop_ends_it_after_the_update_and_the_same_plan_goes_on(dense_path, data, tmp_path):
    plan, stop = made(dense_path, data, tmp_path / "s", "lora.rank=2,3,4"), threading.Event()
    first = []
    for one in sweep(plan, load(dense_path), stop=stop):
        first.append(one)
        if one.name == plan.variants[1].name and isinstance(one.event, Step):
            stop.set()
    assert first[-1].end == "interrupted"
    assert [one.state for one in read(plan.directory).variants] == ["running", "running", "waiting"]
    second = list(sweep(plan, load(dense_path)))
    again = [one for one in second if isinstance(one.event, Step)]
    assert (again[0].name, again[0].event.update) == (plan.variants[1].name, 2)
    assert second[-1].end == "finished"
    assert len(list(sweep(plan))) == 1  # it is over, so nothing is loaded


def test_without_halving_all_are_trained_to_the_end(dense_path, data, tmp_path):
    grid = ["lora.rank=2,4"]
    plan = made(dense_path, data, tmp_path / "s", *grid, rungs=0, given=["train.updates=3"])
    *_, end = sweep(plan, load(dense_path))
    assert [one.state for one in end.board.variants] == ["finished", "finished"]
    assert [one.updates for one in end.board.variants] == [3, 3]


def test_a_variant_that_fails_is_recorded_and_the_others_go_on(dense_path, data, tmp_path):
    plan = made(dense_path, data, tmp_path / "s", "train.learning_rate=1e-2,1e38", given=OVER)
    *_, end = sweep(plan, load(dense_path))
    good, failed = end.board.variants
    assert (good.state, failed.state) == ("finished", "failed")
    assert "the loss is" in failed.reason
    assert end.board.best == good
    assert read(plan.directory).variants[1].reason == failed.reason


OVER = ["train.optimizer=sgd", "train.clip=0.0"]


def test_if_all_fail_each_reason_is_told(dense_path, data, tmp_path):
    plan = made(dense_path, data, tmp_path / "s", "train.learning_rate=1e37,1e38", given=OVER)
    with pytest.raises(TrainError, match=r"(?s)every variant failed:.*e\+37.*e\+38"):
        list(sweep(plan, load(dense_path)))


def test_a_changed_recipe_or_grid_is_refused_with_what_changed(done, dense_path, data):
    plan, _ = done
    grid = ["lora.rank=2,4", "train.learning_rate=1e-3,3e-2"]
    other = made(
        dense_path, data, plan.directory, *grid, keep=0.25, given=["train.weight_decay=0.1"]
    )
    with pytest.raises(CheckpointError) as error:
        next(sweep(other))
    for words in (
        "train.weight_decay: 0.0 then, 0.1 now",
        "--grid train.learning_rate: [0.001, 0.03, 0.01] then, [0.001, 0.03] now",
        "--keep: 0.5 then, 0.25 now",
    ):
        assert words in str(error.value)


def test_what_cannot_be_swept_is_refused_before_anything_is_written(dense_path, data, tmp_path):
    out = tmp_path / "s"
    alone = write_rows(tmp_path / "alone.jsonl", [{"prompt": "a", "completion": "b"}] * 20)
    grid = ["lora.rank=2,4"]
    unmeasured = made(dense_path, alone, out, *grid, given=["data.valid_fraction=0.0"])
    with pytest.raises(ConfigError, match="no validation rows"):
        next(sweep(unmeasured))
    late = made(dense_path, data, out, *grid, given=["eval.every=9"])
    with pytest.raises(ConfigError, match=r"eval\.every = 9 of 8 updates"):
        next(sweep(late))
    nowhere = made(dense_path, data, out, 'lora.targets=["q_proj"],["nothing"]')
    with pytest.raises(ConfigError, match=r"(?s)1 variant cannot be run:.*nothing"):
        next(sweep(nowhere))
    assert not out.exists()
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ExportError, match="never overwritten"):
        next(sweep(made(dense_path, data, out, *grid)))


def test_the_verb_names_the_best_and_its_commands(dense_path, data, tmp_path):
    words = ["sweep", "--grid", "lora.rank=2,4", "--model", str(dense_path), "--data", str(data)]
    words += ["--updates", "2", "--out", str(tmp_path / "s")]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, (ran.output, ran.exception)
    best = read(tmp_path / "s").best.name
    for part in (f"best: {best}", "mlxlora chat", "mlxlora fuse", "rung 1, after 50 % of a run"):
        assert part in ran.output
    again = CliRunner().invoke(app, [*words, "--json"])
    told = json.loads(again.stdout.splitlines()[-1])
    assert told["best"] == best and told["end"] == "finished"
    assert Path(told["adapter"]) == tmp_path / "s" / best / "adapter"
    saved = json.loads((tmp_path / "s" / SWEEP).read_text())
    assert {key: told[key] for key in saved} == saved
    twice = CliRunner().invoke(app, [*words, "--rank", "2"])
    assert isinstance(twice.exception, ConfigError)
    assert "given alone and in --grid" in str(twice.exception)


@pytest.mark.parametrize("width", [80, 140])
def test_the_leaderboard_fits_the_terminal(done, width):
    _, news = done
    screen = Screen()
    out = io.StringIO()
    screen._console = Console(file=out, force_terminal=True, width=width, height=12)
    board = Leaderboard(screen)
    assert board.show(iter(news)) is news[-1]
    board.table(news[-1].board)
    lines = out.getvalue().splitlines()
    assert any("training" in line for line in lines)
    last = [line for line in lines if "finished" in line or "dropped" in line][-6:]
    assert len(last) == 6 and news[-1].board.best.name in last[0]


@pytest.mark.slow
def test_ctrl_c_tells_the_command_and_the_same_one_goes_on(dense_path, data, tmp_path):
    words = ["sweep", "--grid", "lora.rank=2,4", "--model", str(dense_path), "--data", str(data)]
    words += ["--updates", "40", "--out", str(tmp_path / "s")]
    program = [sys.executable, "-P", "-m", "mlxlora.cli", *words]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as going:
        for line in going.stdout:
            if "validation loss" in line:  # of the first variant
                going.send_signal(signal.SIGINT)
                break
        said = going.stdout.read()
    assert going.returncode == 3
    assert "mlxlora sweep --grid lora.rank=2,4" in said
    again = subprocess.run(program, stdout=subprocess.PIPE, text=True, timeout=120)
    assert again.returncode == 0
    assert "best: rank-" in again.stdout
