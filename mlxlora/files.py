"""Files that are whole or absent, and their hashes.

A file or directory is written beside its place, synced, then renamed: a reader (or a
crash, or a full disk) sees the old one, the new one or none, never half of one.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlxlora.errors import ExportError

# What a writer that was killed leaves behind is named so that remove_leftovers() knows it.
BEING_WRITTEN, MOVED_ASIDE = ".tmp-", ".old-"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h, renameat2(2)
RENAME_SWAP = 2  # macOS: renamex_np(2)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of path for writing; on success it becomes path.

    Any error (a full disk included) removes the temporary file and leaves path as it was.
    """
    with _place_for(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{BEING_WRITTEN}")
    try:
        os.close(descriptor)
        with open(name, "wb") as file:  # by its name, which the file then tells
            yield file
            file.flush()
            sync(file.fileno())
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
    path = Path(os.path.realpath(path))  # a link to an empty directory is followed
    if not replace:
        refuse_existing(path)
    prefix = f".{path.name}{BEING_WRITTEN}"
    with _place_for(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    sync(opened.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        _sync_directory(temporary)
        _swap_in(temporary, path)
        _sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def _place_for(path: Path) -> Iterator[None]:
    """Make path's parent, then inside what stands beside path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except FileNotFoundError as error:  # a place, like /proc, that takes nothing
        raise ExportError(f"{path} cannot be made: {error.strerror}") from error


def sync(descriptor: int) -> None:
    """Put a file's or directory's bytes on the disk, past the disk's own cache on a Mac."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):  # a file system that knows no such order
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def refuse_existing(path: Path) -> None:
    """Raise ExportError if something other than an empty directory stands at path."""
    there = path.exists() or path.is_symlink()  # one that leads nowhere, too
    if there and not (path.is_dir() and not any(path.iterdir())):
        raise ExportError(f"{path} exists already and is never overwritten; choose another name")


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def finite(value: Any) -> Any:
    """The same with None for what is no number: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def remove_directory(path: Path) -> None:
    """Remove a directory at once as far as anyone can see, then file by file."""
    gone = path.with_name(f".{path.name}{BEING_WRITTEN}gone")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Tidy up after a writer that was killed; nobody else may be writing in the directory.

    What was moved aside and not replaced yet is put back; everything unfinished is removed.
    """
    for left in directory.glob(f".*{MOVED_ASIDE}*"):
        place = directory / left.name[1:].rpartition(MOVED_ASIDE)[0]
        if not place.exists() and (left / "old").exists():
            os.rename(left / "old", place)
        shutil.rmtree(left, ignore_errors=True)
    for left in directory.glob(f".*{BEING_WRITTEN}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _swap_in(temporary: Path, path: Path) -> None:
    """Rename temporary to path; what stands there is exchanged in the same instant, then removed.

    Where the file system cannot exchange, it is moved aside first. An empty directory on which a
    volume is mounted cannot be replaced at all: it is filled, in order of name.
    """
    if not path.exists():
        os.rename(temporary, path)
    elif os.path.ismount(path):
        for child in sorted(temporary.iterdir()):
            shutil.move(child, path / child.name)
        temporary.rmdir()
    elif _exchange(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{MOVED_ASIDE}"))
        os.rename(path, aside / "old")
        os.rename(temporary, path)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths atomically; False if the system does not know how."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        return bool(library.renamex_np(*names, RENAME_SWAP) == 0)
    if not hasattr(library, "renameat2"):
        return False
    here = AT_FDCWD
    return bool(library.renameat2(here, names[0], here, names[1], RENAME_EXCHANGE) == 0)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
