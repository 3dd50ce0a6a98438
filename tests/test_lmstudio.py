import json

import pytest

from mlxlora.errors import ConfigError, ExportError
from mlxlora.export import shards
from mlxlora.export.lmstudio import install, models_folder
from mlxlora.verbs.install import check
from mlxlora.verbs.install import install as copy


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_the_models_folder_is_found_as_lm_studio_finds_it(home, tmp_path):
    assert models_folder() == home / ".lmstudio" / "models"
    (home / ".cache" / "lm-studio").mkdir(parents=True)
    assert models_folder() == home / ".cache" / "lm-studio" / "models"
    (home / ".lmstudio-home-pointer").write_text(f"{tmp_path}/elsewhere\n")
    assert models_folder() == tmp_path / "elsewhere" / "models"
    (tmp_path / "elsewhere").mkdir()
    settings = tmp_path / "elsewhere" / "settings.json"
    settings.write_text(json.dumps({"downloadsFolder": "/large/models"}))
    assert str(models_folder()) == "/large/models"
    settings.write_text(json.dumps({"downloadsFolder": None}))
    assert models_folder() == tmp_path / "elsewhere" / "models"


def test_a_model_is_copied_there_whole_two_levels_down(home, dense_path, tmp_path):
    there = install(dense_path)
    assert there == home / ".lmstudio" / "models" / "mlxlora" / dense_path.name
    for file in dense_path.iterdir():
        assert (there / file.name).read_bytes() == file.read_bytes()
    (tmp_path / "tuned.Q8_0.gguf").write_bytes(b"GGUF")
    there = install(tmp_path / "tuned.Q8_0.gguf")
    assert there.name == "tuned.Q8_0" and (there / "tuned.Q8_0.gguf").read_bytes() == b"GGUF"


def test_what_is_there_stays_and_a_full_disk_is_told(home, dense_path, monkeypatch):
    install(dense_path)
    with pytest.raises(ExportError, match="never overwritten"):
        install(dense_path)
    usage = shards.shutil.disk_usage("/")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(ExportError, match="the disk has"):
        install(dense_path.parent / "dense" / "model.safetensors")
    with pytest.raises(ExportError, match="never overwritten"):
        check("lmstudio", dense_path)
    with pytest.raises(ConfigError, match="'jan' is not known"):
        check("jan", dense_path)
    assert len(list((home / ".lmstudio" / "models" / "mlxlora").iterdir())) == 1


def test_damaged_settings_are_no_fault_of_who_does_not_install(home, dense_path):
    (home / ".lmstudio").mkdir()
    (home / ".lmstudio" / "settings.json").write_text("{")
    said = []
    screen = type("Screen", (), {"say": lambda self, *words: said.append(words)})()
    assert copy(screen, None, dense_path) == {} and said == []
    with pytest.raises(ConfigError):
        check("lmstudio", dense_path)
