"""Adapters and models to the Hub and back, by huggingface-hub.

push makes one commit of the files that belong (parcel.py), so that nobody sees half of it. Large
files are stored there under their hash before the commit names them: a push that was cut off and
is started again sends only what had not arrived (with Xet, huggingface-hub's default, piece by
piece; without, file by file). Its upload_large_folder is not used: it commits in several steps
and leaves notes in the folder.

pull fetches the same files and checks them. Into a directory of one's own they come through a
hidden neighbour, which becomes it when all is there and is kept when the pull is cut off.
"""

import dataclasses
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora import __version__
from mlxlora.errors import ExportError
from mlxlora.export.parcel import KINDS, Kind, Parcel, check, kind_of, matches, pack
from mlxlora.files import atomic_directory, hash_file, refuse_existing
from mlxlora.hub_files import HUB_ID, HUB_SECONDS, download, plainly, token

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

MAIN = "main"
PARTLY = ".pull-"  # in the name of a directory that is being filled
NEW, CHANGED, THERE = "new", "changed", "there already"
GOES_ON = "\nThe same command goes on from here: files that arrived whole are not sent again."


@dataclass(frozen=True)
class File:
    name: str
    bytes: int
    state: str  # NEW, CHANGED or THERE: what is there already is not sent again


@dataclass(frozen=True)
class Pushed:
    """What push() did, or in a dry run would do."""

    path: str
    kind: str  # "an adapter", "a model"
    repo: str
    revision: str  # the branch
    created: bool  # the repo, which was not there before
    branched: bool  # the branch was not there before
    private: bool | None  # None: as its owner's default says (not created yet)
    url: str  # of the commit; of the repo where nothing was committed
    commit: str  # that the branch is at; "" in a dry run
    files: tuple[File, ...]
    removed: tuple[str, ...]  # weights of before, which may not stay beside the new ones
    left_out: tuple[str, ...]  # in the directory, and not sent

    @property
    def to_send(self) -> list[File]:
        return [file for file in self.files if file.state != THERE]


@dataclass(frozen=True)
class Pulled:
    """What pull() fetched."""

    path: Path
    kind: str
    repo: str
    commit: str
    bytes: int


def push(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "",
    dry_run: bool = False,
) -> Pushed:
    """Commit an adapter or model directory to a branch of a repo; both are made if need be.

    Of a run's directory it is the adapter. Files that the branch holds already are not sent.
    private is for a repo that is not there yet. Raises ExportError, and what pack() raises.
    """
    from huggingface_hub import HfApi

    branch = revision or MAIN
    _check_names(repo, branch)
    parcel = pack(path)
    if token() is None:
        raise ExportError("you are not logged in to the Hub; hf auth login does it, or HF_TOKEN")
    api = HfApi()
    with plainly(ExportError, f"cannot push to {repo}", "" if dry_run else GOES_ON):
        there = _look(api, repo, branch)
        _check_target(there, repo, branch, parcel.kind, private)
        created, branched = not there.exists, branch not in (*there.branches, MAIN)
        if created:
            _check_owner(api, repo)
        if not dry_run:
            there = _made(api, repo, branch, there, parcel.kind, private)
        pushed = Pushed(
            path=str(parcel.directory),
            kind=parcel.kind.name,
            repo=repo,
            revision=branch,
            created=created,
            branched=branched,
            private=there.private if there.exists else (True if private else None),
            url=f"{api.endpoint}/{repo}",
            commit="" if dry_run else there.head,
            files=tuple(File(f.name, f.stat().st_size, there.state(f)) for f in parcel.files),
            removed=there.stale(parcel),
            left_out=parcel.left_out,
        )
        operations = _operations(pushed)
        if dry_run or not operations:
            return pushed  # a commit would be empty
        done = api.create_commit(
            repo,
            operations,
            commit_message=message or f"{parcel.kind.name.capitalize()}, by mlxlora {__version__}",
            revision=branch,
            parent_commit=there.head or None,  # if it is another by now, all this was wrong
        )
    return dataclasses.replace(pushed, url=done.commit_url, commit=done.oid)


def pull(repo: str, *, revision: str | None = None, out: str | Path | None = None) -> Pulled:
    """Fetch an adapter or a model and check it; into huggingface-hub's cache if out is None.

    out appears whole or not at all, and is never overwritten. Raises ExportError, or what is
    wrong with the files: AdapterError, ModelError.
    """
    from huggingface_hub import HfApi

    _check_names(repo)
    target = None if out is None else Path(os.path.realpath(os.path.expanduser(out)))
    if target is not None:
        refuse_existing(target)
    what = f"cannot pull {repo}" + (f" at {revision}" if revision else "")
    with plainly(ExportError, what):
        info = _model_info(HfApi(), repo, revision)
    names = [file.rfilename for file in info.siblings or ()]
    kind = kind_of(repo, names)
    wanted = [glob.escape(name) for name in names if _pulled(name, kind)]
    if target is None:
        with plainly(ExportError, what):  # under the branch's name, by which it is found again
            place = download(repo, revision=revision, allow_patterns=wanted)
        check(place, kind)
    else:
        place = _pull_into(target, repo, info.sha, kind, wanted)
    total = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return Pulled(place, kind.name, repo, str(info.sha), total)


