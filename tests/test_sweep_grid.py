"""Grids: every combination once, and every fault told before anything is loaded."""

import pytest

from mlxlora.errors import ConfigError
from mlxlora.sweep.grid import read_grid, variants


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lora.rank=8,16", [8, 16]),
        ("train.learning_rate=1e-4, 2e-4", [1e-4, 2e-4]),
        ("lora.method=lora,dora", ["lora", "dora"]),
        ('lora.targets=["q_proj"],["q_proj","v_proj"]', [["q_proj"], ["q_proj", "v_proj"]]),
        ("train.tokens_per_microbatch=auto,512", ["auto", 512]),
        ("lora.rank=8", [8]),
    ],
)
def test_values_stand_between_commas(text, values):
    (found,) = read_grid([text]).values()
    assert found == values


def test_every_fault_of_a_grid_is_told_at_once():
    texts = ["lora.rnak=8,16", "lora.rank", "lora.alpha=8,8", "data.mask=all,completion"]
    with pytest.raises(ConfigError) as error:
        read_grid([*texts, "model=a,b", "train.seed=1,2", "lora.dropout=0,0.1"])
    said = str(error.value)
    for words in (
        "unknown option lora.rnak (did you mean lora.rank?)",
        "lora.rank: write it as key=value,value",
        "lora.alpha=8,8: a value is there twice",
        "data.mask cannot vary in a sweep: losses over different tokens",
        "model cannot vary in a sweep",
        "train.seed cannot vary in a sweep",
    ):
        assert words in said
    assert "lora.dropout" not in said
    with pytest.raises(ConfigError, match="give what to try"):
        read_grid([])
    with pytest.raises(ConfigError, match="given twice"):
        read_grid(["lora.rank=1", "lora.rank=2"])


def test_all_combinations_are_made_and_named(tmp_path):
    grid = {"lora.rank": [8, 16], "train.learning_rate": [1e-4, 3.0], "lora.method": ["lora"]}
    found = variants(None, ["train.seed=5"], grid, tmp_path)
    assert [one.name for one in found] == [
        "rank-8,learning_rate-0.0001,method-lora",
        "rank-8,learning_rate-3,method-lora",
        "rank-16,learning_rate-0.0001,method-lora",
        "rank-16,learning_rate-3,method-lora",
    ]
    assert found[2].overrides == (
        "lora.rank=16",
        "train.learning_rate=0.0001",
        'lora.method="lora"',
    )
    assert (found[2].run.lora.rank, found[2].run.train.learning_rate) == (16, 1e-4)
    assert {one.run.train.seed for one in found} == {5}
    assert found[0].run.out == str(tmp_path / found[0].name)


def test_values_that_make_no_names_are_numbered(tmp_path):
    many = {"lora.targets": [["*q_proj"], ["?q_proj"]]}
    assert [v.name for v in variants(None, [], many, tmp_path)] == ["variant-1", "variant-2"]
    long = {"lora.targets": [["q_proj"] * 20, ["v_proj"]]}
    assert [v.name for v in variants(None, [], long, tmp_path)] == ["variant-1", "variant-2"]


def test_faulty_combinations_are_all_named(tmp_path):
    grid = {"lora.rank": [8, 0, -1], "train.epochs": [1.0, 2.0]}
    with pytest.raises(ConfigError) as error:
        variants(None, [], grid, tmp_path)
    said = str(error.value)
    assert "4 variants cannot be run" in said
    for rank in (0, -1):
        assert f"lora.rank={rank} train.epochs=1.0" in said
        assert f"lora.rank must be at least 1 and at most 65,536, not {rank}" in said
    assert "lora.rank=8" not in said


def test_what_is_wrong_with_all_is_said_once(tmp_path):
    with pytest.raises(ConfigError, match=r"^unknown option lora\.rnak"):
        variants(None, ["lora.rnak=3"], {"lora.alpha": [8.0, 16.0]}, tmp_path)


def test_a_grid_without_measure_is_refused(tmp_path):
    grid = {"lora.rank": list(range(1, 41)), "lora.alpha": list(range(1, 41))}
    with pytest.raises(ConfigError, match="1,600 combinations"):
        variants(None, [], grid, tmp_path)
