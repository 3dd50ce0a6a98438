"""Files that someone else wrote, read with suspicion: JSON objects and safetensors headers.

Whatever stands in them, the answer is a value or the error that the caller names: never
another exception, a wait for a pipe that nobody writes, or an allocation as large as a number
in the file says. The safetensors layout (8 bytes of header length, a JSON header, then the
data) is read here directly, since a header is enough to find truncation and to fingerprint a
model. https://github.com/huggingface/safetensors describes the format.
"""

import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from mlxlora.errors import MlxLoraError, ModelError

Kind = type[MlxLoraError]

LARGEST_JSON = 64 << 20
LARGEST_HEADER = 100 << 20  # what the safetensors library reads at most
LARGEST_DIMENSION = (1 << 31) - 1  # MLX counts in 32 bits
SAMPLE_BYTES = 4096  # read from each end of a tensor for its fingerprint
# Bytes of an element of each type that MLX reads.
WIDTHS = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4},
    **{"U64": 8, "I64": 8, "C64": 8},
}
FLOATING = {"F16", "BF16", "F32"}


def expanded(name: str | Path) -> Path:
    """The path with a leading ~ resolved; the home of an unknown user stays as written."""
    return Path(os.path.expanduser(name))


def file_size(path: Path, kind: Kind) -> int:
    """The size of a file that may be opened. A pipe or a device would be waited on for ever.

    Raises kind for anything that is no regular file, or a link to none.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise kind(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise kind(f"cannot read {path}: it is not a regular file")
    return found.st_size


def read_text(path: Path, kind: Kind) -> str:
    """The text of a UTF-8 file of at most LARGEST_JSON bytes."""
    size = file_size(path, kind)
    if size > LARGEST_JSON:
        raise kind(f"{path} is {size:,} bytes long; at most {LARGEST_JSON:,} are read")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise kind(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise kind(f"{path} is not UTF-8 text (byte {error.start + 1})") from error


def read_json(path: Path, kind: Kind) -> dict[str, Any]:
    """The JSON object in a file. Its text is all Unicode, so it can be shown and written."""
    text = read_text(path, kind)
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except UnicodeEncodeError as error:
        raise kind(f"{path} holds half a surrogate pair, which is no text") from error
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is not valid JSON: {_reason(error)}") from error
    if not isinstance(value, dict):
        raise kind(f"{path} does not hold a JSON object")
    return value


def safetensors_header(path: Path, kind: Kind = ModelError) -> dict[str, Any]:
    """The header of a safetensors file: name -> {dtype, shape, data_offsets}.

    Raises kind if the file is cut short, empty or not a safetensors file: every tensor of a
    type that MLX reads, just as long as its shape says, one after another to the file's end.
    """
    size = file_size(path, kind)
    tensors, start = _parsed(path, size, kind)
    end = 0
    for name, info in sorted(tensors.items(), key=lambda pair: _begin(pair[1])):
        fault = _tensor_fault(info, end)
        if fault:
            raise kind(f"{path} has a damaged safetensors header: {name[:80]!r} {fault}")
        end = info["data_offsets"][1]
    if start + end != size:
        raise kind(
            f"{path} is truncated: its header promises {start + end:,} bytes, "
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
        tensors = safetensors_header(path)
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        for name, info in tensors.items():
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


def _parsed(path: Path, size: int, kind: Kind) -> tuple[dict[str, Any], int]:
    """(name -> whatever stands there, where the data starts)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise kind(f"{path} is not a whole safetensors file ({size:,} bytes)")
            text = file.read(length).decode()
    except OSError as error:
        raise kind(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise kind(f"{path} is not a safetensors file: its header is no text") from error
    try:
        header = json.loads(text, object_pairs_hook=_each_once)
        json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} has a damaged safetensors header: {_reason(error)}") from error
    if not isinstance(header, dict):
        raise kind(f"{path} has a damaged safetensors header: it is no JSON object")
    notes = header.pop("__metadata__", None)
    notes = {} if notes is None else notes  # MLX writes null for none
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise kind(f"{path} has a damaged safetensors header: __metadata__ must hold texts")
    return header, 8 + length


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may take different ones of two equal names, so there must not be two."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _begin(info: Any) -> tuple[int, int]:
    """Sort key; what is no tensor comes first and is refused there."""
    offsets: Any = info.get("data_offsets") if isinstance(info, dict) else None
    return (offsets[0], offsets[1]) if _counts(offsets) and len(offsets) == 2 else (-1, -1)


def _tensor_fault(info: Any, begin: int) -> str:
    """What is wrong with a tensor's entry whose data should start at begin, or ''."""
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        return "needs dtype, shape and data_offsets"
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        return f"is of type {str(dtype)[:20]!r}, which MLX does not read"
    if not _counts(shape) or len(shape) > 16 or any(n > LARGEST_DIMENSION for n in shape):
        return f"has an impossible shape {str(shape)[:80]}"
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] != begin:
        return f"does not start where the one before ends ({begin:,})"
    if offsets[1] - offsets[0] != math.prod(shape) * WIDTHS[dtype]:
        return f"has {offsets[1] - offsets[0]:,} bytes, its shape {shape} of {dtype} needs others"
    return ""


def _counts(value: Any) -> bool:
    """Whether this is a list of whole numbers from 0 to 2^63."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error)[:200]
