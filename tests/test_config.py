import tomllib

import pytest

from mlxlora.config import RunConfig
from mlxlora.errors import ConfigError
from mlxlora.schema import options


def test_defaults_are_those_of_the_readme():
    run = RunConfig()
    assert (run.lora.rank, run.lora.alpha, run.train.batch_size, run.train.epochs) == (16, 32, 8, 2)
    assert run.lora.targets == ("all-linear",)


def test_overrides_win_over_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[lora]\nrank = 4\nalpha = 8\n")
    run = RunConfig.load(recipe, ["lora.rank=32", "model=a/b"])
    assert (run.lora.rank, run.lora.alpha, run.model) == (32, 8.0, "a/b")


def test_toml_round_trip_is_equal():
    run = RunConfig.load(
        None,
        [
            "lora.targets=['q_proj', '*.mlp.*']",
            "lora.blocks=[1, 2]",
            "lora.rank_pattern={'*.mlp.*' = 4}",
            "data.columns.prompt=question",
            'eval.prompts=["say \\"hi\\" 🙂"]',
            "train.tokens_per_microbatch=512",
        ],
    )
    assert RunConfig.from_dict(tomllib.loads(run.to_toml())) == run


def test_all_faults_are_listed_at_once_with_the_nearest_name():
    with pytest.raises(ConfigError) as error:
        RunConfig.load(None, ["lora.rnk=3", "train.epochs=-1", "lora.dropout=hi", "rank=3"])
    text = str(error.value)
    assert "4 faults" in text
    assert "lora.rnk (did you mean lora.rank?)" in text
    assert "train.epochs must be above 0, not -1.0" in text
    assert "lora.dropout must be a number, not 'hi'" in text
    assert "unknown option rank (did you mean lora.rank?)" in text


@pytest.mark.parametrize(
    "override",
    [
        "lora.rank=0",
        "lora.rank=true",
        "lora.rank=2.5",
        "train.optimizer=adamx",
        "lora.dropout=1.0",
        "train.learning_rate=nan",
        "lora=3",
        "data.mask=[]",
        "train.tokens_per_microbatch=0",
        "lora.rank",
        "lora.rank.deep=3",
    ],
)
def test_impossible_values_are_refused(override):
    with pytest.raises(ConfigError):
        RunConfig.load(None, [override])


def test_recipe_that_is_not_toml_is_named(tmp_path):
    recipe = tmp_path / "bad.toml"
    recipe.write_text("[lora\nrank=1")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        RunConfig.load(recipe)
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml: No such file"):
        RunConfig.load(tmp_path / "none.toml")


def test_every_option_has_help():
    assert all(field.metadata["help"] for _, _, field in options(RunConfig))


@pytest.mark.parametrize(
    "override, says",
    [
        ("data.columns.promt=question", "among messages, conversations, prompt"),
        ("lora.targets=[]", "at least one name"),
        ("lora.rank_pattern.q_proj=0", "ranks of at least 1"),
        ("lora.alpha_pattern.q_proj=-1", "numbers above 0"),
        ("train.seed=-1", "0 or more"),
    ],
)
def test_impossible_values_are_refused_with_what_is_possible(override, says):
    with pytest.raises(ConfigError, match=says):
        RunConfig.load(None, [override])
