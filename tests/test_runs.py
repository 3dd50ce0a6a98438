"""Past runs, read from their directories."""

import math

import pytest
from conftest import write_rows

from mlxlora.config import RunConfig
from mlxlora.errors import CheckpointError
from mlxlora.runs import find_runs, load_run
from mlxlora.train.directory import in_use, locked
from mlxlora.train.events import Eval, Start, Step, from_json, to_json
from mlxlora.train.loop import train


@pytest.fixture
def run(dense_path, tmp_path):
    """A run of three updates, and its events."""
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"say {n}", "completion": str(n)} for n in range(20)]
    )
    config = RunConfig.from_dict(
        {
            "model": str(dense_path),
            "out": str(tmp_path / "runs" / "one"),
            "data": {"path": str(rows)},
            "train": {"updates": 3},
        }
    )
    return tmp_path / "runs" / "one", tuple(train(config))


def test_a_run_reads_as_it_was(run):
    path, events = run
    read = load_run(path)
    assert read.events == events and read.unread == 0
    assert read.state == "finished" and read.updates == 3
    assert read.before == events[-1].valid_loss_before
    assert read.best.loss == events[-1].valid_loss


def test_a_log_that_was_cut_or_garbled_reads_as_far_as_it_goes(run):
    path, events = run
    lines = (path / "log.jsonl").read_bytes().splitlines(keepends=True)
    (path / "log.jsonl").write_bytes(b"\xff\x00\n" + b"".join(lines[:3]) + lines[3][:9])
    read = load_run(path)
    assert read.events == events[:3] and read.unread == 2
    assert read.state == "cut off" and isinstance(read.start, Start)


def test_a_run_that_goes_on_is_known_by_its_lock(run):
    path, _ = run
    assert not in_use(path)
    with locked(path):
        assert load_run(path).state == "running"


def test_someone_who_only_looks_does_not_keep_a_run_from_going_on(run):
    path, _ = run
    assert not in_use(path)
    with locked(path):
        pass


def test_runs_are_found_below_and_not_inside_each_other(run):
    path, _ = run
    (path / "checkpoints" / "start.json").write_text("{}")
    assert find_runs(path.parent.parent) == [path] == find_runs(path)
    with pytest.raises(CheckpointError, match="not a directory"):
        find_runs(path / "nothing")


def test_a_loss_that_is_no_number_comes_back_as_one():
    event = Eval(3, math.nan, math.inf, 7, False, 0.1)
    assert math.isnan(from_json(to_json(event)).loss)
    assert from_json(to_json(Step(1, 0.1, 2.0, 3, 1e-4, 1.0, 0.1, 5))) == Step(
        1, 0.1, 2.0, 3, 1e-4, 1.0, 0.1, 5
    )
