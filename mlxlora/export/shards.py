"""A model directory written tensor by tensor: shards, index, config, tokenizer files.

Tensors come from an iterator, or from whoever hands them over one by one, in any order, and are
let go once their shard is on disk, so the peak is one shard. The directory appears whole or not at
all.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxlora.errors import ExportError
from mlxlora.files import atomic_directory, refuse_existing, save_tensors, write_json

SHARD_BYTES = 4 << 30
SPARE_BYTES = 64 << 20  # of disk, beyond the estimate
_OURS = {"config.json", "model.safetensors.index.json", "README.md"}  # not copied
Add = Callable[[str, mx.array], None]  # takes a tensor by its name
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*")


def write_model(
    directory: Path,
    tensors: Iterator[tuple[str, mx.array]] | Callable[[Add], None],
    config: dict[str, Any],
    source: Path,
    expected_bytes: int,
    finish: Callable[[Path], None] = lambda directory: None,
) -> int:
    """Write a model that mlx-lm loads; return the bytes of its tensors.

    tensors: an iterator of them, or a function that hands them over to the one it is called with.
    source is the base's directory, for tokenizer, template and generation config. finish is
    called with the directory when all is in it and it has not got its name yet; if it raises,
    nothing is left. Raises ExportError if directory exists or the disk has no room for
    expected_bytes.
    """
    refuse_existing(directory)
    with atomic_directory(directory) as temporary:
        free = shutil.disk_usage(temporary).free
        if free < expected_bytes + SPARE_BYTES:
            raise ExportError(
                f"{directory} needs about {expected_bytes / 1e9:.1f} GB and the disk has "
                f"{free / 1e9:.1f} GB free"
            )
        sizes = _write_shards(temporary, tensors)
        write_json(temporary / "config.json", dict(sorted(config.items())))
        copy_companions(source, temporary)
        finish(temporary)
    return sum(sizes.values())


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, template, generation config and licence byte for byte, writable."""
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name not in _OURS and file.is_file():
                shutil.copyfile(file, target / file.name)


def taken_tensors(model: nn.Module) -> dict[str, mx.array]:
    """The model's parameters, which the model itself then no longer holds."""
    tensors = dict(tree_flatten(model.parameters()))
    model.update(tree_map(lambda _: mx.array(0), model.parameters()))
    return tensors


def _write_shards(
    directory: Path, tensors: Iterator[tuple[str, mx.array]] | Callable[[Add], None]
) -> dict[str, int]:
    """Returns tensor name -> bytes."""
    shards = _Shards(directory)
    if callable(tensors):
        tensors(shards.add)
    else:
        for name, array in tensors:
            shards.add(name, array)
            del array
    shards.close()
    return shards.sizes


class _Shards:
    """Takes tensors one by one. Shards get their final names once their number is known."""

    def __init__(self, directory: Path) -> None:
        self.sizes: dict[str, int] = {}
        self._directory = directory
        self._homes: dict[str, int] = {}
        self._shard: dict[str, mx.array] = {}
        self._held = self._count = 0

    def add(self, name: str, array: mx.array) -> None:
        if self._shard and self._held + array.nbytes > SHARD_BYTES:
            _write_shard(self._directory, self._count, self._shard)
            self._held, self._count = 0, self._count + 1
        mx.eval(array)
        self._shard[name], self.sizes[name] = array, array.nbytes
        self._homes[name] = self._count
        self._held += array.nbytes

    def close(self) -> None:
        """Write what is left, and the index."""
        _write_shard(self._directory, self._count, self._shard)
        last = self._count + 1
        names = [
            "model.safetensors" if last == 1 else f"model-{n + 1:05d}-of-{last:05d}.safetensors"
            for n in range(last)
        ]
        for number, name in enumerate(names):
            (self._directory / f"part-{number}").rename(self._directory / name)
        index = {
            "metadata": {"total_size": sum(self.sizes.values())},
            "weight_map": {name: names[self._homes[name]] for name in sorted(self._homes)},
        }
        text = json.dumps(index, indent=2) + "\n"
        (self._directory / "model.safetensors.index.json").write_text(text)


def _write_shard(directory: Path, number: int, shard: dict[str, mx.array]) -> None:
    save_tensors(directory / f"part-{number}", shard, {"format": "mlx"})
    shard.clear()
    mx.clear_cache()
