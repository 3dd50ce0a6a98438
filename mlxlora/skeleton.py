"""A model of which nothing is loaded: every layer, shape and type, and not one weight.

MLX arrays are computed when they are needed, so mlx-lm's own classes can be built from
config.json and the headers of the safetensors files, quantized layers and low-rank ones
included, and nothing is read. From the Hub, headers come by HTTP range, and stand-ins with the
same headers and no data (sparse files, gone when the model is built) are opened in the place of
the weights: the way is the one by which models are loaded, so what it refuses is refused here.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils as zoo

from mlxlora.base import open_frozen, open_tokenizer
from mlxlora.errors import ModelError
from mlxlora.hub_files import download, reason, refusals
from mlxlora.model_files import check_directory, find

SMALL_FILES = [pattern for pattern in zoo.DEFAULT_ALLOW_PATTERNS if "safetensors" not in pattern]


@dataclass(frozen=True)
class Skeleton:
    """What Base is, without weights. model's arrays must not be evaluated."""

    model: nn.Module
    config: dict[str, Any]
    path: Path  # a directory with its small files
    local: bool  # the weights are on this machine

    @property
    def bytes(self) -> int:
        """What the weights take once they are loaded."""
        return sum(array.nbytes for _, array in tree_flatten(self.model.parameters()))

    def tokenizer(self, trust_remote_code: bool = False) -> Any:
        """The tokenizer that the base has when it is loaded."""
        return open_tokenizer(self.path, self.config, trust_remote_code)


def open_skeleton(name: str | Path, *, trust_remote_code: bool = False) -> Skeleton:
    """The skeleton of a base model in a directory or on the Hub, as base.load would load it.

    Raises ModelError for whatever base.load would refuse without reading the weights.
    """
    with _files(name) as (path, small_files, local):
        model, config = open_frozen(path, trust_remote_code)
        return Skeleton(model, config, small_files, local)


@contextmanager
def _files(name: str | Path) -> Iterator[tuple[Path, Path, bool]]:
    """(a directory of all files, there while inside; one of the small files; is the first real)."""
    path = Path(name).expanduser()
    here = path if path.exists() else _fetched_before(str(name))
    if here is not None:
        found = find(here)[0]
        yield found, found, True
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory), _fetch_headers(str(name), Path(directory)), False


def _fetched_before(name: str) -> Path | None:
    """The whole model in the Hub's cache on this machine, if it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name, allow_patterns=zoo.DEFAULT_ALLOW_PATTERNS, local_files_only=True
        )
        check_directory(Path(found))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, ModelError):
        return None
    return Path(found)


def _fetch_headers(name: str, directory: Path) -> Path:
    """Fill the directory with the model's small files and stand-ins for its weights.

    Returns where the Hub's cache keeps the small files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        fetched = download(name, allow_patterns=SMALL_FILES)
        metadata = HfApi().get_safetensors_metadata(name, revision=fetched.name)
    except NotASafetensorsRepoError as error:
        raise ModelError(
            f"{name} has no model*.safetensors; mlxlora reads no other weights"
        ) from error
    except refusals() as error:
        raise ModelError(
            f"{name} is neither a directory here nor to be had from the Hub: {reason(error)}"
        ) from None
    for file in fetched.iterdir():
        if not file.name.endswith(".safetensors"):
            os.symlink(file.resolve(), directory / file.name)
    for file_name, shard in metadata.files_metadata.items():
        tensors = {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in shard.tensors.items()
        }
        write_stand_in(directory / file_name, tensors)
    return fetched


def write_stand_in(path: Path, tensors: dict[str, dict[str, Any]]) -> None:
    """A safetensors file with this header, whose data is a hole: right in size, zero on disk."""
    header = json.dumps(tensors).encode()
    end = max((info["data_offsets"][1] for info in tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