def _pull_into(target: Path, repo: str, commit: str, kind: Kind, wanted: list[str]) -> Path:
    """Fetch into a hidden neighbour of target, check it there, and make it target."""
    partly = target.parent / f".{target.name}{PARTLY}{commit[:12]}"
    goes_on = "\nThe same command goes on from here: files that arrived whole are kept."
    try:
        with plainly(ExportError, f"cannot pull {repo}", goes_on):
            download(repo, revision=commit, local_dir=partly, allow_patterns=wanted)
    except OSError:  # this machine's disk: what is here is of no use
        _forget(target)
        raise
    try:
        check(partly, kind)
        with atomic_directory(target) as temporary:
            for child in partly.iterdir():
                if child.name != ".cache":  # huggingface-hub's own notes
                    child.rename(temporary / child.name)
    finally:
        _forget(target)
    return target


def _forget(target: Path) -> None:
    """Remove what pulls that were cut off had left beside the target."""
    for left in target.parent.glob(f".{glob.escape(target.name)}{PARTLY}*"):
        shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True)
class _There:
    """What the Hub holds of a repo, at the branch or where the branch would begin."""

    exists: bool = False
    private: bool = False
    branches: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    head: str = ""
    files: Mapping[str, Any] = field(default_factory=dict)  # name -> RepoFile

    def state(self, file: Path) -> str:
        """What sending this file would be there."""
        remote = self.files.get(file.name)
        if remote is None:
            return NEW
        if remote.size != file.stat().st_size:
            return CHANGED
        if remote.lfs is not None:
            same = remote.lfs.sha256 == hash_file(file)
        else:  # git's name for these bytes
            content = file.read_bytes()
            same = remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return THERE if same else CHANGED

    def stale(self, parcel: Parcel) -> tuple[str, ...]:
        """Weights there that are not in the parcel: whoever loads it would load them too."""
        sent = {file.name for file in parcel.files}
        return tuple(sorted(n for n in self.files if parcel.kind.replaces(n) and n not in sent))


def _look(api: "HfApi", repo: str, branch: str) -> _There:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        info = api.model_info(repo, timeout=HUB_SECONDS)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return _There()
    refs = api.list_repo_refs(repo)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    start = branch if branch in heads else MAIN
    tree = api.list_repo_tree(repo, revision=start) if start in heads else ()
    return _There(
        exists=True,
        private=bool(info.private),
        branches=tuple(heads),
        tags=tuple(ref.name for ref in refs.tags),
        head=heads.get(start, ""),
        files={file.path: file for file in tree if isinstance(file, RepoFile)},
    )


def _made(api: "HfApi", repo: str, branch: str, there: _There, kind: Kind, private: bool) -> _There:
    """What is there once the repo and the branch are."""
    if not there.exists:
        api.create_repo(repo, private=True if private else None)
        there = _look(api, repo, branch)
        _check_target(there, repo, branch, kind, private)
    if branch not in there.branches:
        api.create_branch(repo, branch=branch, exist_ok=True)
    return there


def _operations(pushed: Pushed) -> "list[CommitOperationAdd | CommitOperationDelete]":
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added = [CommitOperationAdd(f.name, os.path.join(pushed.path, f.name)) for f in pushed.to_send]
    return [*(CommitOperationDelete(name) for name in pushed.removed), *added]


def _check_target(there: _There, repo: str, branch: str, kind: Kind, private: bool) -> None:
    """Raise ExportError where a push would publish, or mix, what was not meant to be."""
    if not there.exists:
        return
    if private and not there.private:
        raise ExportError(
            f"{repo} is there already and is public; --private is for a new one. "
            "Make it private on its page, or choose another name"
        )
    if branch in there.tags and branch not in there.branches:
        raise ExportError(f"a push goes to a branch, and {branch} is a tag of {repo}")
    for other in KINDS:
        if other is not kind and other.is_told_by(there.files):
            raise ExportError(f"{repo} holds {other.name}; push {kind.name} to a repo of its own")


def _check_owner(api: "HfApi", repo: str) -> None:
    """Raise ExportError unless the user may have repos under this owner's name."""
    me = api.whoami()
    owners = [me["name"], *(one["name"] for one in me.get("orgs") or ())]
    if repo.partition("/")[0].lower() not in [owner.lower() for owner in owners]:
        raise ExportError(
            f"{repo} does not exist, and your token makes repos only under: {', '.join(owners)}"
        )


def _model_info(api: "HfApi", repo: str, revision: str | None) -> Any:
    """What the Hub says of a model; for a dataset or space of that name, that it is one."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return api.model_info(repo, revision=revision, timeout=HUB_SECONDS)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        for other in ("dataset", "space"):
            if api.repo_exists(repo, repo_type=other):
                raise ExportError(f"{repo} is a {other}, not a model or an adapter") from None
        raise


def _pulled(name: str, kind: Kind) -> bool:
    """Whether a file of the repo is fetched: what is pushed, and what --model would fetch."""
    if kind.name == "a model":
        from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

        return kind.owns(name) or matches(name, DEFAULT_ALLOW_PATTERNS)
    return kind.owns(name)


def _check_names(repo: str, branch: str = "") -> None:
    if not HUB_ID.fullmatch(repo):
        raise ExportError(f"{repo!r} is no name on the Hub; those look like owner/name")
    if re.fullmatch("[0-9a-f]{40}", branch):
        raise ExportError(f"a push goes to a branch, and {branch} is a commit")
