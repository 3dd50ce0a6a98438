"""The bundled base and data, the recipe that made them, and the whole story (slow)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlxlora.quickstart.story as story
from mlxlora.base import load
from mlxlora.cli import app
from mlxlora.config import RunConfig

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny-base"


def conversations(part: str) -> list[list[dict]]:
    lines = (story.DATA / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's modules, importable by their own names."""
    monkeypatch.syspath_prepend(str(RECIPE))


def test_the_bundle_is_small():
    base = sum(file.stat().st_size for file in story.BASE.iterdir())
    data = sum(file.stat().st_size for file in story.DATA.iterdir())
    assert base <= 5_000_000 and data <= 400_000


def test_the_bundled_base_is_a_4_bit_model_with_a_chat_template():
    base = load(story.BASE)
    assert base.config["quantization"]["bits"] == 4
    assert base.tokenizer.has_chat_template
    assert base.parameters > 2_000_000


def test_no_request_of_the_test_set_was_trained_and_each_has_a_new_value():
    trained = conversations("train") + conversations("valid")
    requests = {messages[0]["content"] for messages in trained}
    train = conversations("train")
    values = {v for messages in train for v in json.loads(messages[1]["content"]).values()}
    test = conversations("test")
    assert len(test) >= 100
    for request, command in test:
        assert request["content"] not in requests
        assert not set(json.loads(command["content"]).values()) <= values


def test_the_recipe_writes_the_bundled_data_again(recipe, tmp_path):
    import make
    import task

    task.write(tmp_path, make.TASK_SEED)
    for file in story.DATA.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_the_language_of_the_base_has_no_command(recipe):
    import language

    rows = list(language.rows(seed=11, count=3000))
    assert rows == list(language.rows(seed=11, count=3000))
    text = json.dumps(rows)
    assert "JSON" in text and '\\"action\\"' not in text


def test_the_recipe_makes_a_model_that_trains(recipe, tmp_path):
    import make

    make.make(tmp_path, 300)
    base = load(tmp_path / "init")
    assert base.tokenizer.has_chat_template
    for name in ("copying", "corpus"):
        run = RunConfig.load(RECIPE / f"{name}.toml", ["train.updates=1"])
        assert run.lora.method == "full"
        assert (tmp_path / name / "train.jsonl").exists()


def test_an_existing_directory_is_refused(tmp_path):
    from typer.testing import CliRunner

    (tmp_path / "mine").write_text("mine")
    result = CliRunner().invoke(app, ["quickstart", "--dir", str(tmp_path)])
    assert "exists already" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_whole_story_keeps_its_promise(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mlxlora.cli", "quickstart", "--dir", "out", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    exact = {each["name"]: each["exact_match"] for each in result["results"]}
    assert all(each["rows"] >= 100 for each in result["results"])
    assert exact["base"] <= 0.05
    assert exact["tuned"] >= 0.80
    assert exact["fused"] >= 0.75
    assert {"run", "fused"} <= {path.name for path in (tmp_path / "out").iterdir()}
