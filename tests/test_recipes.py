"""Every recipe: what its header says, and that it loads, plans and trains."""

import re
import shlex
import sys

import pytest
from conftest import write_rows
from documents import ROOT, section
from typer.main import get_command
from typer.testing import CliRunner

from mlxlora.cli import app
from mlxlora.config import RunConfig
from mlxlora.train.forecast import forecast, gigabytes

sys.path.insert(0, str(ROOT / "recipes"))
import predict

RECIPES = {path.stem: path for path in predict.RECIPES}
each = pytest.mark.parametrize("name", RECIPES)


def head(name: str) -> list[str]:
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    return [line for line in lines[: lines.index("")] if line.startswith("#")]


def command(name: str) -> str:
    (line,) = [line for line in head(name) if "mlxlora train" in line]
    return line.lstrip("# ")


def test_there_are_the_twelve():
    assert len(RECIPES) == 12


@each
def test_a_recipe_is_short_and_its_header_says_what_it_is_for(name):
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 110
    assert lines[0].startswith("# ") and lines[0].endswith(".")


@each
def test_its_command_parses_and_names_the_recipe(name):
    words = shlex.split(command(name))
    assert words[:3] == ["mlxlora", "train", f"recipes/{name}.toml"]
    train = get_command(app).commands["train"]
    given = train.make_context("train", words[2:]).params
    assert given["data"].endswith(".jsonl") and given["out"].startswith("runs/")


@each
def test_its_memory_is_what_is_counted_and_what_the_mac_has(name):
    said, budget = predict.header(RECIPES[name])
    run = RunConfig.load(RECIPES[name])
    needed, again = predict.count(run, predict.SHAPES[run.model], budget)
    assert needed <= budget and said == gigabytes(needed)
    assert again or run.train.checkpoint_blocks is not True
    assert f"all their {run.data.max_length:,} tokens" in " ".join(head(name))


@each
def test_it_plans_on_a_narrow_model_of_its_kind(name):
    run = RunConfig.load(RECIPES[name], ["data.max_length=128"])
    with predict.planned(run, predict.small(predict.SHAPES[run.model])) as here:
        found = forecast(here, 2 * 10**9)
    assert found.fits and found.longest == 128 and found.adapter > 0
    wished = run.train.checkpoint_blocks
    assert wished == "auto" or found.checkpoint_blocks is wished


@each
def test_it_trains(name, quantized_path, experts_path, tmp_path):
    pairs = [{"prompt": f"say {n}", "completion": str(n)} for n in range(120)]
    if name == "continued-pretraining":
        pairs = [{"text": f"one two {n}"} for n in range(400)]  # of which a 50th validates
    data = write_rows(tmp_path / "rows.jsonl", pairs)
    model = experts_path if name == "mixture-of-experts" else quantized_path
    words = ["train", str(RECIPES[name]), "--model", str(model), "--data", str(data)]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run"), "--updates", "2"])
    assert done.exit_code == 0, (done.output, done.exception)


def test_the_list_of_recipes_is_their_headers():
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert section(page, "recipes") == predict.table()


def test_every_shape_is_of_a_recipe_and_every_id_looks_like_one():
    models = {RunConfig.load(path).model for path in RECIPES.values()}
    assert models == set(predict.SHAPES)
    assert all(re.fullmatch(r"mlx-community/[\w.-]+-4bit", model) for model in models)
