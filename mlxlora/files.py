"""Files that are whole or absent, and what can be said of weights without loading them.

A file or directory is written beside its place, synced, then renamed: a reader (or a
crash, or a full disk) sees the old one, the new one or none, never half of one.
The safetensors layout (8 bytes of header length, a JSON header, then the data) is read
here directly, since a header is enough to find truncation and to fingerprint a model.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlxlora.errors import ExportError, ModelError

SAMPLE_BYTES = 4096  # read from each end of a tensor for its fingerprint


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of path for writing; on success it becomes path.

    Any error (a full disk included) removes the temporary file and leaves path as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        _sync_directory(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside path that becomes path when the block succeeds.

    Raises ExportError if path exists and replace is False.
    """
    if not replace:
        refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        _swap_in(temporary, path)
        _sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(path: Path) -> None:
    """Raise ExportError if something other than an empty directory stands at path."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ExportError(f"{path} exists already and is never overwritten; choose another name")


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> {dtype, shape, data_offsets}.

    Raises ModelError if the file is cut short, empty or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise ModelError(f"{path} is not a whole safetensors file ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
            tensors = {k: v for k, v in header.items() if k != "__metadata__"}
            end = max((v["data_offsets"][1] for v in tensors.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise ModelError(f"{path} has a damaged safetensors header") from error
    if not isinstance(end, int) or 8 + length + end != size:
        raise ModelError(
            f"{path} is truncated: its header promises {8 + length + end:,} bytes, "
            f"it has {size:,}; download or copy it again"
        )
    return tensors


def fingerprint(weight_files: list[Path]) -> str:
    """A hash of a model's weights that does not depend on how they are split into files.

    Over all tensors in order of name: name, dtype, shape and the first and last 4 KiB of
    data. It tells models apart (any training touches every tensor) in well under a second;
    it is not a proof against someone who edits the middle of a tensor.
    """
    places = {}
    for path in weight_files:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        for name, info in safetensors_header(path).items():
            places[name] = (path, start, info)
    digest = hashlib.sha256()
    for name in sorted(places):
        path, start, info = places[name]
        first, last = info["data_offsets"]
        digest.update(f"{name} {info['dtype']} {info['shape']}\n".encode())
        with path.open("rb") as file:
            file.seek(start + first)
            digest.update(file.read(min(SAMPLE_BYTES, last - first)))
            file.seek(start + max(first, last - SAMPLE_BYTES))
            digest.update(file.read(min(SAMPLE_BYTES, last - first)))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """Write MLX arrays as safetensors, whole or not at all.

    The file object is Python's own, so that a full disk is an error: given a name,
    mx.save_safetensors does not notice one. Tensors are handed over in order of name, so
    that equal tensors give equal bytes.
    """
    import mlx.core as mx

    with atomic_file(path) as file:
        mx.save_safetensors(file, dict(sorted(tensors.items())), metadata=metadata)


def _swap_in(temporary: Path, path: Path) -> None:
    """Rename temporary to path; a directory already there is moved aside first, then removed."""
    if not path.exists():
        os.rename(temporary, path)
        return
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    os.rename(path, aside / "old")
    os.rename(temporary, path)
    shutil.rmtree(aside, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
