"""Options that nobody should write: a config, or one ConfigError; no other end."""

import tempfile
import tomllib
from pathlib import Path

import pytest
from hostile import (
    DEEP,
    NAMES,
    damaged,
    json_text,
    mutated,
    nothing_written,
    value_or_error,
    values,
)
from hypothesis import given
from hypothesis import strategies as st

from mlxlora.config import RunConfig
from mlxlora.errors import ConfigError
from mlxlora.schema import options

KEYS = [key for key, _, _ in options(RunConfig)]
TREE = RunConfig.load(
    None,
    ["lora.rank_pattern.q_proj=4", "data.columns.prompt=question", "lora.blocks=[0]", "model=m"],
).to_dict()
TOML = RunConfig.from_dict(TREE).to_toml().encode()


def accepted(run: RunConfig) -> None:
    """What is accepted can be written and read back, equal."""
    text = run.to_toml()
    assert RunConfig.from_dict(tomllib.loads(text)) == run
    text.encode()


def load(what: str, recipe: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_bytes(recipe)
        with nothing_written(Path(folder)), value_or_error(what, ConfigError):
            accepted(RunConfig.load(path))


@given(st.binary(max_size=200))
def test_any_bytes(data):
    load("config: any bytes", data)


@given(damaged(TOML))
def test_damaged_recipes(data):
    load("config: damaged recipe", data)


@given(mutated(TREE))
def test_trees_with_something_wrong_anywhere(tree):
    with value_or_error("config: wrong anywhere", ConfigError):
        accepted(RunConfig.from_dict(tree if isinstance(tree, dict) else {"train": tree}))


@given(st.sampled_from(KEYS), values)
def test_any_value_of_any_option(key, value):
    table, _, name = key.rpartition(".")
    with value_or_error("config: any value", ConfigError):
        accepted(RunConfig.from_dict({table: {name: value}} if table else {name: value}))


@given(st.sampled_from([*KEYS, *NAMES]), st.text(max_size=30) | values.map(json_text))
def test_any_override(key, value):
    with value_or_error("config: any override", ConfigError):
        accepted(RunConfig.load(None, [f"{key}={value}"]))


@given(st.lists(st.text(max_size=30), max_size=3))
def test_overrides_that_are_any_text(overrides):
    with value_or_error("config: any text as override", ConfigError):
        accepted(RunConfig.load(None, overrides))


@pytest.mark.parametrize(
    "recipe",
    [
        *("x = " + "[" * DEEP, "x = " + "[" * DEEP + "]" * DEEP, "x = " + "{a = " * DEEP),
        *(".".join("a" * 3000) + " = 1", "[" + ".".join("a" * 3000) + "]", "x = " + "1" * 5000),
        *("[lora]\nrank = 0x" + "f" * 9000, "model = 'a\0b'", "x = 2020-13-45", "\0", "[lora"),
        *("model = '''" + "x" * 100_000, "lora.rank = 1\nlora.rank = 2", "[train]\nepochs = nan"),
        *("[train]\nwarmup = 1e999", "[lora.rank_pattern]\n'*' = 99999999999999999999"),
    ],
)
def test_recipes_that_no_tree_gives_are_refused(tmp_path, recipe):
    (tmp_path / "recipe.toml").write_text(recipe)
    with pytest.raises(ConfigError) as error:
        RunConfig.load(tmp_path / "recipe.toml")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "override",
    [
        *("lora.rank=" + "9" * 5000, "lora.rank=0x" + "f" * 9000, "lora.alpha=" + "9" * 400),
        *("lora.rank_pattern." + ".".join("a" * DEEP) + "=1", "train.epochs=" + "[" * DEEP),
        *("lora.rank=1\nmodel='x'", "lora.rank=1_000_000", "train.batch_size=1e3", "model=\ud800"),
        *("x" * 100_000, "=", "lora..rank=1", ".=1", "train.seed=99999999999999999999"),
    ],
)
def test_overrides_that_no_tree_gives_are_refused(override):
    with pytest.raises(ConfigError) as error:
        RunConfig.load(None, [override])
    assert len(str(error.value)) < 1000


def test_a_recipe_that_is_no_file_is_refused_and_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("pipe", "loop", "none", "x" * 5000, "", "a\0b"):
        with pytest.raises(ConfigError, match="cannot read"):
            RunConfig.load(tmp_path / place)
    with pytest.raises(ConfigError, match="cannot read"):
        RunConfig.load("/dev/zero")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "recipe.toml").write_bytes(b"\xef\xbb\xbf[lora]\r\nrank = 3\r\n")
    assert RunConfig.load(tmp_path / "recipe.toml").lora.rank == 3
