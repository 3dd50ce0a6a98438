import os
from pathlib import Path

import mlx.core as mx
import pytest

from mlxlora import files
from mlxlora.errors import ExportError, ModelError
from mlxlora.files import (
    atomic_directory,
    atomic_file,
    save_tensors,
)
from mlxlora.readers import fingerprint, safetensors_header


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_directory_is_absent(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_an_existing_directory_is_only_replaced_when_asked(tmp_path):
    target = tmp_path / "d"
    target.mkdir()
    (target / "x").write_text("old")
    with pytest.raises(ExportError, match="exists already"), atomic_directory(target):
        pass
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "y").write_text("new")
    assert os.listdir(target) == ["y"]
    assert os.listdir(tmp_path) == ["d"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    """/dev/full fails every write, as a full disk does."""

    def full(name: str, mode: str):
        return open("/dev/full", mode)

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(tmp_path / "w.safetensors", {"a": mx.zeros((1000, 1000))}, {})
    assert os.listdir(tmp_path) == []


def test_truncation_is_seen_without_loading(tmp_path):
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"a": mx.arange(100)}, {})
    assert safetensors_header(path)["a"]["shape"] == [100]
    whole = path.read_bytes()
    for cut in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError):
            safetensors_header(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError):
        safetensors_header(path)


def test_fingerprint_does_not_depend_on_the_shards_but_on_every_tensor(tmp_path):
    tensors = {name: mx.random.normal((64, 64)) for name in "abc"}
    whole, first, rest = (tmp_path / f"{n}.safetensors" for n in ("whole", "first", "rest"))
    save_tensors(whole, tensors, {})
    save_tensors(first, {"b": tensors["b"]}, {})
    save_tensors(rest, {"c": tensors["c"], "a": tensors["a"]}, {"some": "metadata"})
    assert fingerprint([whole]) == fingerprint([first, rest])
    save_tensors(first, {"b": tensors["b"] + 1e-3}, {})
    assert fingerprint([whole]) != fingerprint([first, rest])
