"""Adapters that clients may have loaded: those below one directory."""

import pytest
from serving import adapter_for

from mlxlora.errors import AdapterError
from mlxlora.serve.http.library import check_name, load_from


@pytest.fixture
def root(tmp_path, dense):
    inside = tmp_path / "adapters"
    adapter_for(dense, 1).save(inside / "team" / "sql")
    adapter_for(dense, 2).save(tmp_path / "secret")
    (inside / "out").symlink_to(tmp_path / "secret")
    (inside / "round").symlink_to(inside / "round")
    return inside


def test_one_below_the_root_is_loaded(root):
    assert load_from(root, "team/sql").rank == 4
    assert load_from(root, "./team/../team/sql").rank == 4


@pytest.mark.parametrize(
    "path",
    [
        *("../secret", "team/../../secret", "out", "round", "", ".", "/", "team/sql\0", "x" * 5000),
        *("~", "mlx-community/some-adapter", "nothing", "team/sql/adapters.safetensors", ".."),
    ],
)
def test_nothing_else_is(root, path):
    with pytest.raises(AdapterError):
        load_from(root, path)


def test_an_absolute_path_is_not_even_inside(root):
    with pytest.raises(AdapterError, match="no adapter"):
        load_from(root, str(root / "team" / "sql"))


@pytest.mark.parametrize("name", ["sql", "team:sql-2.1", "A" * 96])
def test_plain_names_name_adapters(name):
    check_name(name)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".x", "é", "A" * 97, "a\n"])
def test_others_do_not(name):
    with pytest.raises(AdapterError):
        check_name(name)
