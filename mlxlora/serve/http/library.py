"""Adapters that clients may have loaded: those under one directory, and nothing else.

A name in a request is looked up below the directory that the server was given. It cannot leave
it by .. or a link, is never a Hub id, and names no file.
"""

import re
from pathlib import Path

from mlxlora.errors import AdapterError
from mlxlora.lora.adapter import Adapter

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,95}")


def check_name(name: str) -> None:
    """Raise AdapterError unless it can name an adapter in requests."""
    if not NAME.fullmatch(name):
        raise AdapterError(
            f"{name[:100]!r} cannot name an adapter: letters, digits and . _ : - only, at most 96"
        )


def load_from(root: Path, path: str) -> Adapter:
    """The adapter in this directory under root. Raises AdapterError, telling nothing of others."""
    missing = AdapterError(f"there is no adapter {path[:200]!r} under the server's adapter root")
    if not path or "\0" in path or Path(path).is_absolute() or len(path) > 1000:
        raise missing
    try:
        home = root.resolve(strict=True)
        directory = (home / path).resolve(strict=True)
        if not directory.is_relative_to(home) or not directory.is_dir():
            raise missing
    except (OSError, RuntimeError, ValueError):  # RuntimeError: links that go in circles
        raise missing from None
    try:
        return Adapter.load(directory)
    except AdapterError as error:  # where the root is, is not for clients
        raise AdapterError(str(error).replace(str(directory), path)) from error
