"""Trackers: what they were told, read back by their own programs."""

import subprocess
import sys
from pathlib import Path
from threading import Event as Flag

import pytest
from conftest import write_rows

from mlxlora.config import RunConfig
from mlxlora.errors import ConfigError
from mlxlora.track import follow
from mlxlora.track.figures import figures, settings
from mlxlora.track.follow import check, tracked
from mlxlora.train.events import Done, Eval, Sample, Step
from mlxlora.train.loop import resume, train

UPDATES = 4


@pytest.fixture
def config(dense_path, tmp_path) -> RunConfig:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"say {n}", "completion": str(n)} for n in range(20)]
    )
    return RunConfig.from_dict(
        {
            "model": str(dense_path),
            "out": str(tmp_path / "runs" / "one"),
            "data": {"path": str(rows)},
            "train": {"updates": UPDATES},
            "eval": {"prompts": ["say <b>3"], "max_tokens": 3},
        }
    )


def told(config: RunConfig, *names: str) -> tuple[list, list[str]]:
    """The events of a tracked run that is interrupted and resumed, and what was said."""
    said: list[str] = []
    stop = Flag()
    events = []
    for event in tracked(train(config, stop=stop), config.out, names, said.append):
        events.append(event)
        if isinstance(event, Step) and event.update == 2:
            stop.set()
    return [*events, *tracked(resume(config.out), config.out, names, said.append)], said


def test_tensorboard_reads_each_update_once_over_a_resume(config):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError
    )
    events, said = told(config, "tensorboard")
    read = accumulator.EventAccumulator(str(Path(config.out) / "tensorboard"))
    read.Reload()
    steps = [event for event in events if isinstance(event, Step)]
    found = read.Scalars("train/loss")
    assert [scalar.step for scalar in found] == [1, 2, 3, 4]
    assert [scalar.value for scalar in found] == pytest.approx([s.loss for s in steps])
    assert [scalar.step for scalar in read.Scalars("valid/loss")] == [
        event.update for event in events if isinstance(event, Eval)
    ]
    assert f"tensorboard --logdir {Path(config.out).parent}" in said[0]
    assert any("say <b>3" in tag for tag in read.Tags()["tensors"])


def test_wandb_is_told_offline(config, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    events, said = told(config, "wandb")
    assert isinstance(events[-1], Done) and events[-1].reason == "finished"
    assert len(said) == 2 and all("no longer" not in words for words in said)
    kept = list((Path(config.out) / "wandb").glob("offline-run-*/run-*.wandb"))
    assert kept
    records = b"".join(path.read_bytes() for path in kept)
    assert b"train/loss" in records and b"lora.rank" in records


def test_mlflow_keeps_one_run_with_every_figure(config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    events, _ = told(config, "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("mlxlora")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    steps = [event for event in events if isinstance(event, Step)]
    assert [m.step for m in history] == [s.update for s in steps]
    assert [m.value for m in history] == pytest.approx([s.loss for s in steps])
    assert run.data.params["lora.rank"] == "16" and run.info.status == "FINISHED"


class Failing:
    """A tracker whose server is gone after the first figure."""

    where = "nowhere"
    closed: list[str]

    def __init__(self, *args: object) -> None:
        self.count = 0

    def figures(self, update: int, values: dict[str, float]) -> None:
        self.count += 1
        if self.count > 1:
            raise OSError("no route to host")

    def text(self, update: int, name: str, text: str) -> None:
        pass

    def close(self, reason: str) -> None:
        raise AssertionError("it was let go of")


def test_a_tracker_that_fails_is_let_go_of_and_said_once(config, monkeypatch):
    monkeypatch.setattr(follow, "_opener", lambda name: Failing)
    said: list[str] = []
    events = list(tracked(train(config), config.out, ["wandb"], said.append))
    assert isinstance(events[-1], Done)
    assert [words for words in said if "no longer told" in words] == [
        "wandb is no longer told of this run (OSError: no route to host); training goes on"
    ]


def test_trackers_are_told_how_a_run_ended(config, monkeypatch):
    ends = []

    class Told(Failing):
        def figures(self, update: int, values: dict[str, float]) -> None:
            pass

        def close(self, reason: str) -> None:
            ends.append(reason)

    monkeypatch.setattr(follow, "_opener", lambda name: Told)
    events = tracked(train(config), config.out, ["wandb"])
    while not isinstance(next(events), Step):
        pass
    events.close()
    list(tracked(resume(config.out), config.out, ["wandb"]))
    assert ends == ["interrupted", "finished"]


def test_without_trackers_events_pass_unchanged(config):
    events = list(train(config))
    assert list(tracked(iter(events), config.out, [])) == events
    assert any(isinstance(event, Sample) for event in events)


def test_an_unknown_or_missing_tracker_is_refused_before_training(monkeypatch):
    with pytest.raises(ConfigError, match="choose from tensorboard, wandb, mlflow"):
        check(["tensorbord"])
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.delitem(sys.modules, "mlxlora.track.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'mlxlora\[tensorboard\]'"):
        check(["tensorboard"])


def test_wandb_without_a_login_is_refused_before_training(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    code = "from mlxlora.track.follow import check; check(['wandb'])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert "Run wandb login, or set WANDB_MODE=offline" in found.stderr


def test_figures_that_are_no_numbers_are_left_out():
    step = Step(1, 0.1, float("nan"), 0, 1e-4, 2.0, 0.5, 7)
    assert "train/loss" not in figures(step) and figures(step)["train/gradient_norm"] == 2.0


def test_options_have_their_whole_names(config):
    assert settings(config)["train.updates"] == UPDATES and settings(config)["lora.rank"] == 16
