"""A model directory written tensor by tensor: shards, index, config, tokenizer files.

Tensors come from an iterator, or from whoever hands them over one by one, in any order, and are
let go once their shard is on disk, so the peak is one shard. The directory appears whole or not at
all.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxlora.errors import ExportError
from mlxlora.files import atomic_directory, refuse_existing, save_tensors, write_json

Kind = Literal["mlx", "pt"]  # which numbers' layout and names, in the words of the metadata
SHARD_BYTES = 4 << 30
SPARE_BYTES = 64 << 20  # of disk, beyond the estimate
# Not copied: about other weights than those written.
_OURS = {"config.json", "model.safetensors.index.json", "README.md", "fidelity.json"}
Add = Callable[[str, mx.array], None]  # takes a tensor by its name
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*")


def write_model(
    directory: Path,
    tensors: Iterator[tuple[str, mx.array]] | Callable[[Add], None],
    config: dict[str, Any],
    source: Path,
    expected_bytes: int,
    finish: Callable[[Path], None] = lambda directory: None,
    *,
    kind: Kind = "mlx",
    without: Set[str] = frozenset(),
) -> int:
    """Write a model that mlx-lm loads, or transformers; return the bytes of its tensors.

    tensors: an iterator of them, or a function that hands them over to the one it is called with.
    source is the base's directory, for tokenizer, template and generation config, all but the
    files named in without. kind: what the safetensors files say they are made for. finish is
    called with the directory when all is in it and it has not got its name yet; if it raises,
    nothing is left. Raises ExportError if directory exists or the disk has no room for
    expected_bytes.
    """
    refuse_existing(directory)
    with atomic_directory(directory) as temporary:
        check_room(temporary, expected_bytes, directory)
        sizes = _write_shards(temporary, tensors, kind)
        write_json(temporary / "config.json", dict(sorted(config.items())))
        copy_companions(source, temporary, without)
        finish(temporary)
    return sum(sizes.values())


def check_room(place: Path, size: int, name: Path) -> None:
    """Raise ExportError if the disk that place is on has no room for so many bytes of name."""
    free = shutil.disk_usage(place).free
    if free < size + SPARE_BYTES:
        raise ExportError(f"{name} needs about {_said(size)} and the disk has {_said(free)} free")


def _said(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def copy_companions(source: Path, target: Path, without: Set[str] = frozenset()) -> None:
    """Copy tokenizer, template, generation config and licence byte for byte, writable.

    without: the names of files to leave.
    """
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name not in _OURS | without and file.is_file():
                shutil.copyfile(file, target / file.name)


def taken_tensors(model: nn.Module) -> dict[str, mx.array]:
    """The model's parameters, which the model itself then no longer holds."""
    tensors = dict(tree_flatten(model.parameters()))
    model.update(tree_map(lambda _: mx.array(0), model.parameters()))
    return tensors


def _write_shards(
    directory: Path, tensors: Iterator[tuple[str, mx.array]] | Callable[[Add], None], kind: Kind
) -> dict[str, int]:
    """Returns tensor name -> bytes."""
    shards = _Shards(directory, kind)
    if callable(tensors):
        tensors(shards.add)
    else:
        for name, array in tensors:
            shards.add(name, array)
            del array
    shards.close()
    return shards.sizes


class _Shards:
    """Takes tensors one by one. Shards get their final names once their number is known.

    By the custom of Hugging Face (kind "pt"), a file that is the only one has no index beside it.
    """

    def __init__(self, directory: Path, kind: Kind) -> None:
        self.sizes: dict[str, int] = {}
        self._directory, self._kind = directory, kind
        self._homes: dict[str, int] = {}
        self._shard: dict[str, mx.array] = {}
        self._held = self._count = 0

    def add(self, name: str, array: mx.array) -> None:
        if self._shard and self._held + array.nbytes > SHARD_BYTES:
            _write_shard(self._directory, self._count, self._shard, self._kind)
            self._held, self._count = 0, self._count + 1
        mx.eval(array)
        self._shard[name], self.sizes[name] = array, array.nbytes
        self._homes[name] = self._count
        self._held += array.nbytes

    def close(self) -> None:
        """Write what is left, and the index."""
        _write_shard(self._directory, self._count, self._shard, self._kind)
        last = self._count + 1
        names = [
            "model.safetensors" if last == 1 else f"model-{n + 1:05d}-of-{last:05d}.safetensors"
            for n in range(last)
        ]
        for number, name in enumerate(names):
            (self._directory / f"part-{number}").rename(self._directory / name)
        if self._kind == "pt" and last == 1:
            return
        index = {
            "metadata": {"total_size": sum(self.sizes.values())},
            "weight_map": {name: names[self._homes[name]] for name in sorted(self._homes)},
        }
        text = json.dumps(index, indent=2) + "\n"
        (self._directory / "model.safetensors.index.json").write_text(text)


def _write_shard(directory: Path, number: int, shard: dict[str, mx.array], kind: Kind) -> None:
    save_tensors(directory / f"part-{number}", shard, {"format": kind})
    shard.clear()
    mx.clear_cache()
