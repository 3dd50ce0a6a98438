import json

import pytest
from typer.testing import CliRunner

from mlxlora.cli import app
from mlxlora.errors import MlxLoraError


def plan(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def result(*words) -> dict:
    done = plan(*words, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_small_model_fits(dense_path, rows):
    found = result("--model", dense_path, "--data", rows, "--epochs", 1)
    assert found["fits"] and found["changes"] == []
    parts = {**found["parts"]}
    assert parts.pop("cache") > 0 and sum(parts.values()) == found["peak"] < found["budget"]
    assert found["updates"] == 5
    assert found["seconds"] == pytest.approx(5 * found["seconds_per_update"])
    assert found["tokens_per_microbatch"] > 0 and found["packed"]
    assert not found["checkpoint_blocks"]


def test_what_does_not_fit_is_a_result_with_changes(dense_path, rows):
    options = ["--model", dense_path, "--data", rows, "--memory", "34MB"]
    found = result(*options)
    assert not found["fits"] and found["budget"] == 34_000_000
    assert found["checkpoint_blocks"]  # tried by itself
    suffice = [change["fits"] for change in found["changes"]]
    assert suffice == sorted(suffice, reverse=True)
    assert all(change["saves"] > 0 and change["option"] for change in found["changes"])
    shown = plan(*options)
    assert shown.exit_code == 0 and "It does not fit" in shown.output
    assert "--rank" in shown.output


def test_without_rows_the_longest_are_assumed(dense_path):
    found = result("--model", dense_path, "--max-length", 100)
    assert "data.max_length = 100" in found["notes"][0]
    assert found["seconds"] is None and found["seconds_per_update"] > 0


def test_options_that_the_user_fixed_are_what_is_changed(dense_path):
    options = ["--model", dense_path, "--max-length", 64, "--memory", "40MB"]
    fixed = ["--set", "train.checkpoint_blocks=false", "--set", "train.tokens_per_microbatch=512"]
    found = {change["option"] for change in result(*options, *fixed)["changes"]}
    assert "--set train.tokens_per_microbatch=64" in found
    assert "--set train.checkpoint_blocks=true" in found


def test_every_weight_trained_suggests_an_adapter(dense_path):
    found = result("--model", dense_path, "--method", "full", "--memory", "34MB")
    assert "--method lora" in {change["option"] for change in found["changes"]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--memory", "plenty"], "write a size such as 16GB"),
        (["--set", "lora.rnak=3"], "lora.rank"),
        (["--data", "nowhere.jsonl"], "no data at nowhere.jsonl"),
    ],
)
def test_wrong_input_is_one_message(dense_path, words, says):
    done = plan("--model", dense_path, *words)
    assert isinstance(done.exception, MlxLoraError) and says in str(done.exception)


def test_a_model_is_wanted():
    assert "--model" in str(plan().exception)
