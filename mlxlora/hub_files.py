"""Files from the Hub, fetched by huggingface-hub into its own cache, and its refusals in one line.

Who the user is, is huggingface-hub's affair (HF_TOKEN, or its login file). The token is read here
only to be kept out of what is shown: a server may echo what it was sent.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxlora.readers import Kind, expanded

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_SECONDS = 10.0  # that the Hub may take to answer
TOKEN = re.compile(r"hf_\w{20,}")  # of anyone


def fetch(name: str, revision: str | None, patterns: Sequence[str], kind: Kind) -> Path:
    """A repo's files of these patterns in the cache; if the Hub is silent, those fetched before.

    Raises kind if there are none to be had.
    """
    silent = not _answers(name, revision)
    try:
        return download(
            name, revision=revision, allow_patterns=list(patterns), local_files_only=silent
        )
    except refusals() as error:
        why = reason(error)
        if silent:
            why = "it does not answer, and its cache does not hold it"
        raise kind(
            f"{name} is neither a directory here nor to be had from the Hub: {why}"
        ) from None  # the error itself may hold what the server echoed


def here(name: str | Path, patterns: Sequence[str], kind: Kind) -> Path:
    """The path that is named; for a text like owner/name that is no path here, a repo's files."""
    path = expanded(name)
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not os.path.lexists(path):
        return fetch(name, None, patterns, kind)
    return path


def download(name: str, **how: Any) -> Path:
    """snapshot_download, which leaves its progress bars open, to be drawn over what comes next."""
    from huggingface_hub import snapshot_download, utils

    hub: Any = utils  # what is used of it is public, but not marked so
    bars: list[Any] = []

    class Bar(hub.tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "leave": False})
            bars.append(self)

    try:
        return Path(snapshot_download(name, tqdm_class=Bar, **how))
    finally:
        for bar in reversed(bars):
            bar.close()


def refusals() -> tuple[type[Exception], ...]:
    """What huggingface-hub raises when it cannot: of its own, of its HTTP library, of Xet."""
    from huggingface_hub.errors import HfHubHTTPError, SafetensorsParsingError

    library = HfHubHTTPError.__bases__
    return (*library, SafetensorsParsingError, OSError, ValueError, RuntimeError)


@contextlib.contextmanager
def plainly(kind: Kind, what: str, then: str = "") -> Iterator[None]:
    """Inside, what the Hub refuses is kind: what, why, and what to do if it may pass.

    What this machine's own disk refuses stays as it is.
    """
    try:
        yield
    except refusals() as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        passes = _status(_cause(error)) in (0, 408, 429, *range(500, 600))
        raise kind(f"{what}: {reason(error)}{then if passes else ''}") from None


def reason(error: BaseException) -> str:
    """Why the Hub did not do it, in one line without a token."""
    from huggingface_hub import errors

    error = _cause(error)
    status = _status(error)
    says = _first_line(getattr(error, "server_message", None) or "")
    says = f" ({says})" if says else ""
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such branch, tag or commit"
    if isinstance(error, errors.GatedRepoError):
        return "it is gated; ask for access on its page"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"it does not exist, or is private and {_not_for_you()}"
    if status == 401:
        return "the Hub does not accept your token; log in again with: hf auth login"
    if status == 403:
        return f"your token may not do that{says}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status:
        return f"the Hub answers {status}{says}"
    text = _first_line(str(error)) or type(error).__name__
    if isinstance(error, errors.HfHubHTTPError.__bases__[0]):  # of the HTTP library
        return f"no connection to the Hub ({text})"
    return text


def without_token(text: str) -> str:
    """The text with any Hub token in it struck out."""
    own = token()
    return TOKEN.sub("hf_...", text.replace(own, "hf_...") if own else text)


def token() -> str | None:
    """The token that huggingface-hub would send, only ever to look for it."""
    from huggingface_hub import get_token

    with contextlib.suppress(Exception):  # one that must be renewed, and cannot
        return get_token()
    return None


def _cause(error: BaseException) -> BaseException:
    """The error that huggingface-hub speaks of in its own."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int:
    """What the Hub answered; 0 if it was no answer."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _first_line(text: str) -> str:
    return without_token((text.strip().splitlines() or [""])[0])[:200]


def _not_for_you() -> str:
    if token() is None:
        return "you are not logged in (hf auth login, or HF_TOKEN)"
    return "your token may not see it"


def _answers(name: str, revision: str | None) -> bool:
    """Whether the Hub says anything of this repo, be it an error.

    snapshot_download waits without end for a server that takes the request and is silent.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
    except (HfHubHTTPError, ValueError):  # why, it says again when asked for the files
        return True
    except Exception:  # of the HTTP library that huggingface-hub uses, or of being offline
        return False
    return True
