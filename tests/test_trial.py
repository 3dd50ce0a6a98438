import json
import shutil

import pytest
from conftest import write_rows

from mlxlora.config import DataConfig, RunConfig
from mlxlora.errors import DataError
from mlxlora.export.trial import trial
from mlxlora.lora.adapter import Adapter
from mlxlora.train.loop import train


@pytest.fixture
def trained(dense, rows, tmp_path):
    """The adapter of a run, in its place."""
    places = {"model": str(dense.path), "out": str(tmp_path / "run"), "data": {"path": str(rows)}}
    for _ in train(RunConfig.from_dict({**places, "train": {"updates": 2}}), dense):
        pass
    return Adapter.load(tmp_path / "run" / "adapter")


def test_the_runs_own_validation_rows_are_found(dense, trained):
    found = trial(dense.tokenizer, trained)
    assert found.own and found.rows == 8
    assert found.source == "8 rows kept for validation by the adapter's run"
    assert trial(dense.tokenizer, trained, part="train").rows == 40


def test_only_what_is_supervised_is_compared(dense, trained):
    batch = trial(dense.tokenizer, trained).batch
    answers = [dense.tokenizer.decode([int(t)]) for t in batch.targets]
    assert "user" not in "".join(answers)
    assert batch.tokens == len(batch.targets) > 8


def test_rows_that_changed_are_not_the_runs(dense, trained, rows):
    with (rows / "valid.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x", "completion": "y"}) + "\n")
    found = trial(dense.tokenizer, trained)
    assert not found.own and "bundled text" in found.source


def test_an_adapter_elsewhere_is_tried_on_the_bundled_text(dense, trained, tmp_path):
    shutil.copytree(trained.home, tmp_path / "elsewhere")
    found = trial(dense.tokenizer, Adapter.load(tmp_path / "elsewhere"))
    assert not found.own
    assert found.batch.inputs.size <= 8192


def test_named_rows_come_first_and_faults_are_told(dense, trained, tmp_path):
    rows = write_rows(tmp_path / "my.jsonl", [{"text": "some words"}] * 3)
    found = trial(dense.tokenizer, trained, DataConfig(path=str(rows)))
    assert found.own and found.source == "3 rows of my.jsonl"
    with pytest.raises(DataError, match="no data at"):
        trial(dense.tokenizer, trained, DataConfig(path=str(tmp_path / "none.jsonl")))
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "a" * 99, "completion": "b"}])
    with pytest.raises(DataError, match=r"no row of long\.jsonl has a token"):
        trial(dense.tokenizer, trained, DataConfig(path=str(long), max_length=20))


def test_rows_are_spread_and_bounded(dense, tmp_path):
    rows = write_rows(tmp_path / "my.jsonl", [{"text": f"{n} " * 30} for n in range(100)])
    found = trial(dense.tokenizer, data=DataConfig(path=str(rows)), tokens=1000)
    assert found.batch.inputs.size <= 1000 and 5 < found.rows < 100
    first = {int(dense.tokenizer.decode(row[:2].tolist())) for row in found.batch.inputs}
    assert max(first) > 50
